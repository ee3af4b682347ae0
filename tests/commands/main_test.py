"""The command line: what a user may get wrong ends in one sentence on stderr, exit code 2, before any compile."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jax_entropy.commands.main import COMMANDS, FAMILIES, family, main
from jax_entropy.commands.runs import read_prompt
from jax_entropy.errors import UserError
from jax_entropy.training.train import train
from tests import REPOSITORY
from tests.damage import flip, sentence
from tests.tiny_config import get_config

TINY = f"{REPOSITORY}/tests/tiny_config.py"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished tiny run, and the folder of its corpus."""
    corpora, workdir = tmp_path_factory.mktemp("corpora"), tmp_path_factory.mktemp("run") / "run"
    config = get_config()
    config.data.directory = str(corpora)
    config.update_from_flattened_dict({"train.num_steps": 8, "train.checkpoint_every": 4, "train.keep": 2})
    train(config, str(workdir), notify=lambda line: None)
    return workdir, corpora


@pytest.fixture
def copy(run, tmp_path):
    return Path(shutil.copytree(run[0], tmp_path / "copy"))


BAD_TRAINING = {
    "unknown config file": (["--config=nowhere.py"], ["nowhere.py"]),
    "config that is no Python": ([f"--config={REPOSITORY}/README.md"], ["README.md"]),
    "no config": ([], ["--config is missing"]),
    "unknown architecture": ([f"--config={TINY}:SM+GELU"], ["GELU"]),
    "too many blocks without FFN": ([f"--config={TINY}:SM+ScFuFFN^9"], ["^9", "^2"]),
    "unknown field": ([f"--config={TINY}", "--config.train.num_step=3"], ["num_step", "num_steps"]),
    "unknown section": ([f"--config={TINY}", "--config.trian.num_steps=3"], ["trian", "train"]),
    "unknown flag": ([f"--config={TINY}", "--wordkir=x"], ["wordkir", "workdir"]),
    "stray argument": ([f"--config={TINY}", "now"], ["'now'"]),
    "no steps": ([f"--config={TINY}", "--config.train.num_steps=0"], ["num_steps=0"]),
    "warm-up as long as the run": ([f"--config={TINY}", "--config.optimizer.warmup=24.0"], ["warmup=24.0"]),
    "unknown implementation": ([f"--config={TINY}", "--config.model.attention=flash"], ["flash", "dense"]),
    "implementation that is not here": ([f"--config={TINY}", "--config.model.attention=gpu"], ["gpu", "blockwise"]),
    "mesh that does not divide the devices": ([f"--config={TINY}", "--config.mesh.fsdp=3"], ["8 devices"]),
    "mesh that does not divide heads": ([f"--config={TINY}", "--config.mesh.tensor=8"], ["num_heads=2", "tensor=8"]),
    "mesh that does not divide the batch": ([f"--config={TINY}", "--config.train.batch_size=9"], ["batch_size=9", "8"]),
    "vocabulary that is not the tokenizer's": ([f"--config={TINY}", "--config.model.vocab_size=99"], ["99", "512"]),
    "context longer than any document": (
        [f"--config={TINY}", "--config.model.context_length=1000000"], ["context_length", "1000000"]
    ),
    "no such corpus": ([f"--config={TINY}", "--config.data.files=/nowhere/at/all"], ["/nowhere/at/all"]),
    "no such tokenizer": ([f"--config={TINY}", "--config.data.tokenizer=/nowhere.json"], ["/nowhere.json"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_TRAINING)
def test_bad_training_lines(case, run, tmp_path, capsys):
    arguments, named = BAD_TRAINING[case]
    if arguments and "tiny" in arguments[0]:
        arguments = [arguments[0], f"--config.data.directory={run[1]}", *arguments[1:]]
    said = sentence(capsys, "train", f"--workdir={tmp_path}/new", *arguments)
    for word in named:
        assert word in said, said


def test_bad_corpora(tmp_path, capsys):
    def said(files):
        return sentence(
            capsys, "train", f"--config={TINY}", f"--workdir={tmp_path}/new",
            f"--config.data.directory={tmp_path}/data", f"--config.data.files={files}",
        )  # fmt: skip

    empty, binary = tmp_path / "empty", tmp_path / "binary"
    empty.mkdir(), binary.mkdir()
    assert str(empty) in said(empty)
    (binary / "a.py").write_bytes(bytes(range(256)) * 100)
    assert str(binary) in said(binary)
    damaged = tmp_path / "tokenizer.json"
    damaged.write_text("{")
    assert str(damaged) in sentence(
        capsys, "train", f"--config={TINY}", f"--workdir={tmp_path}/new", f"--config.data.tokenizer={damaged}"
    )


def test_bad_workdirs(run, copy, tmp_path, capsys):
    assert "run" in sentence(capsys, "evaluate", f"--workdir={tmp_path}/nothing")
    assert "seed is 1337 there and 5 here" in sentence(capsys, "train", f"--workdir={copy}", "--config.seed=5")
    assert "batch_size=0 must be at least 1" in sentence(capsys, "evaluate", str(copy), "--batch_size=0")
    file = tmp_path / "file"
    file.write_text("")
    assert str(file) in sentence(capsys, "train", f"--config={TINY}", f"--workdir={file}/run")
    (copy / "config.json").write_text("{}")
    assert "damaged" in sentence(capsys, "generate", f"--workdir={copy}", "--prompt=x")


def largest(step: Path) -> Path:
    return max((p for p in step.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def test_a_damaged_checkpoint_is_named_and_the_older_good_one_used(run, copy, capsys):
    flip(largest(copy / "checkpoints" / "8"))
    assert main(["generate", f"--workdir={copy}", "--prompt=def ", "--tokens=4"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("def ")
    assert "of step 8" in captured.err and "of step 4 is used instead" in captured.err
    flip(largest(copy / "checkpoints" / "4"))
    assert "checkpoint" in sentence(capsys, "generate", f"--workdir={copy}", "--prompt=def ", "--tokens=4")
    shutil.rmtree(copy / "checkpoints")
    assert "checkpoint" in sentence(capsys, "generate", f"--workdir={copy}", "--prompt=def ", "--tokens=4")


def test_bad_prompts(run, tmp_path, capsys):
    generate = "generate", f"--workdir={run[0]}"
    assert "empty" in sentence(capsys, *generate)
    assert "context of 32" in sentence(capsys, *generate, "--prompt=" + "word " * 100, "--tokens=1")
    assert "at most num_tokens=31" in sentence(capsys, *generate, "--prompt=a", "--tokens=99")
    assert "temperature=-1.0" in sentence(capsys, *generate, "--prompt=a", "--temperature=-1", "--tokens=2")
    assert "/nowhere" in sentence(capsys, *generate, "--prompt_file=/nowhere")
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe")
    assert str(binary) in sentence(capsys, *generate, f"--prompt_file={binary}")


def test_a_prompt_is_the_bytes_that_were_given(tmp_path):
    file = tmp_path / "prompt"
    file.write_bytes("def é():\r\n\tx\r".encode())
    assert read_prompt("", file) == "def é():\r\n\tx\r"
    assert read_prompt("é", None) == "é"
    assert read_prompt("é".encode().decode("ascii", "surrogateescape"), None) == "é"  # an argument under LC_ALL=C
    with pytest.raises(UserError, match="--prompt is not UTF-8"):
        read_prompt("\udcff", None)
    with pytest.raises(UserError, match="--prompt and --prompt_file exclude each other"):
        read_prompt("x", file)


def test_generation_is_a_function_of_its_seed(run, capsys):
    def text(*arguments):
        assert main(["generate", f"--workdir={run[0]}", "--tokens=8", "--prompt=def ", *arguments]) == 0
        return capsys.readouterr().out

    assert text("--seed=3") == text("--seed=3") != text("--seed=4")
    assert text("--temperature=0", "--seed=1") == text("--temperature=0", "--seed=2") == text("--top_k=1")


def test_prompts_come_from_stdin_too(run):
    done = subprocess.run(
        [sys.executable, "-m", "jax_entropy", "generate", f"--workdir={run[0]}", "--prompt_file=-", "--tokens=4"],
        input="import ", capture_output=True, text=True, cwd=REPOSITORY, env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.startswith("import ")


def test_the_batch_size_of_evaluation_does_not_change_the_number(run, capsys):
    outputs = []
    for batch_size in (1, 7, 32):
        assert main(["evaluate", f"--workdir={run[0]}", f"--batch_size={batch_size}"]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] == outputs[2] and "perplexity" in outputs[0] and "bits per byte" in outputs[0]


def test_report_rewrites_the_figures(copy, capsys):
    assert not (copy / "figures").exists()
    assert main(["report", f"--workdir={copy}"]) == 0
    assert list((copy / "figures").glob("*.png"))
    (copy / "metrics.jsonl").unlink()
    assert "metrics" in sentence(capsys, "report", f"--workdir={copy}")


def test_help_names_every_command_and_flag(capsys):
    assert main([]) == main(["--help"]) == 0
    listing = capsys.readouterr().out
    assert all(command in listing for command in (*COMMANDS, *FAMILIES))
    for called in [*([name] for name in COMMANDS), *([name, word] for name in FAMILIES for word in family(name))]:
        assert main([*called, "--help"]) == 0
        said = capsys.readouterr().out
        assert f"jax-entropy {' '.join(called)}" in said and "--" in said and "examples:" in said
    assert "generate" in sentence(capsys, "genrate")


def test_config_json_holds_the_resolved_config(run):
    stored = json.loads((run[0] / "config.json").read_text())
    assert stored["architecture"] == "EReg(SM(t)+ScFuFFN)" and stored["train"]["num_steps"] == 8


def test_what_needs_no_jax_does_not_wait_for_it():
    program = """
import sys
from jax_entropy.commands.main import main
assert main(["--help"]) == main(["--version"]) == main(["train", "--help"]) == main(["private", "--help"]) == 0
assert main(["status", "nowhere"]) == 2
slow = {"jax", "rich", "matplotlib", "tensorboardX", "orbax", "grain", "tensorflow_datasets"}
assert not slow & set(sys.modules)
import jax_entropy as je
je.ModelConfig, je.architecture
assert "jax" not in sys.modules
print("to the end")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("to the end\n"), done.stderr
