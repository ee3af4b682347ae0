"""Bytes and rounds of a forward pass predicted from its shape, by coefficients fitted to measured small ones.

Each kind of operation has a few counts that its cost is linear in; coefficients are data, in costs.json.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from jax_entropy.architecture import ModelConfig
from jax_entropy.errors import UserError
from jax_entropy.private.attention import tile_edge
from jax_entropy.private.engine import Account, Setting
from jax_entropy.private.ledger import Profile, add

_FILE = Path(__file__).with_name("costs.json")
# What is measured for the coefficients, every architecture on every shape, plain and optimised.
ARCHITECTURES = (
    ("SM+LN+G", {}), ("SM+LN+G", dict(activation="gelu_tanh")), ("SM+R", {}), ("SM+LN", {}),
    ("EReg(SM(t)+ScFuFFN)", {}), ("SM+RN+LR(0.01)", dict(final_norm="rms")),
)  # fmt: skip
SHAPES = tuple(
    dict(num_layers=L, num_heads=N, model_dim=D, context_length=T, vocab_size=V)
    for L, N, D, T, V in ((1, 2, 32, 16, 64), (1, 4, 32, 32, 96), (2, 2, 64, 32, 64), (1, 3, 48, 64, 128))
)


def counts(config: ModelConfig, num_tokens: int, plain: bool) -> dict[str, tuple[list[float], list[float]]]:
    """What the bytes and the rounds of every kind are linear in, over all layers."""
    T, D, N, H, F, V = (
        num_tokens, config.model_dim, config.num_heads, config.head_dim, config.hidden_dim, config.vocab_size,
    )  # fmt: skip
    L, ffn = config.num_layers, config.num_layers - config.ffn_free_layers
    linear = config.activation == "identity"
    one_matrix = config.ffn == "fused" or (linear and not plain)
    b = T if plain else tile_edge(T)
    n = T // b
    tiles = n * (n + 1) // 2
    halvings = math.ceil(math.log2(b)) + math.ceil(math.log2(n)) if T > 1 else 0
    compared = tiles * b * (b - 1) + n * b * (n - 1)
    found = {
        "embedding": _products([(T, V, D)], plain),
        "projections": _products(L * ([(T, D, D)] * 3 if plain else [(T, D, 3 * D)]), plain),
        "scores": ([L * N * T * H, L * N * T * T], [L, L * N]),
        "softmax": ([L * N * tiles * b * b, L * N * compared, L * N * T], [L, L * halvings]),
        "mix": ([L * N * T * H, L * N * T * T], [L, L * N]),
        "output projection": _products(L * [(T, D, D)], plain),
        "vocabulary": _products([(T, D, V)], plain),
    }
    if ffn:
        found["feed-forward"] = _products(ffn * ([(T, D, D)] if one_matrix else [(T, D, F), (T, F, D)]), plain)
        found["residual"] = ([ffn * T * D], [ffn])
    for norm, kind in (("layer", "LayerNorm"), ("rms", "RMSNorm")):
        if norms := (L + ffn) * (config.norm == norm) + (config.final_norm == norm):
            found[kind] = ([norms * T * D, norms * T], [norms])
    if config.learnable_temperature and not plain:
        found["temperature"] = ([L * T * D], [L])
    names = {"gelu": "GELU", "gelu_tanh": "GELU (tanh)", "relu": "ReLU", "leaky_relu": "leaky ReLU"}
    if not linear and ffn:
        found[names[config.activation]] = ([ffn * T * F], [ffn])
    return found


def _products(shapes: list[tuple[int, int, int]], plain: bool) -> tuple[list[float], list[float]]:
    """Inputs, outputs, and weights where these are opened at each use."""
    read, written = sum(T * i for T, i, _ in shapes), sum(T * o for T, _, o in shapes)
    return [read, written, *([sum(i * o for _, i, o in shapes)] if plain else [])], [len(shapes)]


def weights_opened_once(config: ModelConfig) -> int:
    """Elements of the matrices of an optimised export; each is opened once, 8 bytes a party, under SEMI2K."""
    D, F, V, L = config.model_dim, config.hidden_dim, config.vocab_size, config.num_layers
    ffn = D * D if config.ffn == "fused" or config.activation == "identity" else 2 * D * F
    return 2 * V * D + L * 4 * D * D + (L - config.ffn_free_layers) * ffn


def _key(kind: str, config: ModelConfig, plain: bool) -> str:
    """Costs that differ in more than counts: what a kind does depends on the architecture."""
    variant = ""
    if kind == "residual":
        variant = f" {config.ffn != 'full'}"
    if kind == "scores" and plain:
        variant = f" {config.learnable_temperature}"
    return f"{kind}{variant} {'plain' if plain else 'optimised'}"


def fit(measured: Iterable[tuple[ModelConfig, Profile]]) -> dict[str, Any]:
    """Coefficients by kind from warm profiles of one setting, by least squares; {} holds nothing yet."""
    rows: dict[str, list] = {}
    for config, profile in measured:
        for kind, account in profile.by_kind().items():
            of_bytes, of_rounds = counts(config, profile.num_tokens, profile.plain)[kind]
            rows.setdefault(_key(kind, config, profile.plain), []).append((of_bytes, of_rounds, account))
    coefficients = {}
    for key, found in rows.items():
        byte_counts, round_counts = (np.array([row[i] for row in found], np.float64) for i in (0, 1))
        scale = 1 / np.array([max(np.mean(account.bytes), 1) for _, _, account in found])  # relative errors
        by_bytes, *_ = np.linalg.lstsq(
            byte_counts * scale[:, None], np.array([np.mean(a.bytes) for *_, a in found]) * scale, rcond=1e-9
        )
        by_rounds, *_ = np.linalg.lstsq(round_counts, np.array([a.rounds for *_, a in found], np.float64), rcond=1e-9)
        coefficients[key] = dict(bytes=by_bytes.tolist(), rounds=by_rounds.tolist())
    return coefficients


def is_known(setting: Setting) -> bool:
    """Whether coefficients of a setting came with the package."""
    return _name(setting) in json.loads(_FILE.read_text())


def read_costs(setting: Setting) -> dict[str, Any]:
    """The coefficients that came with the package. Raises UserError for a setting that was not measured."""
    all_costs = json.loads(_FILE.read_text())
    if (name := _name(setting)) not in all_costs:
        raise UserError(
            f"no coefficients for {name}; measured were {', '.join(all_costs)}, and `jax-entropy private profile` "
            "measures any model"
        )
    return all_costs[name]


def write_costs(setting: Setting, coefficients: dict[str, Any]) -> None:
    """Puts a setting's coefficients beside those of others."""
    all_costs = json.loads(_FILE.read_text()) if _FILE.exists() else {}
    _FILE.write_text(json.dumps(all_costs | {_name(setting): coefficients}, indent=1, sort_keys=True) + "\n")


def _name(setting: Setting) -> str:
    return f"{setting.protocol} {setting.fraction_bits} bits {setting.exponent} {setting.exponent_iterations}"


def predict(
    config: ModelConfig, num_tokens: int, setting: Setting, plain: bool = False, costs: dict[str, Any] | None = None
) -> dict[str, Account]:
    """Bytes of each party (their mean) and rounds of a warm forward pass by kind; seconds are not predicted (0).

    Raises UserError for a kind of operation, or a setting, that was not measured, and for a single head, which the
    engine's compiler treats otherwise.
    """
    if config.num_heads == 1:
        raise UserError(
            "the cost model is for two heads or more; measure a model of one with `jax-entropy private profile`"
        )
    costs, predicted = read_costs(setting) if costs is None else costs, {}
    for kind, (of_bytes, of_rounds) in counts(config, num_tokens, plain).items():
        if (key := _key(kind, config, plain)) not in costs:
            raise UserError(f"{kind} of {config} was not measured for the cost model under {setting.protocol}")
        sent = max(round(float(np.dot(costs[key]["bytes"], of_bytes))), 0)
        rounds = max(round(float(np.dot(costs[key]["rounds"], of_rounds))), 0)
        predicted[kind] = Account(0.0, (sent,) * setting.num_parties, (0,) * setting.num_parties, rounds)
    return predicted


def predict_total(config: ModelConfig, num_tokens: int, setting: Setting, plain: bool = False) -> Account:
    """The sum over kinds."""
    return add(predict(config, num_tokens, setting, plain).values())
