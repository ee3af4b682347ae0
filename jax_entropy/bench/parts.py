"""What `bench device` measures, part by part: `python -m jax_entropy.bench.parts PART SECONDS` prints a row a line.

Needs jax, flax, optax, einops, ml_collections and numpy, no corpus. On a CPU the same parts run on small sizes.
"""

import dataclasses
import functools
import importlib.util
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_entropy.attention import IMPLEMENTATIONS, attention, available
from jax_entropy.chips import peak_flops

Row = dict[str, Any]
KERNELS = {"gpu": (jnp.float32, jnp.bfloat16), "hopper": (jnp.bfloat16,)}  # and the types that they are tried in


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a kind of device is measured on."""

    copied: int  # bytes
    product: int  # rows and columns of a square one
    tokens: int  # of a call of attention, and of a step
    contexts: tuple[int, ...]  # T of the attention table
    heads: tuple[tuple[int, int], ...]  # (H, N)
    step_contexts: tuple[int, ...]
    model: dict[str, int]  # of the step
    longest: int  # T of the memory table


_GPT2 = dict(num_layers=12, num_heads=12, model_dim=768, vocab_size=50304)
_CARD = Sizes(
    1 << 30, 8192, 16384, (512, 1024, 2048, 4096, 8192, 16384), ((64, 32), (128, 16)), (1024, 128), _GPT2, 32768
)
_CPU = Sizes(
    1 << 26,
    1024,
    512,
    (128, 256),
    ((64, 2),),
    (64,),
    dict(num_layers=2, num_heads=2, model_dim=64, vocab_size=512),
    1024,
)


def sizes() -> Sizes:
    """Of this device."""
    return _CPU if jax.default_backend() == "cpu" else _CARD


class Clock:
    """Time that is left for a part, and medians of calls."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()

    def seconds(self, call: Callable[[], Any], *, rounds: int = 5, least: float = 0.02) -> float:
        """Median seconds of a call, each round long enough to be timed; the first call is not counted."""
        jax.block_until_ready(call())
        start = time.perf_counter()
        jax.block_until_ready(call())
        count = max(1, int(least / max(time.perf_counter() - start, 1e-6)))
        taken = []
        for _ in range(rounds):
            start = time.perf_counter()
            results = [call() for _ in range(count)]
            jax.block_until_ready(results[-1])
            taken.append((time.perf_counter() - start) / count)
            del results
        return statistics.median(taken)


def versions(clock: Clock) -> Iterator[Row]:
    """The device, its memory and driver, and the versions of what runs on it."""
    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    row = dict(
        device=device.device_kind, platform=device.platform, memory_GiB=stats.get("bytes_limit", 0) / 2**30,
        python=platform.python_version(), jax=jax.__version__, jaxlib=jax.lib.__version__,
    )  # fmt: skip
    if flags := os.environ.get("XLA_FLAGS"):
        row["XLA_FLAGS"] = flags
    for package in ("flax", "optax", "numpy", "torch", "transformers"):
        row[package] = _version(package)
    if device.platform == "gpu":
        query = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
        row["nvidia_smi"] = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    yield row


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def ceilings(clock: Clock) -> Iterator[Row]:
    """What the device reaches where nothing else is to be done: a copy, and a product of bfloat16 matrices."""
    size, peak = sizes(), peak_flops(jax.devices()[0].device_kind)
    x = jnp.zeros(size.copied // 4, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    seconds = clock.seconds(lambda: copy(x))
    yield dict(what="copy", size=f"{size.copied / 2**20:.0f} MiB", reached=2 * size.copied / seconds / 1e9, unit="GB/s")
    a = jax.random.normal(jax.random.key(0), (size.product, size.product), jnp.bfloat16)
    product = jax.jit(lambda a: a @ a)
    reached = 2 * size.product**3 / clock.seconds(lambda: product(a))
    share = {"share of published": reached / peak} if peak else {}
    yield dict(what="bfloat16 product", size=f"{size.product}³", reached=reached / 1e12, unit="TFLOP/s") | share


def correctness(clock: Clock) -> Iterator[Row]:
    """Largest errors of every implementation against float64 on the host, whether they are within their bounds.

    Kernels in each type that they take, the others in float32.
    """
    from jax_entropy.bench.cases import CASES, errors

    for name, record in IMPLEMENTATIONS.items():
        if name not in available():
            needed = record.platforms if record.devices == ("",) else record.devices
            yield dict(case="all", implementation=name, right=f"not here: runs on {' and '.join(needed)}")
    kernels_first = sorted(available(), key=lambda name: name not in KERNELS)
    for name, case in itertools.product(kernels_first, CASES):
        operator, kernel = _operator(name), name in KERNELS
        if (kernel and case.largest > 5e8) or (name == "hopper" and case.position is not None):
            continue
        for dtype in KERNELS.get(name, (jnp.float32,)):
            if clock.left() < 0:
                return
            found = errors(case, operator, dtype, rounding=2**-23 if kernel else 0.0)
            row = dict(case=case.name, implementation=name, type=jnp.dtype(dtype).name)
            yield row | dict(right=not case.beyond(found, dtype)) | found


@functools.cache
def _operator(name: str) -> Callable:
    return functools.partial(attention, implementation=name)


def attention_table(clock: Clock) -> Iterator[Row]:
    """TFLOP/s of attention with its entropy, forward and backward, and the price of the entropy, beside cuDNN's.

    Causal, bfloat16; forward 4·B·N·T²·H/2 operations, backward 2.5 times that.
    """
    size = sizes()
    for H, N in size.heads:
        for T in size.contexts:
            B = max(size.tokens // T, 1)
            flops, arguments = 2 * B * N * T * T * H, _arguments(B, T, N, H)
            rows = {name: functools.partial(_ours, name) for name in available() if name != "dense" or T <= 2048}
            rows["cudnn" if jax.default_backend() == "gpu" else "xla"] = _library
            for name, contender in rows.items():
                if clock.left() < 0:
                    return
                row = dict(H=H, N=N, B=B, T=T, implementation=name)
                try:
                    row |= _rates(clock, contender, arguments, flops)
                except Exception as error:  # a contender that this device or version lacks is a row, too
                    row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
                yield row


def _arguments(B: int, T: int, N: int, H: int) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(0), 5)
    tensors = (jax.random.normal(key, (B, T, N, H), jnp.bfloat16) for key in keys[:4])
    return (*tensors, jax.random.normal(keys[4], (B, N, T)))


def _ours(name: str, q, k, v, *, entropy: bool) -> tuple:
    """out and the entropy, or out by what computes no entropy: kernels are told so, XLA sees it."""
    scale_NxT = jnp.full((q.shape[2], q.shape[1]), q.shape[3] ** -0.5)
    options = dict(with_entropy=entropy) if name in KERNELS else {}
    return IMPLEMENTATIONS[name].function(q, k, v, scale_NxT, 0, **options)[: 1 + entropy]


def _library(q, k, v, *, entropy: bool) -> tuple:
    implementation = "cudnn" if jax.default_backend() == "gpu" else "xla"
    return (jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation),)


def _rates(clock: Clock, contender: Callable, arguments: tuple, flops: float) -> Row:
    """TFLOP/s, and what the entropy and its gradient cost."""
    inputs = arguments[:3]

    def seconds(entropy: bool) -> tuple[float, float]:
        outputs = functools.partial(contender, entropy=entropy)
        forward, both = jax.jit(outputs), _backward(outputs)
        return clock.seconds(lambda: forward(*inputs)), clock.seconds(lambda: both(*arguments))

    ahead, both = seconds(entropy=True)
    backward = 2.5 * flops / (both - ahead) / 1e12 if both > ahead else "lost in the noise"
    row = {"forward TFLOP/s": flops / ahead / 1e12, "backward TFLOP/s": backward}
    row |= {"forward ms": 1e3 * ahead, "forward + backward ms": 1e3 * both}
    if contender is not _library:
        ahead_without, both_without = seconds(entropy=False)
        row |= {"forward, with the entropy / without": ahead / ahead_without, "both": both / both_without}
    return row


def _backward(outputs: Callable) -> Callable:
    """Outputs of q, k, v and, from the cotangents of out and the entropy, their gradients; compiled."""

    def both(q, k, v, *given):
        found, pull = jax.vjp(outputs, q, k, v)
        return found, pull(given[: len(found)])

    return jax.jit(both)


def step(clock: Clock) -> Iterator[Row]:
    """Tokens a second of whole training steps in bfloat16, with the penalty and without, and the share of the rate."""
    for context in sizes().step_contexts:
        for architecture in ("EReg(SM+LN+G)", "SM+LN+G"):
            if clock.left() < 10:
                return
            yield _step_row(clock, architecture, context)


def _step_row(clock: Clock, architecture: str, context: int) -> Row:
    size = sizes()
    model, state, train_step = _training(architecture, context, size.model, "bfloat16")
    batch = max(size.tokens // context, 1)
    tokens = jax.random.randint(jax.random.key(1), (batch, context + 1), 0, model.config.vocab_size)
    start = time.perf_counter()
    compiled = train_step.lower(state, tokens, False).compile()
    compile_seconds, seconds = time.perf_counter() - start, []
    for _ in range(22):
        start = time.perf_counter()
        state, metrics = jax.block_until_ready(compiled(state, tokens))
        seconds.append(time.perf_counter() - start)
        if clock.left() < 0:
            break
    rate = batch * context / statistics.median(seconds[2:] or seconds)
    row = dict(architecture=architecture, T=context, batch=batch, tokens_per_second=rate, loss=float(metrics["loss"]))
    if clock.left() > 0:
        row["data_wait"] = _data_wait(lambda state, tokens: compiled(state, tokens)[0], state, np.asarray(tokens))
    if peak := peak_flops(jax.devices()[0].device_kind):
        from jax_entropy.census import census

        row["mfu"] = rate * 3 * census(model.config).forward_flops / context / peak
    memory = compiled.memory_analysis()
    return row | dict(
        compile_seconds=compile_seconds, temporaries_GiB=memory.temp_size_in_bytes / 2**30 if memory else None
    )


def _data_wait(step: Callable, state: Any, rows: np.ndarray, steps: int = 20) -> float:
    """Share of the time that steps wait for their batches, read on the host and placed while the step before runs."""
    taken = []
    for fed in (False, True):
        resident, start = jax.device_put(rows), time.perf_counter()
        for _ in range(steps):
            state = step(state, jax.device_put(rows.copy()) if fed else resident)
        jax.block_until_ready(state)
        taken.append(time.perf_counter() - start)
    return max(0.0, 1 - taken[0] / taken[1])


def _training(architecture: str, context: int, fields: Row, dtype: str) -> tuple:
    from jax_entropy.config import default_config, model_config
    from jax_entropy.model import Transformer
    from jax_entropy.state import init_state, make_train_step

    config = default_config(architecture)
    config.model.update({name: value for name, value in fields.items() if name != "vocab_size"})
    config.model.update(context_length=context, bias="all")
    config.train.dtype = dtype
    model = Transformer(model_config(config, fields["vocab_size"]))
    state = jax.jit(functools.partial(init_state, config, model))()
    return model, state, jax.jit(make_train_step(config, model), static_argnums=2, donate_argnums=0)


def memory(clock: Clock) -> Iterator[Row]:
    """Temporaries of attention, forward and backward, against its context: what grows linearly, and what does not."""
    T = 1024 if sizes().longest > 1024 else 256
    while T <= sizes().longest and clock.left() > 0:
        *inputs, dout, dentropy = _arguments(1, T, 12, 64)
        row = dict(T=T)
        for name in available():
            if name == "dense" and T > 8192:
                continue

            compiled = _backward(functools.partial(_ours, name, entropy=True)).lower(*inputs, dout, dentropy).compile()
            row[f"{name} MiB"] = compiled.memory_analysis().temp_size_in_bytes / 2**20
        yield row
        T *= 2


def training(clock: Clock) -> Iterator[Row]:
    """Losses of 200 steps of a small model on this device beside the CPU's, both in float32, and how far they part."""
    steps = 200 if jax.default_backend() != "cpu" else 20
    tokens = _text(steps, batch=8, context=128, vocab_size=256)
    losses = {}
    for name, device in dict(device=jax.devices()[0], cpu=jax.local_devices(backend="cpu")[0]).items():
        with jax.default_device(device):
            fields = dict(num_layers=2, num_heads=2, model_dim=64, vocab_size=256)
            _, state, train_step = _training("EReg(SM(t)+ScFuFFN)", 128, fields, "float32")
            losses[name] = []
            for i in range(steps):
                state, metrics = train_step(state, jnp.asarray(tokens[i]), False)
                losses[name].append(metrics["loss"])
        losses[name] = np.asarray(jax.device_get(losses[name]))
    for i in (0, steps // 2, steps - 1):
        ours, theirs = float(losses["device"][i]), float(losses["cpu"][i])
        yield dict(step=i + 1, device=ours, cpu=theirs, relative_difference=abs(ours - theirs) / abs(theirs))


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
    from jax_entropy.bench.step import bench_step

    size = sizes()
    names = dict(layers=size.model["num_layers"], width=size.model["model_dim"], heads=size.model["num_heads"])
    model, shapes = names | dict(vocab_size=size.model["vocab_size"]), [(128, size.tokens // 128)]
    yield from bench_step(
        shapes, ("bfloat16",), rounds=5, peer_python=sys.executable, notify=lambda _: None, model=model, compiled=True
    )


PARTS = dict(
    versions=versions, ceilings=ceilings, correctness=correctness, attention=attention_table, step=step, memory=memory,
    training=training, peers=peers,
)  # fmt: skip


def main(part: str, seconds: float) -> None:
    """Prints the rows of a part as they are measured."""
    for row in PARTS[part](Clock(seconds)):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
