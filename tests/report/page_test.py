"""What a page and its files carry: every number as it was logged, a verdict that holds, little enough to send."""

import base64
import csv
import importlib
import json
import struct
import threading
import urllib.request
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from jax_entropy.commands.main import main
from jax_entropy.data.tokenizer import train_tokenizer
from jax_entropy.errors import UserError
from jax_entropy.report import numbers, read_history, report
from jax_entropy.report.block import Block
from jax_entropy.report.numbers import write_csv
from jax_entropy.report.page import page
from jax_entropy.report.payload import read_sweep
from jax_entropy.report.verdict import verdict
from jax_entropy.report.watch import serve, watch
from jax_entropy.runs.reading import Reading
from jax_entropy.runs.workdir import Workdir
from tests.report.helpers import CAUSAL, write_run
from tests.tiny_model import run_config

watch_module = importlib.import_module("jax_entropy.report.watch")  # the package's name is the function


def unpacked(text):
    """The header of a block with its arrays in their places; what block.js does, done once more."""
    content = zlib.decompress(base64.b64decode(text))
    (length,) = struct.unpack_from("<I", content)
    planes = np.frombuffer(content, np.uint8, offset=4 + length)

    def place(node):
        if isinstance(node, dict) and "planes" in node:
            size = int(np.prod(node["shape"]))
            found = sum(
                planes[node["at"] + p * size : node["at"] + (p + 1) * size].astype(np.uint32) << 8 * p
                for p in range(node["planes"])
            )
            change = (found >> 1).astype(np.int64) ^ -(found & 1).astype(np.int64)
            bits = np.cumsum(change.reshape(node["shape"]), axis=0).astype(np.uint32) << node["drop"]
            return bits.view(np.float32)
        if isinstance(node, dict):
            return {name: place(child) for name, child in node.items()}
        return [place(child) for child in node] if isinstance(node, list) else node

    return place(json.loads(content[4 : 4 + length]))


def carried(text):
    return unpacked(text.partition('id="data">')[2].partition("</script>")[0])


def test_a_page_carries_every_number_that_was_logged(tmp_path):
    history = read_history(write_run(tmp_path / "run", L=4, N=3, nan_from=37))
    (run,) = carried(page([history]))["runs"]
    for kind in ("train", "evaluate"):
        logged = getattr(history, kind)
        assert run[kind].keys() == logged.keys()
        for name, array in logged.items():
            np.testing.assert_array_equal(run[kind][name], array.astype(np.float32), err_msg=name)


@pytest.mark.parametrize(
    "array", [np.zeros((0, 3)), np.float32([1, -1, np.inf, -np.inf, 3e38, -1e-30]), np.ones((2, 1, 2))]
)
@pytest.mark.parametrize("count", [10, 10**6])
def test_a_block_keeps_what_it_is_given(array, count):
    block = Block(count)
    place, exact = block.put(array), block.put(16777213 + np.arange(3), exact=True)
    found, steps = unpacked(block.text([place, exact]))
    np.testing.assert_allclose(found, array, rtol=0 if count == 10 else 1e-5)
    assert steps.tolist() == [16777213, 16777214, 16777215]


def noisy_run(folder, L, N, steps):
    """With noise in every number, as training has it."""
    history, rng = read_history(write_run(folder, L=L, N=N, steps=steps)), np.random.default_rng(0)
    for name in ("head_entropy", "threshold", "head_max_logit", "layer_entropy", "max_logit", "gradient_norm"):
        history.train[name] *= 1 + 0.02 * rng.standard_normal(history.train[name].shape)
    return history


@pytest.mark.parametrize("size, most", [((6, 4, 28), 0.5e6), ((12, 12, 2000), 4.5e6)])
def test_a_page_is_small(tmp_path, size, most):
    assert len(page([noisy_run(tmp_path / "run", *size)])) < most  # with text and samples another 0.5 MB at most


def told(tmp_path, **changes):
    """The verdict on a run of 2 × 4 heads whose last evaluation was changed."""
    workdir = write_run(tmp_path / "run", L=2, N=4, steps=10, **changes.pop("run", {}))
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    lines[-1]["head_entropy"] = [[0.5 * CAUSAL] * 4] * 2
    lines[-1] |= changes.get("evaluate", {})
    lines[-2] |= changes.get("train", {})
    (workdir / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return verdict(read_history(workdir))


HALF = 0.5 * CAUSAL
OVERLOADED = [[3.5, 3.5, HALF, HALF], [HALF, 3.5, HALF, HALF]]
COLLAPSED = [[HALF] * 4, [0.1, 0.2, HALF, HALF]]
PLAIN = dict(ereg=False, architecture="SM")
BELOW = "below ¼ of the causal maximum, 0.97 nats, on held-out text"
VERDICTS = [
    ("good", "None of 8 heads is overloaded or collapsed on held-out text.", "", {}),
    ("look", "3 of 8 heads are overloaded", "EReg(…)", dict(evaluate=dict(head_entropy=OVERLOADED), run=PLAIN)),
    ("look", f"2 of 8 heads are collapsed ({BELOW}), layer 1.", "_init", dict(evaluate=dict(head_entropy=COLLAPSED))),
    ("look", "The guard sent training back twice, at steps 120 and 300.", "", dict(run=dict(incidents=(120, 300)))),
    (
        "look",
        "The largest attention logit is 4,321, in layer 1.",
        "qk_clip=100",
        dict(train=dict(max_logit=[7, 4321.0])),
    ),
    ("look", "Held-out text was predicted best at step 250 and ", "--best", dict(evaluate=dict(validation_loss=9.5))),
    ("trouble", "Attention stopped being finite in layer 1, first at", "+LN", dict(train=dict(nan_count=[0, 12]))),
]


@pytest.mark.parametrize("level, seen, advice, changes", VERDICTS)
def test_the_verdict_says_what_is_and_what_to_try(tmp_path, level, seen, advice, changes):
    found = told(tmp_path, **changes)
    assert found.level == level and any(line.startswith(seen) for line in found.seen), found
    assert advice in " ".join(found.advice) and bool(advice) <= bool(found.advice)


def test_a_run_of_one_line_has_no_speed_and_warns_of_nothing(tmp_path):
    history = read_history(write_run(tmp_path / "run", L=2, N=2, steps=3))
    assert "speed, median" in page([history])
    history.train["tokens_per_second"][:] = np.nan
    with warnings.catch_warnings(action="error"):
        assert "speed, median" not in page([history])


def test_runs_that_differ_in_their_seed_only_are_one_group(tmp_path):
    workdirs = [write_run(tmp_path / name, L=2, N=2, steps=6, seed=i) for i, name in enumerate("abc")]
    for i, workdir in enumerate(workdirs):
        config = json.loads((workdir / "config.json").read_text()) | dict(
            seed=i, optimizer=dict(rate=0.1 if i < 2 else 0.2)
        )
        (workdir / "config.json").write_text(json.dumps(config))
    header = carried(page([read_history(workdir) for workdir in workdirs]))
    assert header["groups"] == [[0, 1], [2]]
    differences = {row["name"]: row["values"] for row in header["differences"]}
    assert differences["optimizer.rate"] == ["0.1", "0.1", "0.2"] and differences["seed"] == ["0", "1", "2"]
    assert "model.num_layers" not in differences and len(set(differences["validation loss [nats/token]"])) == 3


def whole_run(folder, architecture, **fields):
    """A run whose configuration says all of its model."""
    workdir = write_run(folder, L=2, N=2, steps=3, architecture=architecture)
    config = run_config(architecture, **{"model.vocab_size": 61, **fields})
    (workdir / "config.json").write_text(config.to_json())
    return workdir


def test_private_costs_are_compared_on_the_same_terms(tmp_path):
    a, b = (whole_run(tmp_path / name, "SM+LN+R") for name in "ab")

    def compared(of_a, of_b):
        for workdir, changes in ((a, of_a), (b, of_b)):
            total = dict(warm=dict(bytes=[1e6 * len(workdir.name), 2.5e6], rounds=798))
            measured = dict(setting=dict(protocol="semi2k"), num_tokens=16, total=total) | (changes or {})
            (workdir / "private.json").unlink(missing_ok=True)
            if changes is not None:
                (workdir / "private.json").write_text(json.dumps(measured))
        rows = carried(page([read_history(a), read_history(b)]))["differences"]
        return {row["name"]: row["values"] for row in rows if row["name"].startswith("private")}

    last = dict(logits="last", embedding="public", export="plain")
    on = "16 tokens, semi2k, logits of one token, plain export, public embedding"
    assert compared(last, last)[f"private forward pass [MB], {on}"] == ["2.5", "2.5"]
    for of_a, of_b in (({}, last), ({}, None), ({}, dict(num_tokens=8)), ({}, dict(setting=dict(protocol="aby3")))):
        found = compared(of_a, of_b)
        assert [*found] == [f"private forward pass [{unit}], 16 tokens, semi2k, predicted" for unit in ("MB", "rounds")]
        assert all(values[0] == values[1] not in ("2.5", "798", "–") for values in found.values())
    (b / "private.json").write_text(
        json.dumps(
            dict(setting=dict(protocol="semi2k"), num_tokens=16, total=dict(warm=dict(bytes=[1], rounds=2)), **last)
        )
    )
    assert f"2 rounds, {on}</small>" in page([read_history(b)])


@pytest.mark.parametrize(("name", "visible"), [
    ("SM", [([0, 1], [1, 2, 3, 4, 5, 6])]), ("SM+Mem3", [([0, 1], [4, 5, 6, 7, 8, 9])]),
    ("SM+Mem3+Win(SL,4)", [([0], [4, 5, 6, 7, 7, 7]), ([1], [4, 5, 6, 7, 8, 9])]),
])  # fmt: skip
def test_the_most_at_a_position_is_of_what_its_row_sees(tmp_path, name, visible):
    workdir = whole_run(tmp_path / "run", name)
    tokenizer = train_tokenizer(["def f(x):"], 300)
    tokenizer.save(workdir / "tokenizer.json")
    tokens, rng = np.arange(7)[None], np.random.default_rng(0)
    Reading(tokens, rng.random((1, 6)), rng.random((2, 2, 1, 6)), step=150).save(Workdir(workdir).text, 150)
    (run,) = carried(page([read_history(workdir)]))["runs"]
    assert [most["layers"] for most in run["text"]["most"]] == [layers for layers, _ in visible]
    for most, (_, keys) in zip(run["text"]["most"], visible, strict=True):
        np.testing.assert_allclose(most["values"], np.log(keys), rtol=1e-6)


def test_numbers_come_as_json_and_as_csv(tmp_path):
    workdir = write_run(tmp_path / "run", L=2, N=3, steps=5, nan_from=4)
    history = read_history(workdir)
    (found,) = numbers([history])
    assert found["train"] is history.train and found["verdict"].level == "trouble"
    written = report(workdir, csv_file=tmp_path / "all.csv", figures="svg", page_file=tmp_path / "a.html")
    assert written["loss"].read_text().startswith("<?xml") and written["page"] == tmp_path / "a.html"
    lines = list(csv.DictReader(written["csv"].read_text().splitlines()))
    entropies = [line for line in lines if line["metric"] == "head_entropy" and line["kind"] == "train"]
    assert len(entropies) == 5 * 2 * 3
    (one,) = [line for line in entropies if (line["step"], line["layer"], line["head"]) == ("150", "1", "2")]
    assert float(one["value"]) == pytest.approx(history.train["head_entropy"][2, 1, 2], rel=1e-6)
    assert [line["value"] for line in entropies if line["step"] == "250" and line["layer"] == "1"] == [""] * 3
    with pytest.raises(UserError, match="figures='jpg' is not known; did you mean 'p"):
        report(workdir, figures="jpg")
    for name in ("page_file", "csv_file", "sweep"):
        with pytest.raises(UserError, match=f"{name}='' is empty"):
            report(workdir, **{name: ""})


def test_quarters_are_no_layers_where_there_are_as_many_of_them(tmp_path):
    write_csv(tmp_path / "new" / "all.csv", [read_history(write_run(tmp_path / "run", L=4, N=2, steps=1))])
    lines = list(csv.DictReader((tmp_path / "new" / "all.csv").read_text().splitlines()))
    bands = [line for line in lines if line["metric"].startswith("bands_observed")]
    assert [(line["metric"], line["layer"]) for line in bands] == [(f"bands_observed/{i}", "") for i in range(4)]
    assert [line["layer"] for line in lines if line["metric"] == "max_logit"] == list("0123")


def test_the_frontier_of_a_sweep_is_on_the_page(tmp_path):
    workdir = write_run(tmp_path / "run", L=2, N=2, steps=3)
    cost = dict(semi2k=dict(bytes=2e6, rounds=7, seconds=1.5))
    rows = [dict(label="SM\x1b", perplexity=30.5, spread=None, private=cost), dict(label="X", perplexity=9, private={})]
    rows.append(dict(label="diverged", perplexity=None, spread=None, private=cost))
    (tmp_path / "table.json").write_text(json.dumps(dict(rows=rows)))
    sweep = carried(page([read_history(workdir)], sweep=read_sweep(tmp_path)))["sweep"]
    assert sweep["protocol"] == "semi2k" and sweep["points"] == [
        dict(label="SM\ufffd", perplexity=30.5, spread=None, bytes=2e6, rounds=7, seconds=1.5)
    ]
    (tmp_path / "table.json").write_text('{"rows": [7]}')
    for folder, words in ((tmp_path, "is damaged"), (workdir, "cannot be read: No such file")):
        with pytest.raises(UserError, match=words):
            report(workdir, sweep=folder)


def test_the_command_takes_folders_as_words(tmp_path, capsys):
    runs = [str(write_run(tmp_path / name, L=2, N=2, steps=3, seed=i)) for i, name in enumerate("ab")]
    assert main(["report", *runs, f"--page={tmp_path}/all.html", "--json=-"]) == 0
    said = capsys.readouterr()
    assert [run["name"] for run in json.loads(said.out)] == ["a", "b"] and "all.html" in said.err
    assert len(carried((tmp_path / "all.html").read_text())["runs"]) == 2
    for arguments, words in (
        (["report", runs[0], "--figures=gif"], "--figures='gif' is not known"),
        (["report", runs[0], str(tmp_path / "c")], "c' is not there"),
        (["watch", runs[0], "--port=http"], "--port=http must be a whole number"),
        (["watch", runs[0], "--port=70000"], "port=70000 must be between 1 and 65535"),
    ):
        assert main(arguments) == 2 and words in capsys.readouterr().err


# Following a run


def test_watch_refuses_what_cannot_be_followed(tmp_path):
    workdir = write_run(tmp_path / "run", L=2, N=2, steps=3)
    with pytest.raises(UserError, match="holds no run yet"):
        watch(tmp_path / "nothing")
    for port in (-1, 65536):
        with pytest.raises(UserError, match=f"port={port} must be between 1 and 65535"):
            watch(workdir, port=port)
    with serve(workdir, 0) as server, pytest.raises(UserError, match=f"port={server.server_port} is in use"):
        watch(workdir, port=server.server_port)


def test_watch_ends_when_it_is_interrupted(tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(watch_module.http.server.ThreadingHTTPServer, "serve_forever", interrupted)
    said = []
    watch(write_run(tmp_path / "run", L=2, N=2, steps=3), notify=said.append, port=0)
    assert said[0].startswith("http://127.0.0.1:") and "Ctrl-C ends it" in said[0]


def test_browsers_that_ask_together_get_one_page(tmp_path, monkeypatch):
    pages, both, made = (
        watch_module._Pages(Workdir(write_run(tmp_path / "run", L=2, N=2, steps=3))),
        threading.Event(),
        [],
    )

    def slow(histories, follow):
        made.append(histories)
        both.wait(0.3)
        return f"page {len(made)}"

    monkeypatch.setattr(watch_module, "page", slow)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: pages.newest(), range(2))
    assert first == second and len(made) == 1


def test_a_browser_that_goes_away_is_no_fault(tmp_path, capsys):
    with serve(write_run(tmp_path / "run", L=2, N=2, steps=3), 0) as server:
        for error, is_told in ((BrokenPipeError, False), (ConnectionResetError, False), (KeyError, True)):
            try:
                raise error
            except error:
                server.handle_error(None, ("127.0.0.1", 1))
            assert bool(capsys.readouterr().err) == is_told


def test_the_server_answers_this_machine_only_and_says_what_is_new(tmp_path):
    Workdir(tmp_path).write_status("starting", 0, 10)
    with serve(tmp_path, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"

        def ask(path="/", **headers):
            request = urllib.request.Request(
                address + path, headers={k.replace("_", "-"): v for k, v in headers.items()}
            )
            try:
                with urllib.request.urlopen(request) as answer:
                    return answer.status, answer.headers["ETag"], answer.read().decode()
            except urllib.error.HTTPError as error:
                return error.code, error.headers["ETag"], ""

        status, tag, text = ask()
        assert status == 200 and "has no config.json" in text and "connect-src 'self'" in text
        assert ask(If_None_Match=tag)[0] == 304
        assert ask("/etc/passwd")[0] == 404 and ask(Host="evil.example:80")[0] == 403
        assert ask(Host="127.0.0.1")[0] == 200 and ask(Host="evil.example")[0] == ask(Host="")[0] == 403
        made = write_run(tmp_path / "made", L=2, N=2, steps=3)
        for name in ("config.json", "metrics.jsonl"):
            (made / name).rename(tmp_path / name)
        status, new, text = ask(If_None_Match=tag)
        assert status == 200 and new != tag and carried(text)["runs"][0]["layers"] == 2
        assert "The run died at step 0 of 10, or trains on another machine." in text  # nobody holds its lock
        with Workdir(tmp_path)._locked():
            Workdir(tmp_path).write_status("training", 150, 200)
            assert "The run has reached step 150 of 200." in ask(If_None_Match=new)[2]
        assert "The run died at step 150 of 200" in ask()[2]
        server.shutdown()
