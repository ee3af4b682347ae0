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
import yaml

from tests import REPOSITORY

LAUNCH = REPOSITORY / "launch"
LOCAL, TPU_VM, GKE, SLURM = (LAUNCH / name for name in ("local.sh", "tpu_vm.sh", "gke_jobset.sh", "slurm.sbatch"))
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


@pytest.mark.parametrize("script", [LOCAL, TPU_VM, GKE, SLURM], ids=lambda path: path.name)
def test_scripts_are_clean(script):
    subprocess.run(["bash", "-n", script], check=True)
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    checked = subprocess.run(["shellcheck", script], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("script", [LOCAL, TPU_VM, GKE], ids=lambda path: path.name)
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
        (TPU_VM, ["start", *SLICE, "--workdir=runs/x", "--restart=no"], "--restart='no'"),
        (GKE, ["--name=Ereg"], "--name='Ereg' must be lower-case"),
        (GKE, ["--name=e", "--claim=runs"], "--image='' is not a container image"),
        (GKE, ["--name=e", "--image=i", "--claim=a b"], "--claim='a b'"),
        (GKE, ["--name=e", "--image=i", "--claim=c", "--topology=16", "--", *FLAGS], "--topology='16' must look like"),
        (GKE, ["--name=e", "--image=i", "--claim=c", "--topology=3x3", "--", *FLAGS], "--chips=4 does not divide"),
        (GKE, ["--name=e", "--image=i", "--claim=c"], "the flags of the run are missing"),
        (GKE, ["--name=e", "--image=i", "--claim=c", "--", "--a=\n"], "a flag has a line break"),
        (GKE, ["--nam=e"], "'--nam=e' is not understood"),
        (SLURM, [], "the flags of the run are missing"),
    ],
)
def test_a_mistake_is_answered_in_one_sentence(script, arguments, reason):
    refused = run(script, "--dry-run", *arguments)
    assert refused.returncode == 2 and not refused.stdout
    assert reason in refused.stderr and refused.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "script, arguments, missing",
    [
        (LOCAL, ["2", *FLAGS], "jax-entropy"),
        (TPU_VM, ["follow", *SLICE], "gcloud"),
        (GKE, ["--name=e", "--image=i", "--claim=c", "--", *FLAGS], "kubectl"),
    ],
    ids=["local.sh", "tpu_vm.sh", "gke_jobset.sh"],
)
def test_a_missing_program_is_answered_in_one_sentence(tmp_path, script, arguments, missing):
    (tmp_path / "bin").mkdir()
    for name in ("bash", "cut", "dirname"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    refused = run(script, *arguments, env={"PATH": str(tmp_path / "bin")})
    assert refused.returncode == 2
    assert f"{missing} is not on the PATH" in refused.stderr and refused.stderr.count("\n") == 1


def test_local_prints_what_it_would_run(environment):
    given = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234", "no_proxy": ".example"}
    printed = run(LOCAL, "--dry-run", "2", *FLAGS, env=environment | given)
    assert printed.returncode == 0, printed.stderr
    train = r"jax-entropy train --distributed --config=configs/quickstart.py:EReg\(SM\(t\)+ScFuFFN\) "
    train += r"--workdir=runs/it\'s\ here"
    platform = os.environ.get("JAX_PLATFORMS", "cpu")
    assert printed.stdout.splitlines() == [
        f"export JAX_PLATFORMS={platform} JAX_COORDINATOR_ADDRESS=10.0.0.1:1234 JAX_NUM_PROCESSES=2 "
        "no_proxy=10.0.0.1\\,127.0.0.1\\,localhost\\,.example",
        "logs=$(mktemp -d)",
        f"JAX_PROCESS_ID=0 {train} &",
        f'JAX_PROCESS_ID=1 {train} >"$logs/1.log" 2>&1 &',
        "wait",
    ]


def test_local_prints_how_it_would_restart():
    printed = run(LOCAL, "--dry-run", "--restart=3", "2", *FLAGS)
    assert printed.returncode == 0, printed.stderr
    supervise = ["python3", "-I", str(LAUNCH.parent / "jax_entropy/supervise.py"), "--restart=3", "--"]
    assert printed.stdout.count("\n") == 1 and shlex.split(printed.stdout) == [*supervise, str(LOCAL), "2", *FLAGS]


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
    assert address.rpartition(":")[0] in os.environ["no_proxy"].split(",")
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
        r"""echo $? >~/train.code'\'' train ../venv/bin/python -I jax_entropy/supervise.py --restart=10 -- """
        r"""../venv/bin/jax-entropy train --distributed --workdir=$HOME/runs/ereg """
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


def test_tpu_vm_asks_for_a_queued_resource():
    options = ["--type=v6e-16", "--version=v2-alpha-tpuv6e", "--queued", "--spot"]
    printed = run(TPU_VM, "--dry-run", "create", *SLICE, *options)
    assert printed.returncode == 0, printed.stderr
    tpus = "gcloud compute tpus"
    assert printed.stdout.splitlines() == [
        f"{tpus} tpu-vm describe ereg --zone=us-west4-a '--format=value(state)' 2>/dev/null || "
        f"{tpus} queued-resources create ereg --node-id=ereg --zone=us-west4-a --accelerator-type=v6e-16 "
        "--runtime-version=v2-alpha-tpuv6e --spot",
        f"bash -c 'while state=$({tpus} queued-resources describe ereg --zone=us-west4-a "
        r"""'\''--format=value(state.state)'\'') || exit; [ "$state" != ACTIVE ]; do case $state in """
        """FAILED | SUSPENDED) echo "the queued resource is $state" >&2; exit 1 ;; esac; sleep 30; done'""",
    ]
    printed = run(TPU_VM, "delete", "--dry-run", "--queued", *SLICE)
    assert printed.stdout == f"{tpus} queued-resources delete ereg --zone=us-west4-a --force\n"


@pytest.mark.parametrize(("states", "code"), [(["WAITING_FOR_RESOURCES", "ACTIVE"], 0), (["FAILED"], 1), ([], 1)])
def test_tpu_vm_waits_for_a_queued_resource(tmp_path, environment, states, code):
    (tmp_path / "states").write_text("".join(f"{state}\n" for state in states))
    executable(
        tmp_path / "bin/gcloud",
        f"""
        #!/usr/bin/env bash
        case "$3 $4" in
          "tpu-vm describe") exit 1 ;;
          "queued-resources create") echo "$*" >{tmp_path}/created ;;
          "queued-resources describe")
            read -r state <{tmp_path}/states || exit 1
            sed -i 1d {tmp_path}/states
            echo "$state" ;;
        esac
        """,
    )
    executable(tmp_path / "bin/sleep", "#!/usr/bin/env bash\n")
    options = ["--type=v6e-16", "--version=v2-alpha-tpuv6e", "--queued"]
    created = run(TPU_VM, "create", *SLICE, *options, env=environment)
    assert created.returncode == code, created.stderr
    assert (tmp_path / "created").read_text().startswith("compute tpus queued-resources create ereg --node-id=ereg")


def test_gke_prints_a_job_set_that_reads_back_as_given(tmp_path, environment):
    flags = [FLAGS[0], '--workdir=/runs/it\'s "here" & \\there: {x} #1', "--config.data.files=@NAME@"]
    options = ["--name=ereg", "--image=europe/me:1", "--claim=runs", "--topology=2x2x4", "--accelerator=tpu-v5p-slice"]
    printed = run(GKE, "--dry-run", *options, "--", *flags)
    assert printed.returncode == 0, printed.stderr
    first, *text, last = printed.stdout.splitlines()
    assert (first, last) == ("kubectl apply -f - <<'END'", "END")
    made = yaml.safe_load("\n".join(text))
    assert made["kind"] == "JobSet" and made["metadata"]["name"] == "ereg"
    assert made["spec"]["failurePolicy"]["maxRestarts"] == 10
    job = made["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["parallelism"] == job["completions"] == 4
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2]
    pod = job["template"]["spec"]
    assert set(pod["nodeSelector"].values()) == {"tpu-v5p-slice", "2x2x4"}
    container = pod["containers"][0]
    assert container["command"] == ["python", "-m", "jax_entropy.supervise", "--restart=10", "--"]
    assert container["args"] == ["jax-entropy", "train", "--distributed", *flags]
    assert container["resources"] == {"limits": {"google.com/tpu": 4}} and container["image"] == "europe/me:1"
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == "runs"
    executable(tmp_path / "bin/kubectl", '#!/usr/bin/env bash\necho "$*"\ncat\n')
    applied = run(GKE, *options, "--", *flags, env=environment)
    assert applied.stdout.splitlines() == ["apply -f -", *text]


def test_slurm_prints_and_runs_the_same(tmp_path, environment):
    printed = run(SLURM, "--dry-run", *FLAGS)
    assert printed.returncode == 0, printed.stderr
    run_ = ["srun", "--kill-on-bad-exit=1", "jax-entropy", "train", "--distributed", *FLAGS]
    supervise = ["python3", "-m", "jax_entropy.supervise", "--restart=10", "--", *run_]
    assert shlex.split(printed.stdout) == ["JAX_LOCAL_DEVICE_IDS=0,1,2,3,4,5,6,7", *supervise]
    executable(tmp_path / "bin/python3", '#!/usr/bin/env bash\necho "$JAX_LOCAL_DEVICE_IDS"\nprintf "%s\\n" "$@"\n')
    job = environment | {"SLURM_JOB_ID": "1", "SLURM_GPUS_ON_NODE": "4"}
    assert run(SLURM, *FLAGS, env=job).stdout.splitlines() == ["0,1,2,3", *supervise[1:]]
    refused = run(SLURM, *FLAGS, env={name: value for name, value in environment.items() if name != "SLURM_JOB_ID"})
    assert refused.returncode == 2 and "give it to sbatch" in refused.stderr


def test_skypilot_joins_the_nodes(tmp_path, environment):
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    executable(tmp_path / "bin/python3", '#!/usr/bin/env bash\nenv | grep ^JAX_ | sort\nprintf "%s\\n" "$@"\n')
    config, workdir = (flag.partition("=")[2] for flag in FLAGS)
    given = {"CONFIG": config, "WORKDIR": workdir, "FLAGS": "--config.seed=1 --x=2"}
    assert set(given) < set(task["envs"])
    nodes = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    clean = {name: value for name, value in environment.items() if not name.startswith("JAX_")}
    done = subprocess.run(["bash", "-c", task["run"]], env=clean | given | nodes, capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        "JAX_COORDINATOR_ADDRESS=10.0.0.1:8476", "JAX_NUM_PROCESSES=2", "JAX_PROCESS_ID=1",
        "-m", "jax_entropy.supervise", "--restart=10", "--", "jax-entropy", "train", "--distributed",
        *FLAGS, "--config.seed=1", "--x=2",
    ]  # fmt: skip
    if shutil.which("shellcheck"):
        for part in ("setup", "run"):
            check = ["shellcheck", "--shell=bash", "--exclude=SC2153", "-"]  # FLAGS is a variable of its own
            checked = subprocess.run(check, input=task[part], capture_output=True, text=True)
            assert checked.returncode == 0, checked.stdout


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
        os.makedirs(workdir, exist_ok=True)
        open(workdir + "/arguments", "w").write(repr(sys.argv[1:]))
        print("trained in", sorted(os.listdir(".")))
        sys.exit(3 if "--fail" in sys.argv else 0)
        """,
    )
    executable(
        tmp_path / "bin/python3",
        f"""
        #!/usr/bin/env bash
        echo "$*" >>{tmp_path}/installs
        mkdir -p {host}/venv/bin && cp {tmp_path}/jax-entropy {host}/venv/bin
        ln -sf {sys.executable} {host}/venv/bin/python
        """,
    )
    (checkout / "launch").mkdir(parents=True)
    (checkout / "jax_entropy").mkdir()
    shutil.copy(TPU_VM, checkout / "launch")
    shutil.copy(LAUNCH.parent / "jax_entropy/supervise.py", checkout / "jax_entropy")
    git = ["git", "-C", checkout, "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "launch", "jax_entropy"], ["commit", "-qm", "x"]):
        subprocess.run([*git, *command], check=True)
    (checkout / "not_committed").touch()
    return checkout / "launch/tpu_vm.sh", environment | {"PWD": str(tmp_path)}


ALL = ["all", *SLICE, "--type=v5litepod-8", "--version=v2-alpha-tpuv5-lite", "--workdir=runs/ereg", "--"]


def test_tpu_vm_creates_installs_trains_and_fetches(tmp_path, slice_of_one_host):
    script, environment = slice_of_one_host
    done = run(script, *ALL, *FLAGS[:1], "--name=it's here", env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "trained in ['jax_entropy', 'launch']" in done.stdout  # the committed code, without .git
    assert "uncommitted changes" in done.stderr and "delete --name=ereg" in done.stderr
    expected = ["train", "--distributed", f"--workdir={tmp_path}/host/runs/ereg", FLAGS[0], "--name=it's here"]
    assert (tmp_path / "runs/ereg/arguments").read_text() == repr(expected)
    assert "uv pip install" in (tmp_path / "installs").read_text()
    assert "delete" not in (tmp_path / "verbs").read_text()


def test_tpu_vm_fetches_a_failed_run_too_and_ends_with_its_code(tmp_path, slice_of_one_host):
    script, environment = slice_of_one_host
    (tmp_path / "host").mkdir()
    once = [*ALL[:-1], "--restart=0", "--"]
    failed = run(script, *once, "--fail", env=environment, cwd=tmp_path)
    assert failed.returncode == 3, failed.stderr
    assert (tmp_path / "runs/ereg/arguments").exists()
    assert "create" not in (tmp_path / "verbs").read_text()  # it was there


def test_tpu_vm_leaves_a_running_run_alone(tmp_path, slice_of_one_host):
    script, environment = slice_of_one_host
    (tmp_path / "host").mkdir()
    (tmp_path / "host/train.pid").write_text(str(os.getpid()))
    busy = run(script, "start", *SLICE, "--workdir=runs/ereg", env=environment, cwd=tmp_path)
    assert busy.returncode == 2 and "busy with a run" in busy.stderr
