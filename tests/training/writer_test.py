import errno
import io
import json
import math
import os
import struct
import sys
import types

import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from PIL import Image
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

from jax_entropy.errors import UserError
from jax_entropy.runs.workdir import to_json
from jax_entropy.training import writer as writer_module
from jax_entropy.training.writer import MetricsWriter

TRAIN = {
    "kind": "train",
    "loss": jnp.float32(2.5),
    "tokens_per_second": 1234.0,
    "gradient_norms": {"attention": np.float32(0.5), "ffn": float("inf")},
    "head_entropy": np.arange(6, dtype=np.float32).reshape(2, 3),
    "layer_entropy": jnp.array([1.0, float("nan")]),
    "threshold": None,
    "temperature": {"mean": [1.0, 2.0], "max": np.array([3.0, 4.0], np.float32)},
    "nan_count": np.array([0, 2], np.int32),
}
EVALUATE = {
    "kind": "evaluate",
    "validation_loss": 3.25,
    "maximum_causal": [3.0, 4.0],
    "head_entropy": np.array([[1.0, 2.0, 3.0], [0.0, np.nan, 1.0]]),
}


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def events(path):
    """The records of a TensorBoard file, their checksums compared."""
    data, found = path.read_bytes(), []
    while data:
        header, (length,) = data[:8], struct.unpack("<Q", data[:8])
        record, rest = data[12 : 12 + length], data[12 + length :]
        assert struct.unpack("<I", data[8:12])[0] == masked_crc32c(header)
        assert struct.unpack("<I", rest[:4])[0] == masked_crc32c(record)
        found.append(Event.FromString(record))
        data = rest[4:]
    return found


def event_files(workdir):
    return sorted(workdir.glob("events.out.tfevents.*"))


def test_lines_are_plain_json_and_on_disk_at_once(tmp_path):
    writer = MetricsWriter(tmp_path / "run")
    writer.write(10, TRAIN)
    assert lines(tmp_path / "run") == [
        {
            "step": 10,
            "kind": "train",
            "loss": 2.5,
            "tokens_per_second": 1234.0,
            "gradient_norms": {"attention": 0.5, "ffn": None},
            "head_entropy": [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]],
            "layer_entropy": [1.0, None],
            "threshold": None,
            "temperature": {"mean": [1.0, 2.0], "max": [3.0, 4.0]},
            "nan_count": [0, 2],
        }
    ]
    writer.write(20, EVALUATE)
    assert [line["step"] for line in lines(tmp_path / "run")] == [10, 20]
    writer.close()


def test_tensorboard_file(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(10, TRAIN)
        writer.write(20, EVALUATE)
    (path,) = event_files(tmp_path)
    version, start, train, evaluate = events(path)
    assert version.file_version == "brain.Event:2"
    assert (start.session_log.status, start.step) == (SessionLog.START, 0)
    assert (train.step, evaluate.step) == (10, 20)
    *scalars, histogram = train.summary.value
    assert {value.tag: value.simple_value for value in scalars} == {
        "loss": 2.5,
        "tokens_per_second": 1234.0,
        "gradient_norms/attention": 0.5,
        **{f"head_entropy/{layer}/{head}": 3.0 * layer + head for layer in range(2) for head in range(3)},
        "layer_entropy/0": 1.0,
        "temperature/mean/0": 1.0,
        "temperature/mean/1": 2.0,
        "temperature/max/0": 3.0,
        "temperature/max/1": 4.0,
        "nan_count/0": 0.0,
        "nan_count/1": 2.0,
    }
    assert (histogram.tag, histogram.histo.num, histogram.histo.sum) == ("head_entropy/heads", 6, 15.0)
    assert sum(histogram.histo.bucket) == 6 and histogram.histo.bucket_limit[-1] == histogram.histo.max == 5.0
    *scalars, histogram, picture = evaluate.summary.value
    assert {value.tag: value.simple_value for value in scalars} == {
        "evaluate/validation_loss": 3.25,
        "evaluate/maximum_causal/0": 3.0,
        "evaluate/maximum_causal/1": 4.0,
        "evaluate/head_entropy/0/0": 1.0,
        "evaluate/head_entropy/0/1": 2.0,
        "evaluate/head_entropy/0/2": 3.0,
        "evaluate/head_entropy/1/0": 0.0,
        "evaluate/head_entropy/1/2": 1.0,
    }
    assert (histogram.tag, histogram.histo.num) == ("evaluate/head_entropy/heads", 5)
    assert picture.tag == "evaluate/head_entropy"
    pixels = np.asarray(Image.open(io.BytesIO(picture.image.encoded_image_string)).convert("RGBA"))
    assert pixels.shape == (32, 48, 4)
    share = EVALUATE["head_entropy"] / 4.0  # of the layer that can have most
    expected = matplotlib.colormaps["viridis"](share, bytes=True)
    np.testing.assert_array_equal(pixels[8::16, 8::16][np.isfinite(share)], expected[np.isfinite(share)])
    assert not pixels[24, 24, 3]  # NaN


def test_resuming_continues_the_file(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in 10, 20, 30:
            writer.write(step, {"kind": "train", "loss": 1.0 / step})
            writer.write(step, {"kind": "evaluate", "validation_loss": 2.0 / step})
    before = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 20, "kind": "tra')
    with MetricsWriter(tmp_path, first_step=20) as writer:
        assert (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True) == before[:4]
        writer.write(25, {"kind": "train", "loss": 5.0})
    assert [line["step"] for line in lines(tmp_path)] == [10, 10, 20, 20, 25]
    assert sorted(path.name.split(".")[0] for path in tmp_path.iterdir()) == ["events", "events", "metrics"]
    starts = [events(path)[1] for path in event_files(tmp_path)]
    assert sorted((event.session_log.status, event.step) for event in starts) == [(1, 0), (1, 21)]


@pytest.mark.parametrize(
    "tail", ["", "\n", "{", '{"step": 3, "loss": 1}', "\x00\x00\n", "[1, 2]\n", '{"loss": 1}\n', "7\n"]
)
def test_a_torn_tail_is_dropped(tmp_path, tail):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n' + tail)
    with MetricsWriter(tmp_path, first_step=3) as writer:
        writer.write(4, {"loss": 1.0})
    assert lines(tmp_path) == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}, {"step": 4, "loss": 1.0}]


def test_every_prefix_of_a_file_can_be_resumed(tmp_path):
    whole = b"".join(json.dumps({"step": step, "loss": step / 7}).encode() + b"\n" for step in range(1, 5))
    for length in range(len(whole) + 1):
        (tmp_path / "metrics.jsonl").write_bytes(whole[:length])
        MetricsWriter(tmp_path, first_step=3).close()
        assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3][: whole[:length].count(b"\n")]


def test_starting_afresh_drops_what_a_run_killed_before_its_first_checkpoint_wrote(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(0, EVALUATE)
        writer.write(10, TRAIN)
    MetricsWriter(tmp_path).close()
    assert lines(tmp_path) == []


def test_dropping_lines_is_atomic(tmp_path, monkeypatch):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, TRAIN)
        writer.write(2, TRAIN)
    before = lines(tmp_path)

    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(UserError, match="No space left on device"):
        MetricsWriter(tmp_path, first_step=1)
    assert lines(tmp_path) == before
    monkeypatch.undo()
    MetricsWriter(tmp_path, first_step=1).close()
    assert lines(tmp_path) == before[:1]


numbers = st.floats(width=32) | st.integers(-(2**63), 2**63 - 1) | st.booleans() | st.none() | st.text(max_size=3)
arrays = st_numpy.arrays(
    st.sampled_from([np.float16, np.float32, np.float64, np.int32, np.uint8, np.bool_]),
    st_numpy.array_shapes(min_dims=0, max_dims=2, max_side=3),
)
metrics = st.dictionaries(
    st.text(min_size=1, max_size=5),
    st.recursive(
        numbers | arrays, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x, max_size=3)
    ),
    max_size=4,
)


def assert_same(value, plain):
    if isinstance(value, dict):
        assert value.keys() == plain.keys()
        for key in value:
            assert_same(value[key], plain[key])
    elif isinstance(value, list) or (isinstance(value, np.ndarray) and value.ndim):
        assert isinstance(plain, list) and len(plain) == len(value)
        for child, plain_child in zip(value, plain, strict=True):
            assert_same(child, plain_child)
    elif isinstance(value, (float, np.floating)) or (isinstance(value, np.ndarray) and value.dtype.kind == "f"):
        assert plain is None if not math.isfinite(value) else plain == pytest.approx(float(value), rel=5.1e-7, abs=0)
    else:
        assert plain == value and type(plain) in (int, bool, str, type(None))


@given(metrics)
def test_anything_becomes_the_same_in_json(value):
    text = json.dumps(to_json(value), allow_nan=False)
    assert_same(value, json.loads(text))


@given(st_numpy.arrays(np.float32, 4))
def test_rounding_is_idempotent(array):
    once = to_json(array)
    assert to_json(once) == once


@pytest.mark.parametrize(
    "value", [jnp.bfloat16(1.5), jnp.array(1.5, jnp.bfloat16), np.array(1.5, np.float16), np.float64(1.5)]
)
def test_scalars_of_any_type_become_floats(value):
    assert to_json(value) == 1.5 and type(to_json(value)) is float
    assert to_json(jnp.array([[1.5, jnp.inf]], jnp.bfloat16)) == [[1.5, None]]


def test_workdir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="the metrics could not be written in .*run.*: Not a directory"):
        MetricsWriter(tmp_path / "file" / "run")
    (tmp_path / "run" / "metrics.jsonl").mkdir(parents=True)
    with pytest.raises(UserError, match="Is a directory"):
        MetricsWriter(tmp_path / "run")


def test_disk_full(disk):
    small = disk(64)
    writer, step = MetricsWriter(small.path), 0
    with pytest.raises(UserError, match="the metrics could not be written in .*: No space left on device"):
        while True:
            step += 1
            writer.write(step, TRAIN)
    with pytest.raises(UserError, match="No space left on device"):
        writer.write(step, TRAIN)
    small.enlarge(1 << 10)
    with MetricsWriter(small.path, first_step=step) as writer:
        writer.write(step + 1, TRAIN)
    steps = [line["step"] for line in lines(small.path)]
    assert steps[: step - 1] == list(range(1, step)) and steps[-1] == step + 1
    assert set(steps[step - 1 : -1]) <= {step}


CONFIG = {"architecture": "SM", "train": {"num_steps": 3}}


class FakeRun:
    def __init__(self):
        self.logged, self.finished = [], False

    def define_metric(self, name, step_metric):
        assert (name, step_metric) == ("*", "step")

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        self.finished = True


def test_weights_and_biases(tmp_path, monkeypatch):
    run, starts = FakeRun(), []
    wandb = types.ModuleType("wandb")
    wandb.Error = type("Error", (Exception,), {})
    wandb.init = lambda **settings: starts.append(settings) or run
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with MetricsWriter(tmp_path / "quickstart", wandb=CONFIG) as writer:
        writer.write(10, TRAIN)
    assert run.finished and len(run.logged) == 1
    assert run.logged[0]["step"] == 10 and run.logged[0]["head_entropy/1/2"] == 5.0
    assert "layer_entropy/1" not in run.logged[0]
    with MetricsWriter(tmp_path / "quickstart", wandb=CONFIG, first_step=10):
        pass
    assert starts[0]["config"] == CONFIG and starts[0]["allow_val_change"]
    assert starts[0] == starts[1] and starts[0]["name"] == "quickstart" and starts[0]["resume"] == "allow"

    def refuses(**_):
        raise wandb.Error("no API key")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    run.finished = False
    with monkeypatch.context() as patched, pytest.raises(UserError, match="No space left on device"):
        patched.setattr(writer_module, "EventsWriter", full)
        MetricsWriter(tmp_path / "quickstart", wandb=CONFIG)
    assert run.finished  # what was begun is ended

    wandb.init = refuses
    with pytest.raises(UserError, match="did not start .no API key."):
        MetricsWriter(tmp_path / "quickstart", wandb=CONFIG)


def test_weights_and_biases_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="not installed: run `pip install wandb`"):
        MetricsWriter(tmp_path, wandb=CONFIG)
