"""Output on any terminal, pipe or disk: spelled out, shown and not obeyed, and never a traceback."""

import codecs
import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from jax_entropy import __main__
from jax_entropy.commands import console
from jax_entropy.commands.main import main


def run(arguments, **options):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", **options.pop("env", {})}
    command = f"{sys.executable} -m jax_entropy {arguments}"
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment, **options)


def test_a_stream_without_our_letters_has_them_spelled_out():
    done = run("census --help", env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and done.stdout.isascii()
    assert done.stdout.startswith("jax-entropy census - FLOPs, ") and "--architecture=..., or" in done.stdout
    done = run("status 'a×b\udcff'", env={"PYTHONIOENCODING": "ascii", "LC_ALL": "C"})
    assert done.returncode == 2 and done.stderr.isascii() and "axb" in done.stderr and "Traceback" not in done.stderr


def test_the_rule_between_samples_is_spelled_out_too(monkeypatch):
    codecs.register_error("jax_entropy", console._spelled)
    out = io.TextIOWrapper(io.BytesIO(), "ascii", "jax_entropy")
    monkeypatch.setattr(sys, "stdout", out)
    made = console.console()
    made.rule("sample 1")
    made.rule()
    out.flush()
    assert set(out.buffer.getvalue().decode()) <= set("- sample 1\n")


@pytest.mark.parametrize("redirection", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
def test_a_closed_stream_is_the_null_device(redirection):
    done = run(f"status nowhere {redirection}")
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_a_full_disk_is_a_sentence():
    done = run("--help >/dev/full")
    assert done.returncode == 1
    assert done.stderr == "jax-entropy: the output cannot be written: No space left on device\n"
    done = run("status nowhere 2>/dev/full")
    assert done.returncode == 2 and not done.stderr


def test_a_reader_that_has_enough_ends_a_command_quietly():
    done = run("--help | true; exit ${PIPESTATUS[0]}")
    assert done.returncode in (0, 1) and not done.stderr


def test_a_run_outlives_the_reader_of_its_output():
    reader, writer = os.pipe()
    os.close(reader)
    with pytest.raises(BrokenPipeError):
        console._Output(writer, outlives_reader=False).write(b"a line")
    output = console._Output(writer, outlives_reader=True)
    assert output.write(b"a line") == 6 and isinstance(output.failure, BrokenPipeError)
    os.close(writer)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_escape_sequences_are_shown_on_a_terminal_and_kept_in_a_file(monkeypatch):
    text = "\x1b[31mred\x07\r\x9b2J\u202eabc\nnext\tline ×"
    terminal, file = Terminal(), io.StringIO()
    console.say(text, terminal)
    console.say(text, file)
    assert terminal.getvalue() == "\\x1b[31mred\\x07\\r\\x9b2J\\u202eabc\nnext\tline ×\n"
    assert file.getvalue() == text + "\n"
    monkeypatch.setattr(sys, "stderr", terminal)
    console.warn("\x1b]0;title")
    assert terminal.getvalue().endswith("\\x1b]0;title\n")


def test_tables_and_lines_of_a_console_show_them_too(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    made = console.console()
    made.print("[bold]\x1b[31m", "[/nonsense]")
    made.print(console.table(["name", "value"], [("a\x1b[2Jb", 1.5), ("[red]", 22)]))
    assert "\x1b" not in out.getvalue()
    assert [line.rstrip() for line in out.getvalue().splitlines()] == [
        "[bold]\\x1b[31m [/nonsense]", "name       value", "a\\x1b[2Jb    1.5", "[red]         22",
    ]  # fmt: skip


def test_the_names_in_an_error_are_one_line(capsys):
    assert main(["status", "a\nb\x1b[31m"]) == 2
    assert (
        capsys.readouterr().err == "jax-entropy: no run was started in a\\nb\\x1b[31m: it has no readable status.json\n"
    )


def test_json_goes_to_a_file_or_alone_to_standard_output(tmp_path, capsys):
    size = ["census", "--architecture=SM+LN+G", "--num_layers=2", "--num_heads=2", "--model_dim=8", "--vocab_size=9"]
    assert main([*size, f"--json={tmp_path / 'c.json'}"]) == 0
    table = capsys.readouterr().out
    assert main([*size, "--json=-"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == json.loads((tmp_path / "c.json").read_text())
    assert captured.err == table
    counted = json.loads(captured.out)
    assert counted["private"]["plain"]["rounds"] > counted["private"]["optimised"]["rounds"] > 0
    assert counted["config"]["num_layers"] == 2 and counted["operations"][0]["name"] == "softmax"


@pytest.mark.parametrize(
    ("name", "message"),
    [("/nowhere/x.json", "there is no folder /nowhere"), ("/", "is a folder"), ("x" * 300, "is too long")],
)
def test_a_file_that_cannot_be_written_is_named_before_anything_is_counted(name, message, capsys):
    assert main(["census", "--architecture=SM", f"--json={name}"]) == 2
    assert message in capsys.readouterr().err


def test_debug_shows_where_a_mistake_was_found(tmp_path, capsys):
    (tmp_path / "file.py").write_text("def get_config():\n    return nope\n")
    arguments = ["census", f"--config={tmp_path / 'file.py'}"]
    assert main(arguments) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert main([*arguments, "--debug"]) == 2
    said = capsys.readouterr().err
    assert "Traceback" in said and "NameError" in said and "return nope" in said
    assert said.splitlines()[-1].startswith("jax-entropy: the config file")


def test_ctrl_c_behind_an_import_error_is_no_bug(monkeypatch, capsys):
    def interrupted(values):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise ImportError("Encountered an error while initializing the extension") from error

    from jax_entropy.commands import main as module

    monkeypatch.setitem(module.COMMANDS, "status", module.COMMANDS["status"]._replace(run=interrupted))
    assert main(["status", "nowhere"]) == 1
    assert capsys.readouterr().err == "jax-entropy: interrupted; the same command starts again\n"
    monkeypatch.setitem(module.COMMANDS, "status", module.COMMANDS["status"]._replace(run=lambda values: 1 / 0))
    assert main(["status", "nowhere"]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_ctrl_c_waits_for_the_end_of_an_import_and_is_a_sentence(tmp_path, monkeypatch, capsys):
    # as extension modules do, this one loses what is raised while it is imported
    body = (
        "import signal\ntry:\n    signal.raise_signal(signal.SIGINT)\nexcept BaseException:\n    pass\nwhole = True\n"
    )
    (tmp_path / "slow_to_import.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)

    def run():
        import slow_to_import

        assert slow_to_import.whole
        time.sleep(10)

    monkeypatch.setattr("jax_entropy.commands.main.main", run)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGALRM)}
    try:
        assert __main__.main() == 1
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL  # the interpreter's last moments are cut in silence
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert capsys.readouterr().err == "jax-entropy: interrupted; the same command starts again\n"


@pytest.mark.parametrize("error", [
    MemoryError("Unable to allocate 119. GiB for an array"),
    RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8589934592 bytes.\nmore"),
])  # fmt: skip
def test_too_little_memory_is_a_sentence(error, monkeypatch, capsys):
    def starved(values):
        raise error

    from jax_entropy.commands import main as module

    monkeypatch.setitem(module.COMMANDS, "status", module.COMMANDS["status"]._replace(run=starved))
    assert main(["status", "nowhere"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(error).splitlines()[0] in said and "docs/troubleshooting.md" in said
