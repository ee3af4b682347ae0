"""Training as a whole: resumed runs, signals, failures, meshes and processes. Real processes where it matters."""

import os
import shutil
import signal
import subprocess

import jax
import numpy as np
import pytest

from jax_entropy.errors import UserError
from jax_entropy.optimizer import learning_rate_schedule
from jax_entropy.runs.checkpoint import Checkpointer
from jax_entropy.training import loop
from jax_entropy.training.train import train
from tests import REPOSITORY
from tests.run_helpers import assert_same_run, command, environment, lines, run, start


def test_the_first_line_of_the_readme_shows_what_it_promises(unbroken):
    workdir, output = unbroken
    for promise in (
        "step 24/24", "perplexity", "tokens/s", "entropy", "collapse", "overload", "left", "held out", "bits per byte",
        "Head entropy", "sample 3", str(workdir / "figures"), str(workdir / "metrics.jsonl"), "checkpoints",
    ):  # fmt: skip
        assert promise in output, promise
    assert {"config.json", "metrics.jsonl", "checkpoints", "figures", "tokenizer.json", "report.html"} <= {
        path.name for path in workdir.iterdir()
    }
    assert list(workdir.glob("events.out.tfevents.*")) and list((workdir / "figures").glob("*.png"))
    assert [line["step"] for line in lines(workdir)] == [1, 4, 8, 12, 16, 20, 24]
    assert lines(workdir)[-1]["loss"] < lines(workdir)[0]["loss"]


def test_a_complete_run_is_not_trained_again(unbroken, corpus_directory):
    workdir, _ = unbroken
    before = (workdir / "metrics.jsonl").read_bytes()
    again = run(workdir, corpus_directory)
    assert again.returncode == 0 and "complete" in again.stdout and "step 1/24" not in again.stdout
    assert (workdir / "metrics.jsonl").read_bytes() == before


def test_another_config_is_refused_in_one_sentence(unbroken, corpus_directory):
    workdir, _ = unbroken
    other = run(workdir, corpus_directory, "--config.optimizer.learning_rate=0.5")
    assert other.returncode == 2 and "optimizer.learning_rate" in other.stderr and "0.5" in other.stderr
    assert "Traceback" not in other.stderr and len(other.stderr.strip().splitlines()) == 1


def test_a_mesh_that_divides_no_parameter_is_found_before_anything_is_written(tiny, tmp_path):
    config = tiny("SM", **{"model.num_heads": 3, "model.model_dim": 33, "mesh.data": 4, "mesh.fsdp": 2})
    with pytest.raises(UserError, match="a dimension of 33 cannot be split in 2"):
        train(config, tmp_path / "run", lambda line: None)
    assert not (tmp_path / "run/config.json").exists()


@pytest.mark.slow
def test_killed_between_two_checkpoints_resumes_from_the_last(unbroken, tmp_path, corpus_directory, monkeypatch):
    reference, _ = unbroken
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")  # the same bits from programs compiled anew
    workdir = tmp_path / "run"
    process = start(workdir, corpus_directory)
    for line in process.stdout:
        if line.startswith("step 16/24"):
            process.kill()
            break
    process.wait()
    done = run(workdir, corpus_directory)
    assert done.returncode == 0, done.stderr
    assert "resumed at step" in done.stdout
    assert_same_run(workdir, reference)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_first_and_says_how_to_go_on(unbroken, tmp_path, corpus_directory, number):
    reference, _ = unbroken
    workdir = tmp_path / "run"
    process = subprocess.Popen(
        command(workdir, corpus_directory), env=environment(), cwd=REPOSITORY, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    seen = []
    for line in process.stdout:
        seen.append(line)
        if line.startswith("step 4/24"):
            process.send_signal(number)
    output = "".join(seen)
    assert process.wait() == 0, process.stderr.read()
    assert "stopped and saved at step" in output and "jax-entropy train" in output and str(workdir) in output
    assert not any(line["step"] == 24 for line in lines(workdir))
    assert run(workdir, corpus_directory).returncode == 0
    assert_same_run(workdir, reference)


def test_a_signal_breaks_an_evaluation_off_and_it_is_made_up_for(tiny, tmp_path, monkeypatch):
    """Between two steps, when it is made up for, and after the last step; the run is the one without signals."""
    config = tiny(**{"train.num_steps": 12, "train.evaluate_every": 6, "train.evaluate_chunks": 24})
    whole = train(config, str(tmp_path / "whole"), notify=lambda line: None)
    batches, broken_off = loop.data.validation_batches, iter([True, True, False, True, False])

    def signalled(*args, **kwargs):
        break_off = next(broken_off)
        for number, batch in enumerate(batches(*args, **kwargs)):
            assert not (break_off and number == 2), "the signal was not obeyed"
            if break_off and number == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(loop.data, "validation_batches", signalled)
    ends = [train(config, str(tmp_path / "run"), notify=lambda line: None) for _ in range(4)]
    assert [(end.start, end.step, end.complete) for end in ends] == [
        (0, 6, False), (6, 6, False), (6, 12, False), (12, 12, True),
    ]  # fmt: skip
    assert ends[-1].evaluation["validation_loss"] == whole.evaluation["validation_loss"]
    jax.tree.map(np.testing.assert_array_equal, ends[-1].variables, whole.variables)
    for kind, name in (("train", "loss"), ("evaluate", "validation_loss")):
        one, other = ([(line["step"], line[name]) for line in lines(tmp_path / w, kind)] for w in ("run", "whole"))
        assert one == other
    with Checkpointer(tmp_path / "run" / "checkpoints") as run, Checkpointer(tmp_path / "whole" / "checkpoints") as one:
        assert run.best_step() == one.best_step()


def test_a_signal_at_the_end_of_an_evaluation_loses_no_step(tiny, tmp_path, monkeypatch):
    """Too late to break it off, and no checkpoint is due."""
    config = tiny(**{"train.evaluate_every": 2, "train.checkpoint_every": 24, "train.evaluate_chunks": 8})
    batches, said = loop.data.validation_batches, []

    def signalled(*args, **kwargs):
        yield from batches(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop.data, "validation_batches", signalled)
    end = train(config, tmp_path / "run", said.append, profile=3)
    assert (end.step, end.complete, end.evaluation["step"]) == (2, False, 2)
    with Checkpointer(tmp_path / "run" / "checkpoints") as checkpointer:
        assert checkpointer.latest_step() == checkpointer.best_step() == 2
    assert said[-1] == "nothing was traced: it begins with step 10 from where training went on"


def test_a_complete_run_gets_a_longer_schedule(tiny, tmp_path):
    fields = {"train.log_every": 2, "train.evaluate_every": 4, "train.evaluate_chunks": 8}
    said, run = [], tmp_path / "run"
    short, long = tiny(**fields, **{"train.num_steps": 4}), tiny(**fields, **{"train.num_steps": 8})
    train(short, run, lambda line: None)
    assert train(long, run, said.append).start == 4
    rate = learning_rate_schedule(long.optimizer, 8)
    assert "going on with train.num_steps=8 (was 4)" in said
    (line,) = [line for line in said if "the run of 4 steps gets 8: from step 4 on" in line]
    assert line.endswith(f"that of the longer schedule, {float(rate(4)):.3g}")
    logged = {line["step"]: line["learning_rate"] for line in lines(run)}
    assert list(logged) == [1, 2, 4, 6, 8]
    assert logged[6] == pytest.approx(float(rate(5)), rel=1e-5)
    for fewer in (4, 6):
        with pytest.raises(UserError, match=f"train.num_steps is 8 there and {fewer} here"):
            train(tiny(**fields, **{"train.num_steps": fewer}), run, lambda line: None)
    shutil.rmtree(run / "checkpoints" / "8")
    with pytest.raises(UserError, match="train.num_steps is 8 there and 16 here"):  # it is not complete
        train(tiny(**fields, **{"train.num_steps": 16}), run, lambda line: None)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_devices(unbroken, tmp_path, corpus_directory):
    reference, _ = unbroken
    process = subprocess.Popen(
        command(tmp_path / "run", corpus_directory), env=environment() | {"JAX_NUM_CPU_DEVICES": "4"}, cwd=REPOSITORY,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("step 8/24"):
            process.send_signal(signal.SIGTERM)
    assert process.wait() == 0
    assert run(tmp_path / "run", corpus_directory).returncode == 0
    actual, expected = ([line["loss"] for line in lines(workdir)] for workdir in (tmp_path / "run", reference))
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


@pytest.mark.slow
def test_softmax_only_diverges_with_a_diagnosis(tiny, tmp_path):
    config = tiny("SM", **{"optimizer.learning_rate": 50.0, "optimizer.clip_norm": 0.0, "train.num_steps": 200})
    config.model.final_norm = "none"
    with pytest.raises(UserError) as caught:
        train(config, str(tmp_path / "run"), notify=lambda line: None)
    sentence = str(caught.value)
    assert "not finite at step" in sentence and "layer" in sentence and "mean entropies" in sentence
    assert "checkpoint" in sentence


@pytest.mark.slow
def test_accumulation_and_spectral_vectors_are_saved_and_restored(tiny, tmp_path):
    fields = {"optimizer.accumulate": 2, "train.num_steps": 12}
    whole = train(tiny("SM+SNorm(QKVO+FFN)", **fields), str(tmp_path / "whole"), notify=lambda line: None)

    class Stop(Exception):
        pass

    def stop(line):
        if line.startswith("step 8/12"):
            raise Stop

    with pytest.raises(Stop):
        train(tiny("SM+SNorm(QKVO+FFN)", **fields), str(tmp_path / "parts"), notify=stop)
    parts = train(tiny("SM+SNorm(QKVO+FFN)", **fields), str(tmp_path / "parts"), notify=lambda line: None)
    assert parts.start == 6
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(parts.variables), jax.device_get(whole.variables))


def test_steps_that_do_not_log_compute_no_statistics(tiny):
    """The plain step of a model without EReg returns none of the metrics, and jit prunes what made them."""
    import functools

    from jax_entropy.config import model_config
    from jax_entropy.model import Transformer
    from jax_entropy.state import init_state, make_train_step

    config = tiny("SM+LN+G")
    model = Transformer(model_config(config, 61))
    state = jax.eval_shape(functools.partial(init_state, config, model))
    tokens = jax.ShapeDtypeStruct((8, 33), np.int32)
    step = jax.jit(make_train_step(config, model), static_argnums=2)
    flops = {watch: step.lower(state, tokens, watch).compile().cost_analysis()["flops"] for watch in (False, True)}
    assert flops[False] < flops[True]
