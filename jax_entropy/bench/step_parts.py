"""The parts of `bench device` about whole training steps: their rate, what feeds them, their losses, their peers."""

import importlib.util
import os
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_entropy.bench.sizes import Clock, Row, kernels, sizes
from jax_entropy.bench.step import bench_step
from jax_entropy.bench.trainable import trainable
from jax_entropy.census import census
from jax_entropy.chips import peak_flops
from jax_entropy.config import default_config

_STEPS = 200  # of the losses beside the CPU's
_PRODUCT = re.compile("nvjet|gemm|cublas|cutlass", re.I)  # in the names of kernels


def step(clock: Clock) -> Iterator[Row]:
    """Tokens a second of whole training steps in bfloat16, with the penalty and without, and where their time goes."""
    for context, tokens in sizes().steps:
        for architecture in ("EReg(SM+LN+G)", "SM+LN+G"):
            if clock.left() < 10:
                return
            yield _step_row(clock, architecture, context, tokens)


def _step_row(clock: Clock, architecture: str, context: int, tokens_of_step: int) -> Row:
    model, state, train_step = _training(architecture, context, sizes().model, "bfloat16")
    batch = max(tokens_of_step // context, 1)
    tokens = jax.random.randint(jax.random.key(1), (batch, context + 1), 0, model.config.vocab_size)
    start = time.perf_counter()
    compiled = train_step.lower(state, tokens, False).compile()
    compile_seconds, taken = time.perf_counter() - start, []
    for _ in range(7):  # some steps a time, as a run does that logs now and then
        start = time.perf_counter()
        for _ in range(5):
            state, metrics = compiled(state, tokens)
        jax.block_until_ready(state)
        taken.append((time.perf_counter() - start) / 5)
        if clock.left() < 0:
            break
    seconds = statistics.median(taken[1:] or taken)
    rate = batch * context / seconds
    row = dict(architecture=architecture, T=context, batch=batch, tokens_per_second=rate, loss=float(metrics["loss"]))
    row["step ms"] = 1e3 * seconds
    if peak := peak_flops(jax.devices()[0].device_kind):
        row["mfu"] = rate * 3 * census(model.config).forward_flops / context / peak
    if clock.left() > 0:
        row |= _where(compiled, state, tokens, seconds)
    memory = compiled.memory_analysis()
    return row | dict(
        compile_seconds=compile_seconds, temporaries_GiB=memory.temp_size_in_bytes / 2**30 if memory else None
    )


def _where(step: Callable, state: Any, tokens: jax.Array, seconds: float) -> Row:
    """What steps wait for their batches, and by the profiler where the time of a GPU goes; `seconds`: of a step."""

    def advance(tokens: jax.Array) -> jax.Array:
        nonlocal state
        state, metrics = step(state, tokens)
        return metrics["loss"]

    row, milliseconds = dict(data_wait=_data_wait(advance, np.asarray(tokens))), Counter()
    for name, taken in kernels(lambda: advance(tokens), rounds=3).items():
        kind = "attention" if "attention" in name else "products" if _PRODUCT.search(name) else "other kernels"
        milliseconds[kind + " ms"] += 1e3 * taken
    if milliseconds:
        row |= dict(milliseconds) | {"idle ms": 1e3 * seconds - milliseconds.total()}
    return row


def _data_wait(advance: Callable[[jax.Array], jax.Array], rows: np.ndarray, turns: int = 5, steps: int = 4) -> float:
    """Share of the time that steps wait for their batches, read on the host and placed while the step before runs.

    Beside steps of a batch that lies on the device, in turns.
    """
    resident, taken = jax.device_put(rows), {False: [], True: []}
    for fed in (False, True) * turns:
        start = time.perf_counter()
        for _ in range(steps):
            loss = advance(jax.device_put(rows.copy()) if fed else resident)
        jax.block_until_ready(loss)
        taken[fed].append(time.perf_counter() - start)
    return max(0.0, 1 - statistics.median(taken[False]) / statistics.median(taken[True]))


def _training(architecture: str, context: int, fields: Row, dtype: str) -> tuple:
    config = default_config(architecture)
    config.model.update({name: value for name, value in fields.items() if name != "vocab_size"})
    config.model.update(context_length=context, bias="all")
    config.train.dtype = dtype
    return trainable(config, fields["vocab_size"])


def training(clock: Clock) -> Iterator[Row]:
    """Losses of 200 steps of a small model on this device beside the CPU's, both in float32, and how far they part."""
    command = [sys.executable, "-m", "jax_entropy.bench.step_parts"]
    alone = dict(os.environ, JAX_PLATFORMS="cpu")  # where a GPU is the default, kernels are chosen for it
    with subprocess.Popen(command, env=alone, stdout=subprocess.PIPE, text=True) as beside:
        ours, theirs = _losses(), [float(line) for line in beside.stdout]
    for i in (0, _STEPS // 2, _STEPS - 1):
        difference = abs(ours[i] - theirs[i]) / abs(theirs[i])
        yield dict(step=i + 1, device=ours[i], cpu=theirs[i], relative_difference=difference)


def _losses() -> list[float]:
    tokens = _text(_STEPS, batch=8, context=128, vocab_size=256)
    fields = dict(num_layers=2, num_heads=2, model_dim=64, vocab_size=256)
    with jax.default_matmul_precision("highest"):  # float32, as a CPU has it
        _, state, train_step = _training("EReg(SM(t)+ScFuFFN)", 128, fields, "float32")
        losses = []
        for i in range(_STEPS):
            state, metrics = train_step(state, jnp.asarray(tokens[i]), False)
            losses.append(metrics["loss"])
    return [float(loss) for loss in losses]


def _text(steps: int, batch: int, context: int, vocab_size: int) -> np.ndarray:
    """Tokens with something to learn: each is one of two that depend on the one before; [steps, batch, context + 1]."""
    rng = np.random.default_rng(0)
    following, tokens = rng.integers(0, vocab_size, (vocab_size, 2)), np.zeros((steps, batch, context + 1), np.int32)
    tokens[..., 0] = rng.integers(0, vocab_size, (steps, batch))
    for i in range(context):
        tokens[..., i + 1] = following[tokens[..., i], rng.integers(0, 2, (steps, batch))]
    return tokens


def peers(clock: Clock) -> Iterator[Row]:
    """A step of Hugging Face's GPT-2 in PyTorch beside ours, in turns, where torch and transformers are installed."""
    if not (importlib.util.find_spec("torch") and importlib.util.find_spec("transformers")):
        yield dict(note="torch and transformers are not installed")
        return
    size = sizes()
    names = dict(layers=size.model["num_layers"], width=size.model["model_dim"], heads=size.model["num_heads"])
    model, shapes = names | dict(vocab_size=size.model["vocab_size"]), [(128, size.tokens // 128)]
    yield from bench_step(
        shapes, ("bfloat16",), rounds=5, peer_python=sys.executable, notify=lambda _: None, model=model, compiled=True
    )


if __name__ == "__main__":
    print(*_losses(), sep="\n")
