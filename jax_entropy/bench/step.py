"""Whole training steps side by side: ours, and Hugging Face GPT-2 in PyTorch with the same penalty.

Each contender is a process that trains one step for every line it reads and answers with the seconds it took; the
parent takes turns between them, so that a machine that changes its speed changes it for both.
"""

import importlib.util
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jax_entropy.errors import UserError

SHAPES = ((128, 32), (512, 8), (1024, 4))  # context length, batch size
DTYPES = ("float32", "bfloat16")
MODEL = dict(layers=4, width=256, heads=4, vocab_size=4096)
_WARM_UP = 2  # steps


def bench_step(
    shapes: Sequence[tuple[int, int]] = SHAPES,
    dtypes: Sequence[str] = DTYPES,
    *,
    rounds: int,
    peer_python: str,
    notify: Callable[[str], None],
    model: dict[str, int] = MODEL,
    compiled: bool = False,
) -> list[dict[str, Any]]:
    """Tokens/s (median over `rounds` steps) and peak memory of all, with ratios, for every shape and type.

    Args:
      rounds: steps of each contender, in turn.
      peer_python: a Python with torch and transformers; "": this one, if it has them, else our rows alone.
      compiled: the peer once more as `torch.compile` with fused attention, which has no entropy and no penalty.
      notify: receives a line on what will be done, and one for each row with the time that is left.
    Raises:
      UserError: `peer_python` cannot run the peer, or there is none and `compiled` asks for it.
    """
    contenders = {"jax_entropy": [sys.executable, "-m", "jax_entropy.bench.step"]}
    if not peer_python and importlib.util.find_spec("torch") and importlib.util.find_spec("transformers"):
        peer_python = sys.executable
    if compiled and not peer_python:
        raise UserError("compiled: there is no torch and transformers here; name a Python that has them as peer_python")
    if peer_python:
        if not shutil.which(peer_python):
            raise UserError(f"peer_python={peer_python}: there is no such program")
        _check_peer(peer_python)
        contenders["torch"] = [peer_python, str(Path(__file__).with_name("torch_step.py"))]
        if compiled:
            contenders["torch.compile"] = [*contenders["torch"], "compiled"]
    settings = [(dtype, context, batch) for dtype in dtypes for context, batch in shapes]
    notify(
        f"{rounds} steps of {' and '.join(contenders)} on {len(settings)} shapes and types, each compiled first: "
        "some minutes on two cores"
    )
    rows = []
    start = time.monotonic()
    for dtype, context, batch in settings:
        row = dict(dtype=dtype, context=context, batch=batch)
        if flags := os.environ.get("XLA_FLAGS"):
            row["XLA_FLAGS"] = flags
        times, memory = _alternate(contenders, model | row, rounds)
        for name, seconds in times.items():
            row[f"{name} tokens/s"] = context * batch / statistics.median(seconds)
            row[f"{name} MB"] = memory[name]
        for peer, suffix in (("torch", ""), ("torch.compile", ", torch.compile")):
            if peer in times:
                ratios = [theirs / ours for ours, theirs in zip(times["jax_entropy"], times[peer], strict=True)]
                row["speed ratio" + suffix] = statistics.median(ratios)
                row["memory ratio" + suffix] = memory["jax_entropy"] / memory[peer]
        told = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
        rows.append(row)
        left = (time.monotonic() - start) / len(rows) * (len(settings) - len(rows))
        notify(f"{len(rows)} of {len(settings)}: {told}" + (f"; some {left:.0f} s left" if left else ""))
    return rows


def _check_peer(python: str) -> None:
    """Checks that a program is a Python with torch and transformers.

    Raises:
      UserError: it is not.
    """
    asked = "import importlib.util as u; print(all(map(u.find_spec, ('torch', 'transformers'))))"
    said = subprocess.run([python, "-c", asked], capture_output=True, text=True).stdout.strip()
    if said != "True":
        lacks = "lacks torch or transformers" if said == "False" else "is no Python"
        raise UserError(f"peer_python={python} {lacks}; leave it out to time jax_entropy alone")


def _alternate(
    contenders: dict[str, list[str]], shape: dict[str, Any], rounds: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of every step after the warm-up, and peak memory in MB, by contender."""
    processes = {
        name: subprocess.Popen(
            [*command, json.dumps(shape)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            # the peer gets the allocator that its users have
            env={k: v for k, v in os.environ.items() if name == "jax_entropy" or k != "GLIBC_TUNABLES"}
            | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},  # contenders share one accelerator
        )
        for name, command in contenders.items()
    }  # fmt: skip

    def ask(name: str) -> float:
        process = processes[name]
        process.stdin.write("\n")
        process.stdin.flush()
        return answer(name)

    def answer(name: str) -> float:
        line = processes[name].stdout.readline()
        if not line:
            raise UserError(f"the benchmark's process of {name} ended: {' '.join(contenders[name])}")
        return float(line)

    try:
        for name in processes:
            for _ in range(_WARM_UP):
                ask(name)
        times = {name: [] for name in processes}
        for _ in range(rounds):
            for name in processes:
                times[name].append(ask(name))
        memory = {}
        for name, process in processes.items():
            process.stdin.close()
            memory[name] = answer(name)
    finally:
        for process in processes.values():
            with process:  # which waits for it, and closes its pipes
                process.kill()
    return times, memory


def _worker(shape: dict[str, Any]) -> None:
    """Our contender: one training step for each line on stdin."""
    import jax

    from jax_entropy.config import default_config, model_config
    from jax_entropy.model import Transformer
    from jax_entropy.sharding import batch_sharding, config_mesh
    from jax_entropy.state import abstract_state, jit_train_step, new_state

    config = default_config("EReg(SM+LN+G)")
    config.model.update(
        num_layers=shape["layers"], num_heads=shape["heads"], model_dim=shape["width"],
        context_length=shape["context"], bias="all", scan_unroll=shape["layers"],
    )  # fmt: skip
    config.train.update(dtype=shape["dtype"], batch_size=shape["batch"])
    model, mesh = Transformer(model_config(config, shape["vocab_size"])), config_mesh(config)
    tokens = jax.random.randint(jax.random.key(0), (shape["batch"], shape["context"] + 1), 0, shape["vocab_size"])
    with jax.set_mesh(mesh):  # of one device for each core, where XLA_FLAGS says so
        tokens = jax.device_put(tokens, batch_sharding(mesh))
        sharding = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, model, mesh))
        state = new_state(config, model, mesh, sharding)
        train_step = jit_train_step(config, model, mesh, sharding)
        for _ in sys.stdin:
            start = time.perf_counter()
            state, _ = jax.block_until_ready(train_step(state, tokens, False))
            print(time.perf_counter() - start, flush=True)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, flush=True)


if __name__ == "__main__":
    _worker(json.loads(sys.argv[1]))
