"""The supervisor, with real processes: what it restarts, what it leaves, and what it passes on."""

import itertools
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from jax_entropy import supervise
from jax_entropy.supervise import Supervisor

SUPERVISE = [sys.executable, "-I", supervise.__file__]
# Counts its starts in a file, then does what the next argument says; the last one is repeated.
COMMAND = """
    import os, signal, sys, time
    path, *acts = sys.argv[1:]
    with open(path, "a") as file:
        file.write(f"{os.getpid()} {time.monotonic()}\\n")
    started = len(open(path).readlines())
    act = acts[min(started, len(acts)) - 1]
    if act == "wait":
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: sys.exit(0))
        print("ready", flush=True)
        time.sleep(60)
    if act == "child":
        child = os.fork()
        if not child:
            time.sleep(60)
        open(path + ".child", "w").write(str(child))
        sys.exit(3)
    if act.startswith("signal"):
        os.kill(os.getpid(), int(act[6:]))
        time.sleep(60)
    sys.exit(int(act))
"""


@pytest.fixture
def supervised(tmp_path):
    def command(*acts, restart=5, backoff=0.05):
        (tmp_path / "command.py").write_text(textwrap.dedent(COMMAND))
        options = [f"--restart={restart}", f"--backoff={backoff}"]
        return [*SUPERVISE, *options, "--", sys.executable, tmp_path / "command.py", tmp_path / "starts", *acts]

    return command


def starts(tmp_path):
    """(process, time) of every start."""
    return [(int(pid), float(at)) for pid, at in map(str.split, (tmp_path / "starts").read_text().splitlines())]


def gone(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{process}/stat").read_text().split(")")[1].split()[0] == "Z"


@pytest.mark.parametrize(
    ("acts", "code", "count"),
    [
        (["0"], 0, 1),
        (["2"], 2, 1),  # the user's mistake does not go away by trying again
        (["1", "0"], 0, 2),
        (["134", "255", "0"], 0, 3),  # a shell's and a launcher's code for SIGABRT, and ssh's for a lost connection
        ([f"signal{signal.SIGKILL:d}", "0"], 0, 2),
        ([f"signal{signal.SIGABRT:d}", f"signal{signal.SIGSEGV:d}", "2"], 2, 3),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_what_dies_is_started_again_until_it_ends_well(tmp_path, supervised, acts, code, count):
    done = subprocess.run(supervised(*acts), capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert len(starts(tmp_path)) == count and done.stderr.count("restart ") == count - 1
    for act in acts[: count - 1]:
        killed = int(act[6:]) if act.startswith("signal") else int(act) - 128
        how = f"killed by {signal.Signals(killed).name}" if 0 < killed < 65 else f"ended with code {act}"
        assert how in done.stderr


@pytest.mark.parametrize(("act", "code"), [("7", 7), (f"signal{signal.SIGKILL:d}", 128 + signal.SIGKILL)])
def test_there_is_a_limit_and_the_pauses_double(tmp_path, supervised, act, code):
    done = subprocess.run(supervised(act, restart=3, backoff=0.2), capture_output=True, text=True, timeout=60)
    assert done.returncode == code
    times = [at for _, at in starts(tmp_path)]
    assert len(times) == 4 and "4 times in a row; no more restarts" in done.stderr
    for i, (one, other) in enumerate(itertools.pairwise(times)):
        assert other - one >= 0.2 * 2**i
    assert [line.split(" in ")[1] for line in done.stderr.splitlines()[:3]] == ["0.2 s", "0.4 s", "0.8 s"]


def test_no_restarts_is_a_number_too(tmp_path, supervised):
    assert subprocess.run(supervised("1", restart=0), capture_output=True, timeout=60).returncode == 1
    assert len(starts(tmp_path)) == 1


def test_an_attempt_that_lasted_makes_the_count_start_anew(tmp_path, supervised, monkeypatch, capsys):
    monkeypatch.setattr(supervise, "HEALTHY", 0.0)
    command = supervised(*["1"] * 6, "0")
    assert Supervisor(command[command.index("--") + 1 :], restart=1, backoff=0.01).run() == 0
    assert capsys.readouterr().err.count("restart 1 of 1") == 6


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_signals_are_passed_on_and_nothing_is_restarted(tmp_path, supervised, number):
    process = subprocess.Popen(
        supervised("1", "wait"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0 and len(starts(tmp_path)) == 2 and errors.count("restart ") == 1


def test_a_signal_during_a_pause_ends_it(tmp_path, supervised):
    process = subprocess.Popen(supervised("5", backoff=60), stderr=subprocess.PIPE, text=True)
    assert "restart 1" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == 5 and len(starts(tmp_path)) == 1


def test_a_signal_is_passed_on_once(tmp_path):
    """A run obeys a second one at once, without saving."""
    script = (
        "import signal, time; n = []; signal.signal(signal.SIGTERM, lambda *_: n.append(1)); print('ready', flush=True)"
    )
    script += "; end = time.monotonic() + 1\nwhile time.monotonic() < end: time.sleep(0.05)\nprint(len(n))"
    process = subprocess.Popen([*SUPERVISE, "--", sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30)[0] == "1\n"


def test_nothing_of_a_dead_attempt_stays_behind(tmp_path, supervised):
    done = subprocess.run(supervised("child", "0"), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    child = int((tmp_path / "starts.child").read_text())
    deadline = time.monotonic() + 10
    while not gone(child):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "the command is missing"),
        (["--"], "the command is missing"),
        (["--restart=many", "--", "true"], "--restart: 'many' is no whole number of at least 0"),
        (["--restart=-1", "--", "true"], "--restart: '-1' is no whole number of at least 0"),
        (["--backoff=nan", "--", "true"], "--backoff: 'nan' is no number of at least 0"),
        (["--retries=2", "--", "true"], "unrecognized arguments: --retries=2"),
        (["true"], "unrecognized arguments: true"),
        (["--", "/no/such/program"], "/no/such/program cannot be started"),
    ],
)
def test_a_mistake_is_answered_in_one_sentence(arguments, reason):
    refused = subprocess.run([*SUPERVISE, *arguments], capture_output=True, text=True, timeout=60)
    assert refused.returncode == 2 and reason in refused.stderr and refused.stderr.count("\n") == 1


def test_it_runs_as_a_module_too():
    done = subprocess.run([sys.executable, "-m", "jax_entropy.supervise", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("usage: python -m jax_entropy.supervise")
