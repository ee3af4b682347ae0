"""Sweeps whose runs train nothing: a process writes what a run would have left, in milliseconds."""

import json
import sys
from types import SimpleNamespace

from jax_entropy.sweep import queue, run

# The perplexity is 10 and what the learning rate is away from 3e-3, in tens, plus the seed in tenths.
PROCESS = """
import json, os, signal, sys, time

folder, log, fates = sys.argv[3], sys.argv[1], json.loads(sys.argv[2])
config = json.load(open(folder + "/config.json"))
fate = fates.get(config["architecture"], "complete")
with open(log, "a") as file:
    file.write(os.path.basename(folder) + "\\n")
if fate == "refused at once":
    sys.exit(print(fate) or 2)
if fate == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if fate == "interrupts":
    os.kill(os.getppid(), signal.SIGINT)
    sys.stdin.read()  # until the sweep lets go of it
state = {"interrupts": "stopped", "refused": "failed"}.get(fate, fate)
steps, rate, seed = config["train"]["num_steps"], config["optimizer"]["learning_rate"], config["seed"]
perplexity = 10 + 10 * abs(rate / 3e-3 - 1) + seed / 10
lines = [
    dict(kind="train", step=1, nan_count=[0, 2]),
    dict(kind="evaluate", step=steps, validation_perplexity=perplexity, bits_per_byte=1.5,
         head_entropy=[[4.0, 3.0], [2.0, 0.5]]),
]
with open(folder + "/metrics.jsonl", "w") as file:
    file.writelines(json.dumps(line) + "\\n" for line in lines)
status = dict(state=state, step=steps, num_steps=steps, reason=fate * (fate in ("diverged", "failed", "refused")),
              time=1.0, pid=1, host="x", started=1.0, seconds=7.0, versions={}, devices="")
with open(folder + "/status.json", "w") as file:
    json.dump(status, file)
sys.exit(2 if fate in ("diverged", "refused") else 0)
"""


def stub(monkeypatch, tmp_path, fates, draw=lambda rows, protocol, title: None):
    """Puts the process above in the place of training; returns a function that lists what was trained so far.

    fates: complete, diverged, failed, refused, refused at once (before there is a status), killed or interrupts, by
    architecture. draw: the frontier, if any.
    """
    log = tmp_path / "trained"
    (tmp_path / "process.py").write_text(PROCESS)
    command = (sys.executable, "-S", str(tmp_path / "process.py"), str(log), json.dumps(fates))
    monkeypatch.setattr(queue, "_PROCESS", command)
    monkeypatch.setattr(queue, "_POLL_SECONDS", 0.01)
    corpus = SimpleNamespace(
        fingerprint="abc", num_train_chunks=100, num_validation_chunks=5, context_length=128, source="stdlib",
        tokenizer=SimpleNamespace(vocab_size=4096),
    )  # fmt: skip
    monkeypatch.setattr(run, "frontier", draw)
    monkeypatch.setattr(run, "prepare", lambda section, context_length, notify: corpus)
    return lambda: log.read_text().split() if log.exists() else []
