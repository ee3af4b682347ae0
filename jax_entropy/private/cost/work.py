"""What a private forward pass consists of, by kind of operation: products, and what is done element by element.

`linear` and `ciphertexts` turn it into the counts that a protocol's bytes are proportional to.
"""

import functools
import math
from typing import NamedTuple

from jax_entropy.architecture import ModelConfig
from jax_entropy.census import ACTIVATIONS, NORMS, PRODUCTS
from jax_entropy.private.program.attention import tile_edge


class Work(NamedTuple):
    """What one kind of operation is over all layers: equal parts, each of some products and some elementwise sizes.

    products: (rows, inner, columns). private: the right factors are the server's own weights. elements: numbers that go
    through what costs linearly; squared, multiplied, scaled: through squares, products of two secrets, and those with
    the server's numbers, for which CHEETAH fills ciphertexts. waits: what the rounds are proportional to.
    """

    parts: int
    products: tuple[tuple[int, int, int], ...] = ()
    private: bool = True
    elements: tuple[int, ...] = ()
    squared: tuple[int, ...] = ()
    multiplied: int = 0
    scaled: int = 0
    waits: tuple[int, ...] = (1,)


def work(config: ModelConfig, num_tokens: int, plain: bool) -> dict[str, Work]:
    """The work of every kind in a forward pass."""
    T, D, N, H, F, V = (
        num_tokens, config.model_dim, config.num_heads, config.head_dim, config.hidden_dim, config.vocab_size,
    )  # fmt: skip
    L, ffn = config.num_layers, config.num_layers - config.ffn_free_layers
    linear = config.activation == "identity" and config.ffn != "bilinear"
    one_matrix = config.ffn == "fused" or (linear and not plain)
    b = T if plain else tile_edge(T)
    n = T // b
    tiles = n * (n + 1) // 2
    halvings = math.ceil(math.log2(b)) + math.ceil(math.log2(n)) if T > 1 else 0
    compared, seen = tiles * b * (b - 1) + n * b * (n - 1), N * tiles * b * b
    tempered = config.learnable_temperature
    taps = config.conv_width or 1
    projections = ((T, taps * D, D),) * 3 if plain else ((T, taps * D, 3 * D),)
    divided = dict(squared=(N * T * T,), multiplied=N * T * T) if tempered and plain else {}
    matrices = ((T, D, D),) if one_matrix else ((T, D, F), (T, F, D))
    if config.ffn == "bilinear":
        matrices = ((T, D, F), (T, D, F), (T, F, D)) if plain else ((T, D, 2 * F), (T, F, D))
    found = {
        "embedding": Work(1, ((T, V, D),)),
        "projections": Work(L, projections, waits=(len(projections),)),
        "scores": Work(L, ((T, H, T),) * N, False, (N * T * T,) if plain else (), **divided, waits=(1, N)),
        "mix": Work(L, ((T, T, H),) * N, False, multiplied=0 if plain else T * D, waits=(1, N)),
        "output projection": Work(L, ((T, D, D),)),
        "vocabulary": Work(1, ((T, D, V),)),
    }
    if config.power:
        squarings = config.power.bit_length() - 2 + config.power.bit_count()  # and products, as many
        found["power softmax"] = Work(
            L, elements=(squarings * seen, seen, N * T), squared=(squarings * seen, N * T),
            multiplied=seen if plain else 0, waits=(1, squarings),
        )  # fmt: skip
    else:
        found["softmax"] = Work(
            L,
            elements=(seen, N * compared, N * T),
            squared=(seen, N * T),
            multiplied=seen if plain else 0,
            waits=(1, halvings),
        )
    if config.logit_cap:
        size = N * T * T
        found["soft cap"] = Work(L, elements=(size,), squared=(size,), multiplied=size)
    if config.qk_norm:
        found["QK-norm"] = Work(L, elements=(2 * T * D, 2 * T * N), multiplied=2 * T * D, scaled=T * N)
    if ffn:
        found["feed-forward"] = Work(ffn, matrices, waits=(len(matrices),))
        found["residual"] = Work(ffn, elements=(T * D,), scaled=T * D)
    for norm, kind in NORMS.items():
        if norms := (L + ffn) * (config.norm == norm) + (config.final_norm == norm):
            found[kind] = Work(norms, elements=(T * D, T), multiplied=T * D, scaled=T * D if plain else 0)
            if norm == "tanh":
                found[kind] = Work(norms, elements=(T * D,), squared=(T * D,), multiplied=T * D, scaled=T * D)
            if norm == "frozen":
                found[kind] = Work(norms, elements=(T * D,), scaled=T * D)
                if not plain:
                    del found[kind]
    if config.rotary:
        found["rotation"] = Work(L, elements=(2 * T * D,))
    if tempered and not plain:
        found["temperature"] = Work(L, elements=(T * D,), scaled=T * D)
    if config.ffn in PRODUCTS and ffn:
        found[PRODUCTS[config.ffn]] = Work(ffn, elements=(T * F,), multiplied=T * F)
    if config.activation != "identity" and ffn:
        size, kind = T * F, ACTIVATIONS[config.activation]
        found[kind] = Work(ffn, elements=(size,), squared=(size,), multiplied=size, scaled=size)
    return found


def linear(work: Work, plain: bool) -> list[float]:
    """Counts for protocols whose bytes are linear in sizes (SEMI2K, ABY3).

    Factors that are opened, results that are truncated, weights that are opened at each use, and elements.
    """
    read = sum(rows * inner + (0 if work.private else inner * columns) for rows, inner, columns in work.products)
    written = sum(rows * columns for rows, _, columns in work.products)
    weights = sum(inner * columns for _, inner, columns in work.products) if plain and work.private else 0
    counts = [read, written, weights] if work.products else []
    return [work.parts * count for count in (*counts, *work.elements)]


# CHEETAH's ciphertexts have 8192 slots. Bytes measured of those that go out encrypted (their random half as a seed) and
# those that come back, in products of matrices and of elements, and of both ways of a product of two secrets.
SLOTS = 8192
MATRIX_SENT, MATRIX_BACK, MATRIX_RESULT = 184_985, 254_300, 16.8
SENT, BACK, BOTH = 643_800, 501_700, 1_789_750


def ciphertexts(work: Work, party: int) -> tuple[list[float], list[float]]:
    """Counts for CHEETAH, of the client (0) or the server (1): numbers compared and truncated; bytes of ciphertexts.

    The server encrypts what is squared in one ciphertext, and what its own numbers scale. What is smaller than two
    ciphertexts is multiplied with random numbers of earlier products, 2 for each element, and then opened (16 bytes).
    """
    own, other = (SENT, BACK) if party else (BACK, SENT)
    numbers, sent = [], []
    if work.products:
        sides = (0,) if work.private else (0, 1)  # whose left factor it is
        numbers.append(sum(rows * columns for rows, _, columns in work.products))
        sent.append(sum(_matrix_bytes(shape, side, party) for shape in work.products for side in sides))
    numbers += work.elements
    for size in work.squared:
        sent.append(own if size <= SLOTS else math.ceil(size / 2 / SLOTS) * (own + other))
    if work.multiplied:
        m = work.multiplied
        sent.append(math.ceil(m / 2 / SLOTS) * BOTH if m >= 2 * SLOTS else m * (2 / SLOTS * own + 16))
    if work.scaled:
        sent.append(math.ceil(work.scaled / SLOTS) * own)
    return [work.parts * count for count in numbers], [work.parts * count for count in sent]


def blocks(shape: tuple[int, int, int]) -> tuple[int, ...]:
    """How many tiles a product has along each size."""
    return tuple(math.ceil(size / tile) for size, tile in zip(shape, _tiles(shape), strict=True))


def _matrix_bytes(shape: tuple[int, int, int], left: int, party: int) -> int:
    """What a party sends in a product of one's left factor with the other's right one; the smaller is encrypted."""
    rows, inner, columns = blocks(shape)
    encrypts = left if rows < columns else 1 - left
    if party == encrypts:
        return MATRIX_SENT * min(rows, columns) * inner
    if rows * columns == 1:  # the result is not packed: of one half of its ciphertext, what is needed
        return round(MATRIX_BACK / 2 + MATRIX_RESULT * shape[0] * shape[2])
    return MATRIX_BACK * math.ceil(rows * columns / _tiles(shape)[1])


@functools.cache
def _tiles(shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """How the engine cuts a product: into the fewest ciphertexts, each a tile; its inner size is a power of 2."""
    best = None
    for rows in range(1, min(SLOTS, shape[0]) + 1):
        inner = 1
        while inner <= shape[1] and rows * inner <= SLOTS:
            columns = min(shape[2], SLOTS // rows // inner)
            blocks = [math.ceil(size / tile) for size, tile in zip(shape, (rows, inner, columns), strict=True)]
            sent, back = min(blocks[0], blocks[2]) * blocks[1], math.ceil(blocks[0] * blocks[2] / inner)
            rotations = math.ceil(shape[0] * shape[2] / SLOTS) * inner
            cost = (sent + back) * 1000 + rotations + math.prod(blocks) / 10
            if best is None or cost <= best[0]:
                best = cost, (rows, inner, columns)
            inner *= 2
    return best[1]
