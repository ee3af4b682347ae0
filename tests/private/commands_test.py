"""`jax-entropy private …` from the command line: texts, tables, files, and what is refused in a sentence."""

import io
import json
import signal

import pytest

from jax_entropy.commands.main import main
from jax_entropy.commands.private_flags import Streamed
from jax_entropy.data.tokenizer import load_tokenizer
from tests.private.helpers import start

pytestmark = pytest.mark.usefixtures("installed")
SMALL = ("--num_layers=1", "--num_heads=2", "--model_dim=16", "--vocab_size=32", "--context_length=8")


def test_generate_writes_what_the_plain_command_writes(workdir, tmp_path, capsys):
    assert main(["private", "generate", f"--workdir={workdir}", "--prompt=def f", "--tokens=6",
                 f"--json={tmp_path / 'account.json'}"]) == 0  # fmt: skip
    private, spent = capsys.readouterr()
    assert main(["generate", f"--workdir={workdir}", "--prompt=def f", "--tokens=6", "--temperature=0"]) == 0
    assert private == capsys.readouterr().out
    sampled = ["--prompt=def f", "--tokens=6", "--temperature=0.7", "--top_k=20", "--seed=3", f"--workdir={workdir}"]
    assert main(["private", "generate", *sampled]) == main(["generate", *sampled]) == 0
    sampled_privately, spent = capsys.readouterr()
    assert len(sampled_privately) % 2 == 0  # the same text twice
    assert sampled_privately[: len(sampled_privately) // 2] == sampled_privately[len(sampled_privately) // 2 :]
    assert sampled_privately != 2 * private
    assert "rounds" in spent and "semi2k" in spent
    account = json.loads((tmp_path / "account.json").read_text())
    assert [program["name"] for program in account["programs"]][:2] == ["open weights", "prefill 8"]
    assert all(program["bytes"][0] > 0 and program["rounds"] > 0 for program in account["programs"][1:])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_terminated_command_leaves_no_weights_behind(workdir, tmp_path, number):
    (tmp_path / "temporary").mkdir()
    before = signal.signal(number, signal.SIG_DFL)  # where the tests themselves run under nohup
    process = start(
        "generate", f"--workdir={workdir}", "--prompt=def f", "--tokens=20", cwd=tmp_path / "here",
        TMPDIR=str(tmp_path / "temporary"),
    )  # fmt: skip
    signal.signal(number, before)
    while "sharing" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(number)
    assert process.wait(timeout=20) == 128 + number
    assert not list((tmp_path / "temporary").glob("jax_entropy_private_*"))


def test_a_text_that_is_broken_off_ends_its_line_and_no_other_does(workdir):
    tokenizer, written = load_tokenizer(workdir / "tokenizer.json"), {}
    for calls in ((), ("token",), ("token", "end")):
        text = Streamed(tokenizer, "def ", file := io.StringIO())
        for call in calls:
            getattr(text, call)(*([5] if call == "token" else []))
        text.break_off()
        written[calls] = file.getvalue()
    assert written[()] == "" and written["token",] == written["token", "end"] and written["token",].count("\n") == 1


def test_profile_of_a_workdir(workdir, tmp_path, capsys):
    files = f"--json={tmp_path / 'profile.json'}", f"--picture={tmp_path / 'profile.png'}"
    assert main(["private", "profile", str(workdir), "--context_length=16", *files]) == 0
    table = capsys.readouterr().out
    assert "softmax" in table and "all, warm" in table and "peak memory" in table
    stored = json.loads((tmp_path / "profile.json").read_text())
    assert stored["total"]["warm"]["rounds"] == sum(entry["warm"]["rounds"] for entry in stored["entries"])
    assert (tmp_path / "profile.png").stat().st_size > 10_000
    assert json.loads((workdir / "private.json").read_text()) == stored
    assert (workdir / "figures" / "private.png").stat().st_size > 10_000  # both for the report


def test_predict_prices_a_table_that_is_given_away(tmp_path, capsys):
    sent = {}
    for embedding in ("shared", "public"):
        file = tmp_path / embedding
        assert main(["private", "predict", "SM+ScFuFFN", f"--embedding={embedding}", f"--json={file}"]) == 0
        assert f"{embedding} embedding" in capsys.readouterr().out
        sent[embedding] = [row["bytes"][0] for row in json.loads(file.read_text())["rows"]]
    assert all(public < shared for public, shared in zip(sent["public"], sent["shared"], strict=True))


@pytest.mark.long
def test_compare_and_its_ratios(tmp_path, capsys):
    assert main(["private", "compare", "SM+LN+R", "SM+ScFuFFN", *SMALL, f"--json={tmp_path / 'c.json'}"]) == 0
    table = capsys.readouterr().out
    assert table.count("SM+LN+R") == table.count("SM+ScFuFFN") == 2
    sent = [max(p["total"]["warm"]["bytes"]) for p in json.loads((tmp_path / "c.json").read_text())["profiles"]]
    assert sent[0] > sent[1] > sent[3] and sent[2] > sent[3]
    assert f"{sent[0] / sent[3]:.2f}×" in table


@pytest.mark.long
def test_the_ablation_has_a_row_for_each_rewrite(capsys):
    assert main(["private", "profile", "--architecture=SM", *SMALL, "--ablation"]) == 0
    table = capsys.readouterr().out
    rows = (
        "plain",
        "plain, indices",
        "plain + packed",
        "plain + denominator",
        "plain + temperature",
        "plain + merged",
        "plain + cached",
        "all",
        "all but heads",
        "all but tournament",
    )
    assert all(row in table for row in rows)
    assert not any(row in table for row in ("erfc", "one_dot", "shifts"))  # no GELU, and no token after the prompt


@pytest.mark.parametrize(("arguments", "message"), [
    (["profile"], "profile what? give --workdir, --config or --architecture"),
    (["profile", "--architecture=SM+LX"], "'LX' is not understood"),
    (["profile", "--architecture=SM", "--network=moon"], "network='moon' must be"),
    (["profile", "--architecture=SM", "--without=pack"], "--without='pack' is not a rewrite; did you mean 'packed'?"),
    (["profile", "--architecture=SM", "--protocol=semi3k"], "did you mean 'semi2k'?"),
    (["compare"], "compare what? give architectures"),
    (["predict"], "predict what? give architectures"),
    (["profile", "--architecture=SM", "--context_length=100000", "--num_layers=90"], "take fewer tokens, layers"),
    (["keys"], "--directory is missing"),
    (["serve", "--workdir=nowhere", "--protocol=aby3"], "--keys is missing"),
    (["assist", "--server=here"], "--server='here' must be HOST:PORT"),
    (["assist", "--server=192.0.2.1:9500", "--insecure_loopback"], "for 127.0.0.1 only"),
    (["keys", "--directory=keys", "--parties=4"], "--parties=4 must be 1, 2 or 3"),
    (["keys", "--directory=keys", "--parties=3", "--name=x"], "--name=x goes with one party"),
    (["serve", "--workdir=nowhere", "--listen=here"], "--listen='here' must be HOST:PORT"),
    (["profile", "--architecture=SM", "--memory=16"], "memory='16' must be like 16GB or 800MB"),
    (["profile", "--architecture=SM+LN+G", "--memory=10MB"], "or a table that is given away (embedding=public)"),
    (["compare", "SM", "--prices=aw"], "prices='aw' is not known; did you mean 'aws'?"),
    (["serve", "--workdir=nowhere", "--embedding=publi"], "--embedding='publi' is not known"),
    (["profit"], "did you mean 'profile'?"),
    ([], "private what? say one of setup, generate, profile"),
    (["profile", "--architecture=SM", "--network=1.2.3mbps,80ms"], "network='1.2.3mbps,80ms' must be"),
    (["profile", "--architecture=SM", "--ablation", "--context_length=0"], "context_length=0 must be a whole number"),
    (["profile", "--architecture=SM", "--json=/nowhere/x.json"], "--json=/nowhere/x.json: there is no folder /nowhere"),
    (["profile", "--architecture=SM", "--json=/tmp"], "--json=/tmp is a folder"),
    (["profile", "--architecture=SM", "--picture=x.bmp"], "--picture=x.bmp must end in .png or .svg or .pdf"),
    (["profile", "--architecture=SM", "--ablation", "--picture=x.png"], "goes without --picture"),
    (["profile", "--architecture=SM", "--ablation", "--without=packed"], "goes without --without"),
    (["profile", "--architecture=SM", "--ablation", "--embedding=public"], "goes without --embedding"),
    (["profile", "--architecture=SM", f"--json={'x' * 300}"], "a name of 300 bytes is too long"),
    (["profile", "--architecture=SM", "--workdir=x"], "--workdir and --architecture exclude each other"),
    (["profile", "--architecture=SM", "--vocab_size=800000000"], "GB of memory"),  # before there are any weights
    (["predict", "SM", "--layer_iterations=5,6"], "layer_iterations names 2 layers, and the model has 12"),
    (["predict", "SM", "--layer_iterations=a"], "--layer_iterations=a must be like 5,6,5"),
    (["predict", "SM", "--layer_iterations=5", "--exponent=pade"], "layer_iterations are of exponent=quadratic"),
    (["compare", "SM", "--without=packed"], "there is no flag --without"),
    (["generate", "--workdir=nowhere", "--reveal=tokn"], "--reveal='tokn' is not known; did you mean 'token'?"),
    (["generate", "--workdir=nowhere", "--reveal=token", "--top_k=3"], "--top_k=3 needs --reveal=logits"),
    (["generate", "--workdir=nowhere", "--seed=99999999999999999999"], "seed=99999999999999999999 must be a whole"),
    (["generate", "--workdir=nowhere", "--temperature=-1"], "temperature=-1.0 must not be negative"),
    (["keys", "--directory=/proc/none"], "/proc/none cannot be written"),
    (["keys", "--directory=keys", "--name=a/b"], "name='a/b' must be 1 to 64 letters"),
    (["keys", "--directory=keys", "--days=99999999"], "days=99999999 must lie between 1 and 36500"),
    (["serve", "--workdir=nowhere", "--listen=[::1]:9500"], "is an IPv6 address"),
    (["serve", "--workdir=nowhere", "--sessions=-1"], "--sessions=-1 must not be negative"),
    (["serve", "--workdir=nowhere", "--insecure_loopback", "--keys=x"], "goes without --keys and --peer"),
    (["ask"], "the prompt is empty; give --prompt"),
    (["ask", "--prompt=x", "--prompt_file=/nowhere"], "--prompt_file='/nowhere' cannot be read"),
    (["ask", "--prompt_file=/dev/null"], "the prompt is empty"),
    (["profile", "runs/x", "--num_layers=3"], "--num_layers goes with --architecture, not with --workdir"),
    (["profile", "--architecture=SM", "--config.seed=3"], "--config.seed goes with --config, not with --architecture"),
    (["ask", "--prompt=x", "--assistant=9700"], "--assistant='9700' must be HOST:PORT"),
    (["ask", "--prompt=x", "--server=no.invalid:9500", "--insecure_loopback"], "for 127.0.0.1 only"),
    (["ask", "--prompt=x", "--protocol=cheeta"], "did you mean 'cheetah'?"),
])  # fmt: skip
def test_mistakes_are_said_in_a_sentence(arguments, message, capsys):
    assert main(["private", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1
