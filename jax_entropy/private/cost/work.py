"""What a private forward pass consists of, by kind of operation: products, and what is done element by element.

`linear` and `ciphertexts` turn it into the counts that a protocol's bytes are proportional to.
"""

import collections
import functools
import math
from typing import NamedTuple

from jax_entropy.architecture import ModelConfig
from jax_entropy.census import ACTIVATIONS, NORMS, PRODUCTS
from jax_entropy.private.engine.engine import Setting
from jax_entropy.private.program.nonlinear import at_once, halvings
from jax_entropy.private.program.tiles import Tiles


class Work(NamedTuple):
    """What one kind of operation is over all layers: equal parts, each of some products and some elementwise sizes.

    products: (rows, inner, columns). private: the right factors are the server's own weights. elements: numbers that go
    through what costs linearly; squared, multiplied, divided, scaled: through squares, products of two secrets, those
    within a quotient, and products with the server's numbers, for which CHEETAH fills ciphertexts. waits: what the
    rounds are proportional to.
    """

    parts: int
    products: tuple[tuple[int, int, int], ...] = ()
    private: bool = True
    elements: tuple[int, ...] = ()
    squared: tuple[int, ...] = ()
    multiplied: tuple[int, ...] = ()
    divided: int = 0
    scaled: int = 0
    waits: tuple[int, ...] = (1,)


def work(
    config: ModelConfig, num_tokens: int, plain: bool, protocol: str, logits: str, embedding: str = "shared"
) -> dict[str, list[Work]]:
    """The work of every kind in a forward pass, for the logits of "every" position or of the "last" one.

    Args:
      embedding: "shared", or "public": rows come in as the client looks them up, and a tied head is a public number.
    """
    T, D, F, V = num_tokens, config.model_dim, config.hidden_dim, config.vocab_size
    N, L = config.num_heads, config.num_layers
    ffn = L - config.ffn_free_layers
    linear = config.activation == "identity" and config.ffn != "bilinear"
    one_matrix = config.ffn == "fused" or (linear and not plain)
    joined = not plain and config.norm in ("none", "frozen") and not config.conv_width and (linear or not ffn)
    tempered = config.learnable_temperature
    alone = int(logits == "last" and not plain)  # blocks, the last one, that are for a single row behind its keys
    rows = [(L - alone, T), (alone, 1)]
    with_ffn = rows if ffn == L else [(ffn, T)]
    found: dict[str, list[Work]] = {"embedding": [Work(1, ((T, V, 2 * D if config.value_embedding else D),))]}
    if joined:
        found["projections"] = [Work(1, ((T, D, 3 * D),))]
        found["feed-forward"] = [Work(L - 1, ((T, 2 * D, 4 * D),)), Work(1, ((1 if alone else T, 2 * D, D),))]
    else:
        inner = (config.conv_width or 1) * D
        projections = ((T, inner, D),) * 3 if plain else ((T, inner, 3 * D),)
        branches = 2 if config.ffn == "bilinear" else 1
        up = ((D, F),) * branches if plain else ((D, branches * F),)
        shapes = ((D, D),) if one_matrix else (*up, (F, D))
        matrices = lambda T: tuple((T, *shape) for shape in shapes)  # noqa: E731
        found["projections"] = [Work(L, projections, waits=(len(projections),))]
        found["output projection"] = [Work(count, ((T, D, D),)) for count, T in rows]
        found["feed-forward"] = [Work(c, matrices(T), waits=(len(matrices(T)),)) for c, T in with_ffn if ffn]
        found["residual"] = [Work(c, elements=(T * D,), scaled=T * D) for c, T in with_ffn if ffn]
        sizes = [(count, T * F) for count, T in with_ffn if ffn]
        if config.ffn in PRODUCTS:
            found[PRODUCTS[config.ffn]] = [Work(c, elements=(size,), multiplied=(size,)) for c, size in sizes]
        if config.activation != "identity":
            found[ACTIVATIONS[config.activation]] = [
                Work(c, elements=(size,), squared=(size,), multiplied=(size,), scaled=size) for c, size in sizes
            ]
    if config.logit_cap:
        sizes = [exponentials(config, layer, T, plain, layer >= L - alone) for layer in range(L)]
        found["soft cap"] = [
            Work(sizes.count(size), elements=(size,), squared=(size,), multiplied=(size,)) for size in sorted({*sizes})
        ]
    if config.qk_norm:
        found["QK-norm"] = [Work(L, elements=(2 * T * D, 2 * T * N), multiplied=(2 * T * D,), scaled=T * N)]
    if config.rotary:
        found["rotation"] = [Work(L, elements=(3 * T * D,))]
    elif config.log_scale and (plain or not tempered):
        found["rotation"] = [Work(L, elements=(T * D,))]
    scaled = rows if tempered and not plain else []
    # a table of values beside those of layer 0 has a factor that is not in the matrices around attention
    scaled = [*scaled, (sum(config.embedded_values[1:]) * config.value_residual, T)]
    found["temperature"] = [Work(c, elements=(T * D,), scaled=T * D) for c, T in scaled]
    if plain:
        found |= _attention_as_written(config, T)
    else:
        windows = config.windows[: L - alone]
        each = [(_attention(config, windows.index(w), T, protocol), n) for w, n in collections.Counter(windows).items()]
        each.append((_attention_of_one(config, L - 1, T), alone))
        for kind in each[0][0]:
            found[kind] = [of[kind]._replace(parts=count) for of, count in each]
    final_rows = 1 if logits == "last" else T
    found["vocabulary"] = [Work(1, ((final_rows, D, V),))]
    if embedding == "public":
        found["embedding"] = []
        if config.tied_head:
            found["vocabulary"] = [Work(1, elements=(final_rows * V,))]
    for norm, kind in NORMS.items():
        counts = [(L, T), *with_ffn] if config.norm == norm else []
        counts += [(1, final_rows)] if config.final_norm == norm else []
        if norm == "tanh":
            of = lambda T: dict(elements=(T * D,), squared=(T * D,), multiplied=(T * D,), scaled=T * D)  # noqa: E731
        elif norm == "frozen":  # folded, unless the model is exported as it is written
            counts, of = counts if plain else [], lambda T: dict(elements=(T * D,), scaled=T * D)
        else:
            of = lambda T: dict(elements=(T * D, T), multiplied=(T * D,), scaled=T * D if plain else 0)  # noqa: E731
        found[kind] = [Work(count, **of(T)) for count, T in counts]
    found = {kind: [part for part in parts if part.parts] for kind, parts in found.items()}
    return {kind: parts for kind, parts in found.items() if parts}


def exponentials(config: ModelConfig, layer: int, num_tokens: int, plain: bool, alone: bool) -> int:
    """Of how many scores a layer takes the exponential; alone: for a single row."""
    N, S = config.num_heads, num_tokens + config.num_slots
    if plain:
        return N * num_tokens * S
    if alone:
        return N * (min(num_tokens, config.windows[layer]) + config.num_slots)
    tiles = Tiles.of(config, layer, num_tokens, packed=True)
    return N * sum(map(len, tiles.rows)) * tiles.height * tiles.width


def _attention_as_written(config: ModelConfig, T: int) -> dict[str, list[Work]]:
    """All blocks', whose softmax sees the whole square and divides each weight."""
    N, H, L, S = config.num_heads, config.head_dim, config.num_layers, T + config.num_slots
    divided = dict(scaled=N * T * S) if config.learnable_temperature else {}  # temperatures are the server's
    halved = math.ceil(math.log2(S)) if S > 1 else 0
    softmax = Work(
        L, elements=(N * T * S, N * T * (S - 1), N * T), squared=(N * T * S, N * T), multiplied=(N * T * S,),
        waits=(1, halved),
    )  # fmt: skip
    name = "power softmax" if config.power else "softmax"
    if config.power:
        softmax = _power(config, N * T * S, N * T)._replace(parts=L, divided=N * T * S)
    return {name: [softmax]} | dict(
        scores=[Work(L, ((T, H, S),) * N, False, (N * T * S,), **divided, waits=(1, N))],
        mix=[Work(L, ((T, S, H),) * N, False, waits=(1, N))],
    )


def _attention(config: ModelConfig, layer: int, T: int, protocol: str) -> dict[str, Work]:
    """A block's on all tokens: heads in groups, the softmax on tiles of what is seen."""
    N, H, D, S = config.num_heads, config.head_dim, config.model_dim, T + config.num_slots
    together = Setting(protocol=protocol).heads_at_once(N)
    groups, tiles = N // together, Tiles.of(config, layer, T, packed=True)
    in_a_row = [len(row) for row in tiles.rows]
    rows, most = sum(in_a_row) * tiles.height, max(in_a_row)  # of all tiles
    within = Compared.of(N * rows, tiles.width, halvings(tiles.width))
    across = Compared.of(N * T, most, at_once(most))
    return _softmax(config, N * rows * tiles.width, N * T, S, [within, across]) | dict(
        scores=Work(1, ((T, together * H, together * S),) * groups, False, waits=(groups,)),
        mix=Work(
            1, ((T, together * S, together * H),) * groups, False, multiplied=(T * D,), waits=(1, groups)
        ),
    )  # fmt: skip


def _attention_of_one(config: ModelConfig, layer: int, T: int) -> dict[str, Work]:
    """A block's for a single query, whose keys, within the layer's window, are all visible."""
    N, D, S = config.num_heads, config.model_dim, min(T, config.windows[layer]) + config.num_slots
    return _softmax(config, N * S, N, S, [Compared.of(N, S, at_once(S))]) | dict(
        scores=Work(1, ((S, D, N),), False),
        mix=Work(1, ((N, S, D),), False, multiplied=(D,), waits=(1, 1)),
    )


def _softmax(config: ModelConfig, seen: int, sums: int, T: int, maxima: "list[Compared]") -> dict[str, Work]:
    """Exponentials of so many scores, the comparisons for their rows' maxima, and so many sums' reciprocals."""
    if config.power:
        return {"power softmax": _power(config, seen, sums)}
    compared = map(sum, zip(*(maximum.sizes for maximum in maxima), strict=True))
    waits = map(sum, zip(*(maximum.waits for maximum in maxima), strict=True))
    lines = max(math.ceil(2 * math.log2(T)), 1)  # among which a reciprocal is found
    multiplied = (seen, 2 * sums, sums, sums, *(size for maximum in maxima for size in maximum.multiplied))
    squared, elements = (seen,), (seen, *compared, lines * sums, sums)
    return dict(softmax=Work(1, (), True, elements, squared, multiplied, waits=(1, *waits)))


def _power(config: ModelConfig, seen: int, sums: int) -> Work:
    """Powers of so many scores."""
    squarings = config.power.bit_length() - 2 + config.power.bit_count()  # and products, as many
    sizes = (squarings * seen, seen, sums)
    return Work(1, elements=sizes, squared=(sums,), multiplied=(seen,) * squarings, waits=(1, squarings))


class Compared(NamedTuple):
    """The work of so many maxima, by `nonlinear.largest`.

    sizes: halved; pairs, their bits' products and picks where all are compared. waits: levels of halves, those of all
    at once, and products of bits that wait for one another. multiplied: sizes of products of two secrets.
    """

    sizes: tuple[int, int, int, int]
    waits: tuple[int, int, int]
    multiplied: tuple[int, ...]

    @classmethod
    def of(cls, rows: int, size: int, groups: list[int]) -> "Compared":
        """Of so many rows' maxima over so many values."""
        halved = pairs = bits = picked = levels = at_once = 0
        products, depth = [], 0
        for group in groups:
            size = math.ceil(size / group)
            values = rows * size * group
            if group == 2:
                halved, levels = halved + rows * size, levels + 1
                continue
            left, pairs, picked, at_once = group - 1, pairs + values * (group - 1) // 2, picked + values, at_once + 1
            while left > 1:
                products.append(values * (left // 2))
                bits, depth, left = bits + products[-1], depth + 1, left - left // 2
            products.append(values)
        return cls((halved, pairs, bits, picked), (levels, at_once, depth), tuple(products))


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
SENT, BACK, BOTH = 486_300, 378_900, 1_351_800


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
        sent.append(sum(_multiplied_bytes(size, own) for size in work.multiplied))
    if work.divided:
        sent.append(_multiplied_bytes(work.divided, own))
    if work.scaled:
        sent.append(math.ceil(work.scaled / SLOTS) * own)
    return [work.parts * count for count in numbers], [work.parts * count for count in sent]


def _multiplied_bytes(size: int, own: int) -> float:
    """What a party sends, `own` for a ciphertext, in a product of so many pairs of secrets."""
    return math.ceil(size / 2 / SLOTS) * BOTH if size >= 2 * SLOTS else size * (2 / SLOTS * own + 16)


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
