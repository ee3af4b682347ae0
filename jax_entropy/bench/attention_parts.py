"""The parts of `bench device` about attention alone: its errors, its rates and its memory."""

import functools
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp

from jax_entropy.attention import IMPLEMENTATIONS, attention, available
from jax_entropy.bench.cases import CASES, errors
from jax_entropy.bench.sizes import Clock, Row, sizes

KERNELS = {"gpu": (jnp.float32, jnp.bfloat16), "hopper": (jnp.bfloat16,)}  # and the types that they are tried in
_WAYS = ("forward", "both")


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
    ours.insert(1, "cudnn" if gpu else "xla")  # beside the one that `auto` takes, and then the others
    rows = [
        dict(H=H, N=N, B=max(size.tokens // T, 1), T=T, implementation=name)
        for names in (ours[:2], ours[2:])
        for H, N in size.heads
        for T in size.contexts
        for name in names
    ]
    with ThreadPoolExecutor(4) as pool:  # a card's kernels compile while others are timed; a CPU has no time for both
        for row, programs in zip(rows, (pool.map if gpu else map)(_programs, rows), strict=True):
            if clock.left() < 0:
                pool.shutdown(cancel_futures=True)
                return
            try:  # a contender that this device or version lacks is a row, too
                yield row | (dict(failed=programs) if isinstance(programs, str) else _rates(clock, row, programs))
            except Exception as error:
                yield row | dict(failed=_said(error))


def _programs(row: Row) -> dict[tuple[str, bool], Callable] | str:
    """Forward, and both ways, with the entropy and, for some contexts, without; or why they cannot be compiled."""
    name, arguments = row["implementation"], jax.eval_shape(lambda: _arguments(row["B"], row["T"], row["N"], row["H"]))
    contender = functools.partial(_ours, name) if name in IMPLEMENTATIONS else _library
    priced = name in IMPLEMENTATIONS and row["T"] in sizes().priced
    programs = {}
    try:
        for entropy in (True, False) if priced else (True,):
            outputs = functools.partial(contender, entropy=entropy)
            programs["forward", entropy] = jax.jit(outputs).lower(*arguments[:3]).compile()
            programs["both", entropy] = _backward(outputs).lower(*arguments).compile()
    except Exception as error:
        return _said(error)
    return programs


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


def _rates(clock: Clock, row: Row, programs: dict[tuple[str, bool], Callable]) -> Row:
    """TFLOP/s, and what the entropy and its gradient cost."""
    arguments, seconds = _arguments(row["B"], row["T"], row["N"], row["H"]), {}
    for (way, entropy), program in programs.items():
        given = arguments[:3] if way == "forward" else arguments
        seconds[way, entropy] = clock.on_device(lambda program=program, given=given: program(*given))
    flops, ahead, both = 2 * row["B"] * row["N"] * row["T"] ** 2 * row["H"], *(seconds[way, True] for way in _WAYS)
    backward = 2.5 * flops / (both - ahead) / 1e12 if both > ahead else "lost in the noise"
    rates = {"forward TFLOP/s": flops / ahead / 1e12, "backward TFLOP/s": backward}
    rates |= {"forward ms": 1e3 * ahead, "forward + backward ms": 1e3 * both}
    if ("both", False) in seconds:
        price = {way: seconds[way, True] / seconds[way, False] for way in _WAYS}
        rates |= {"forward, with the entropy / without": price["forward"], "both": price["both"]}
    return rates


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
