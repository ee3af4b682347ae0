"""The parts of `bench device` about attention alone: its errors, its rates and its memory."""

import functools
import itertools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from jax_entropy.attention import IMPLEMENTATIONS, attention, available
from jax_entropy.bench.cases import CASES, errors
from jax_entropy.bench.sizes import Clock, Row, sizes

KERNELS = {"gpu": (jnp.float32, jnp.bfloat16), "hopper": (jnp.bfloat16,)}  # and the types that they are tried in


def correctness(clock: Clock) -> Iterator[Row]:
    """Largest errors of every implementation against float64 on the host, whether they are within their bounds.

    Kernels in each type that they take, the others in float32.
    """
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
            row = dict(case=case.name, implementation=name, type=jnp.dtype(dtype).name)
            try:
                found = errors(case, operator, dtype, rounding=2**-23 if kernel else 0.0)
            except Exception as error:  # one that a compiler refuses is a finding, and others are to come
                yield row | dict(right=_said(error))
            else:
                yield row | dict(right=not case.beyond(found, dtype)) | found


@functools.cache
def _operator(name: str) -> Callable:
    return functools.partial(attention, implementation=name)


def attention_table(clock: Clock) -> Iterator[Row]:
    """TFLOP/s of attention with its entropy, forward and backward, and the price of the entropy, beside cuDNN's.

    Causal, bfloat16; forward 4·B·N·T²·H/2 operations, backward 2.5 times that. Seconds are those of kernels.
    """
    size, gpu = sizes(), jax.default_backend() == "gpu"
    ours = [name for name in reversed(available()) if name in KERNELS or not gpu]
    contenders = {name: functools.partial(_ours, name) for name in ours[:1]}
    contenders["cudnn" if gpu else "xla"] = _library  # beside the one that `auto` takes, and then the others
    contenders |= {name: functools.partial(_ours, name) for name in ours[1:]}
    first, others = list(contenders)[:2], list(contenders)[2:]
    for names, (H, N), T in itertools.chain(
        *(itertools.product([n], size.heads, size.contexts) for n in (first, others))
    ):
        B = max(size.tokens // T, 1)
        flops, arguments = 2 * B * N * T * T * H, _arguments(B, T, N, H)
        for name in names:
            if clock.left() < 0:
                return
            row = dict(H=H, N=N, B=B, T=T, implementation=name)
            try:
                row |= _rates(clock, contenders[name], arguments, flops, priced=T in size.priced)
            except Exception as error:  # a contender that this device or version lacks is a row, too
                row["failed"] = _said(error)
            yield row


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"


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


def _rates(clock: Clock, contender: Callable, arguments: tuple, flops: float, priced: bool) -> Row:
    """TFLOP/s, and what the entropy and its gradient cost."""
    inputs = arguments[:3]

    def seconds(entropy: bool) -> tuple[float, float]:
        outputs = functools.partial(contender, entropy=entropy)
        forward, both = jax.jit(outputs), _backward(outputs)
        return clock.on_device(lambda: forward(*inputs)), clock.on_device(lambda: both(*arguments))

    ahead, both = seconds(entropy=True)
    backward = 2.5 * flops / (both - ahead) / 1e12 if both > ahead else "lost in the noise"
    row = {"forward TFLOP/s": flops / ahead / 1e12, "backward TFLOP/s": backward}
    row |= {"forward ms": 1e3 * ahead, "forward + backward ms": 1e3 * both}
    if priced and contender is not _library:
        ahead_without, both_without = seconds(entropy=False)
        row |= {"forward, with the entropy / without": ahead / ahead_without, "both": both / both_without}
    return row


def _backward(outputs: Callable) -> Callable:
    """Outputs of q, k, v and, from the cotangents of out and the entropy, their gradients; compiled."""

    def both(q, k, v, *given):
        found, pull = jax.vjp(outputs, q, k, v)
        return found, pull(given[: len(found)])

    return jax.jit(both)


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
