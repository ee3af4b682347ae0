"""The launch scripts: what they print, what they refuse, and what they do to stand-ins for jax-entropy and gcloud."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[1] / "launch"
LOCAL, TPU_VM = LAUNCH / "local.sh", LAUNCH / "tpu_vm.sh"
FLAGS = ["--config=configs/quickstart.py:EReg(SM(t)+ScFuFFN)", "--workdir=runs/it's here"]
SLICE = ["--name=ereg", "--zone=us-west4-a"]


def run(script, *arguments, **kwargs):
    return subprocess.run(["bash", script, *arguments], capture_output=True, text=True, timeout=60, **kwargs)


def executable(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text).lstrip())
    path.chmod(0o755)


@pytest.fixture
def environment(tmp_path):
    """An environment whose PATH starts with tmp_path/bin."""
    (tmp_path / "bin").mkdir()
    return os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "TMPDIR": str(tmp_path)}


@pytest.mark.parametrize("script", [LOCAL, TPU_VM], ids=lambda path: path.name)
def test_scripts_are_clean(script):
    subprocess.run(["bash", "-n", script], check=True)
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    checked = subprocess.run(["shellcheck", script], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("script", [LOCAL, TPU_VM], ids=lambda path: path.name)
def test_help_is_printed(script):
    helped = run(script, "--help")
    assert helped.returncode == 0 and helped.stdout.startswith("usage: launch/") and not helped.stderr


@pytest.mark.parametrize(
    "script, arguments, reason",
    [
        (LOCAL, [], "the number of processes is missing"),
        (LOCAL, ["two"], "'two' processes"),
        (LOCAL, ["0", *FLAGS], "'0' processes"),
        (LOCAL, ["--config=x", "2"], "'--config=x' before the number of processes"),
        (LOCAL, ["--restart=often", "2"], "'--restart=often' must be a whole number"),
        (TPU_VM, SLICE, "the command is missing"),
        (TPU_VM, ["creat", *SLICE], "'creat' is not understood"),
        (TPU_VM, ["start", "fetch", *SLICE], "both 'start' and 'fetch'"),
        (TPU_VM, ["delete", "--name=ereg"], "--zone=ZONE"),
        (TPU_VM, ["create", *SLICE], "--type and --version"),
        (TPU_VM, ["start", *SLICE], "--workdir=FOLDER"),
        (TPU_VM, ["fetch", *SLICE, "--workdir=it's here"], "got 'it's here'"),
        (TPU_VM, ["start", *SLICE, "--workdir=runs/x", "--", *FLAGS], "--workdir belongs before the --"),
    ],
)
def test_a_mistake_is_answered_in_one_sentence(script, arguments, reason):
    refused = run(script, "--dry-run", *arguments)
    assert refused.returncode == 2 and not refused.stdout
    assert reason in refused.stderr and refused.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "script, arguments, missing",
    [(LOCAL, ["2", *FLAGS], "jax-entropy"), (TPU_VM, ["follow", *SLICE], "gcloud")],
    ids=["local.sh", "tpu_vm.sh"],
)
def test_a_missing_program_is_answered_in_one_sentence(tmp_path, script, arguments, missing):
    (tmp_path / "bin").mkdir()
    for name in ("bash", "cut", "dirname"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    refused = run(script, *arguments, env={"PATH": str(tmp_path / "bin")})
    assert refused.returncode == 2
    assert f"{missing} is not on the PATH" in refused.stderr and refused.stderr.count("\n") == 1


def test_local_prints_what_it_would_run(environment):
    printed = run(LOCAL, "--dry-run", "2", *FLAGS, env=environment | {"JAX_COORDINATOR_ADDRESS": "localhost:1234"})
    assert printed.returncode == 0, printed.stderr
    train = r"jax-entropy train --distributed --config=configs/quickstart.py:EReg\(SM\(t\)+ScFuFFN\) "
    train += r"--workdir=runs/it\'s\ here"
    platform = os.environ.get("JAX_PLATFORMS", "cpu")
    assert printed.stdout.splitlines() == [
        f"export JAX_PLATFORMS={platform} JAX_COORDINATOR_ADDRESS=localhost:1234 JAX_NUM_PROCESSES=2",
        "logs=$(mktemp -d)",
        f"JAX_PROCESS_ID=0 {train} &",
        f'JAX_PROCESS_ID=1 {train} >"$logs/1.log" 2>&1 &',
        "wait",
    ]


def test_local_prints_how_it_would_restart():
    printed = run(LOCAL, "--dry-run", "--restart=3", "2", *FLAGS)
    assert printed.returncode == 0, printed.stderr
    command = ["python3", "-I", str(LAUNCH.parent / "jax_entropy/supervise.py"), "--restart=3", "--", str(LOCAL), "2", *FLAGS]
    assert printed.stdout.count("\n") == 1 and shlex.split(printed.stdout) == command


# Says who it is, then does what MODE asks for.
STAND_IN = f"""
    #!{sys.executable}
    import os, signal, sys, time
    process, mode = os.environ["JAX_PROCESS_ID"], os.environ.get("MODE")
    def stop(number, frame):
        print(process, "stopped by", signal.Signals(number).name, flush=True)
        sys.exit(0)
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    count, address = (os.environ[name] for name in ("JAX_NUM_PROCESSES", "JAX_COORDINATOR_ADDRESS"))
    print(process, "of", count, address, sys.argv[1:], flush=True)
    open(os.environ["TMPDIR"] + "/pid" + process, "w").write(str(os.getpid()))
    if mode == "die" and process == "1" and not os.path.exists(os.environ["TMPDIR"] + "/died"):
        open(os.environ["TMPDIR"] + "/died", "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "die":
        time.sleep(1)
        sys.exit(0)
    if mode == "fail" and process == "1":
        sys.exit("what went wrong")
    if mode:
        time.sleep(50)
"""


@pytest.fixture
def stand_in(tmp_path, environment):
    executable(tmp_path / "bin/jax-entropy", STAND_IN)
    return environment


def alive(path):
    try:
        os.kill(int(path.read_text()), 0)
    except ProcessLookupError:
        return False
    return True


def test_local_runs_every_process_and_cleans_up(tmp_path, stand_in):
    done = run(LOCAL, "3", *FLAGS, env=stand_in)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("0 of 3 127.0.0.1:") and done.stdout.count("\n") == 1
    assert repr(["train", "--distributed", *FLAGS]) in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"bin", "pid0", "pid1", "pid2"}


def test_local_ends_with_the_code_of_the_process_that_failed(tmp_path, stand_in):
    failed = run(LOCAL, "3", *FLAGS, env=stand_in | {"MODE": "fail"})
    assert failed.returncode == 1
    assert "what went wrong" in failed.stderr and "process 1 of 3 ended with code 1" in failed.stderr
    logs = Path(failed.stderr.split()[-1])
    assert "1 of 3" in (logs / "1.log").read_text() and "2 of 3" in (logs / "2.log").read_text()
    time.sleep(0.2)
    assert not alive(tmp_path / "pid0") and not alive(tmp_path / "pid2")


def test_local_starts_all_processes_again_when_one_is_killed(tmp_path, stand_in):
    done = run(LOCAL, "--restart=3", "2", *FLAGS, env=stand_in | {"MODE": "die"})
    assert done.returncode == 0, done.stderr
    assert "process 1 of 2 ended with code 137" in done.stderr
    assert "killed by SIGKILL; restart 1 of 3 in 1 s" in done.stderr and done.stderr.count("restart ") == 1
    first, second = (line.split()[3] for line in done.stdout.splitlines())
    assert first != second  # a port of its own each time


def test_local_restarts_nothing_after_a_mistake(tmp_path, stand_in):
    executable(tmp_path / "bin/jax-entropy", "#!/usr/bin/env bash\necho started\nexit 2")
    done = run(LOCAL, "--restart=3", "1", *FLAGS, env=stand_in)
    assert done.returncode == 2 and done.stdout == "started\n"


@pytest.mark.parametrize("options", [[], ["--restart=3"]], ids=["alone", "supervised"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_local_forwards_signals_to_every_process(tmp_path, stand_in, number, options):
    process = subprocess.Popen(
        ["bash", LOCAL, *options, "2", *FLAGS], env=stand_in | {"MODE": "wait"}, stdout=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # where pytest runs in the background
    )  # fmt: skip
    deadline = time.monotonic() + 30
    while not all((tmp_path / name).exists() for name in ("pid0", "pid1")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.2)
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert f"0 stopped by {number.name}" in output
    assert not alive(tmp_path / "pid1")


def test_tpu_vm_prints_what_it_would_do():
    options = ["--type=v5litepod-8", "--version=v2-alpha-tpuv5-lite", "--workdir=runs/ereg"]
    flags = [FLAGS[0], "--config.data.files=/it's/my books"]
    printed = run(TPU_VM, "--dry-run", "all", *SLICE, *options, "--", *flags)
    assert printed.returncode == 0, printed.stderr
    root, vm = shlex.quote(str(LAUNCH.parent)), "gcloud compute tpus tpu-vm"
    busy = (
        "if [ -s train.pid ] && kill -0 $(cat train.pid) 2>/dev/null; "
        "then echo this slice is busy with a run >&2; exit 2; fi"
    )
    assert printed.stdout.splitlines() == [
        f"{vm} describe ereg --zone=us-west4-a '--format=value(state)' 2>/dev/null || "
        f"{vm} create ereg --zone=us-west4-a --accelerator-type=v5litepod-8 --version=v2-alpha-tpuv5-lite",
        f"mkdir -p {root}/build",
        f"git -C {root} archive --format=tar.gz --output={root}/build/jax_entropy.tar.gz HEAD",
        f"{vm} scp {root}/build/jax_entropy.tar.gz ereg:jax_entropy.tar.gz --zone=us-west4-a --worker=all",
        f"{vm} ssh ereg --zone=us-west4-a --worker=all '--command={busy}; "
        "rm -rf jax_entropy && mkdir jax_entropy && tar -xzf jax_entropy.tar.gz -C jax_entropy'",
        f"{vm} ssh ereg --zone=us-west4-a --worker=all '--command=PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install "
        "--quiet --user uv && cd jax_entropy && python3 -m uv venv --quiet --allow-existing --python=3.12 ../venv && "
        "python3 -m uv pip install --quiet --python=../venv .[tpu]'",
        f"{vm} ssh ereg --zone=us-west4-a --worker=all '--command={busy}; rm -f train.pid train.code; "
        r"""cd jax_entropy || exit; setsid nohup bash -c '\''"$@" & echo $! >~/train.pid; wait $!; """
        r"""echo $? >~/train.code'\'' train ../venv/bin/jax-entropy train --distributed --workdir=$HOME/runs/ereg """
        r"""'\''--config=configs/quickstart.py:EReg(SM(t)+ScFuFFN)'\'' """
        r"""'\''--config.data.files=/it'\''\'\'''\''s/my books'\'' >~/train.log 2>&1 </dev/null & """
        "until [ -s ~/train.pid ]; do sleep 0.1; done'",
        f"{vm} ssh ereg --zone=us-west4-a --worker=0 '--command=tail --pid=$(cat train.pid) -n +1 -f train.log; "
        "sleep 2; exit $(cat train.code || echo 1)'",
        "mkdir -p runs",
        f"{vm} scp --recurse ereg:runs/ereg runs --zone=us-west4-a --worker=0",
    ]
    assert "delete" not in printed.stdout
    printed = run(TPU_VM, "delete", "--dry-run", *SLICE)
    assert printed.stdout == f"{vm} delete ereg --zone=us-west4-a\n"


@pytest.fixture
def slice_of_one_host(tmp_path, environment):
    """A stand-in for gcloud whose only host is the folder tmp_path/host, and a checkout in tmp_path/checkout."""
    host, checkout = tmp_path / "host", tmp_path / "checkout"
    executable(
        tmp_path / "bin/gcloud",
        f"""
        #!/usr/bin/env bash
        set -eu
        echo "$4" >>{tmp_path}/verbs
        case $4 in
          describe) [[ -d {host} ]] ;;
          create) mkdir {host} ;;
          ssh) for word; do case $word in --command=*) command=${{word#*=}} ;; esac; done
               cd {host} && HOME={host} bash -c "$command" ;;
          scp) paths=()
               for word in "${{@:5}}"; do [[ $word == --* ]] || paths+=("${{word/ereg:/{host}/}}"); done
               cp -r "${{paths[@]}}" ;;
          *) exit 9 ;;
        esac
        """,
    )
    executable(
        host.with_name("jax-entropy"),
        f"""
        #!{sys.executable}
        import os, sys
        workdir = next(word.split("=", 1)[1] for word in sys.argv if word.startswith("--workdir="))
        os.makedirs(workdir)
        open(workdir + "/arguments", "w").write(repr(sys.argv[1:]))
        print("trained in", os.listdir("."))
        sys.exit(3 if "--fail" in sys.argv else 0)
        """,
    )
    executable(
        tmp_path / "bin/python3",
        f"""
        #!/usr/bin/env bash
        echo "$*" >>{tmp_path}/installs
        mkdir -p {host}/venv/bin && cp {tmp_path}/jax-entropy {host}/venv/bin
        """,
    )
    (checkout / "launch").mkdir(parents=True)
    shutil.copy(TPU_VM, checkout / "launch")
    git = ["git", "-C", checkout, "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "launch"], ["commit", "-qm", "x"]):
        subprocess.run([*git, *command], check=True)
    (checkout / "not_committed").touch()
    return checkout / "launch/tpu_vm.sh", environment | {"PWD": str(tmp_path)}


ALL = ["all", *SLICE, "--type=v5litepod-8", "--version=v2-alpha-tpuv5-lite", "--workdir=runs/ereg", "--"]


def test_tpu_vm_creates_installs_trains_and_fetches(tmp_path, slice_of_one_host):
    script, environment = slice_of_one_host
    done = run(script, *ALL, *FLAGS[:1], "--name=it's here", env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "trained in ['launch']" in done.stdout  # the committed code, without .git
    assert "uncommitted changes" in done.stderr and "delete --name=ereg" in done.stderr
    expected = ["train", "--distributed", f"--workdir={tmp_path}/host/runs/ereg", FLAGS[0], "--name=it's here"]
    assert (tmp_path / "runs/ereg/arguments").read_text() == repr(expected)
    assert "uv pip install" in (tmp_path / "installs").read_text()
    assert "delete" not in (tmp_path / "verbs").read_text()


def test_tpu_vm_fetches_a_failed_run_too_and_ends_with_its_code(tmp_path, slice_of_one_host):
    script, environment = slice_of_one_host
    (tmp_path / "host").mkdir()
    failed = run(script, *ALL, "--fail", env=environment, cwd=tmp_path)
    assert failed.returncode == 3, failed.stderr
    assert (tmp_path / "runs/ereg/arguments").exists()
    assert "create" not in (tmp_path / "verbs").read_text()  # it was there


def test_tpu_vm_leaves_a_running_run_alone(tmp_path, slice_of_one_host):
    script, environment = slice_of_one_host
    (tmp_path / "host").mkdir()
    (tmp_path / "host/train.pid").write_text(str(os.getpid()))
    busy = run(script, "start", *SLICE, "--workdir=runs/ereg", env=environment, cwd=tmp_path)
    assert busy.returncode == 2 and "busy with a run" in busy.stderr
