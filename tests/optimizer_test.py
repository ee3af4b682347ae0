"""The optimiser by hand: schedules, what decays, clipping, and AdamW's own arithmetic."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from jax_entropy.config import default_config
from jax_entropy.errors import UserError
from jax_entropy.linear import effective_matrix
from jax_entropy.model import Transformer
from jax_entropy.optimizer import decay_mask, learning_rate_schedule, make_optimizer, qk_clip
from tests.tiny_model import ARCHITECTURES, random_tokens, scattered, shapes, tiny


def options(**fields):
    config = default_config("SM").optimizer
    config.update(learning_rate=0.2, end_learning_rate=0.02, **fields)
    return config


def by_hand(step, schedule, warmup, num_steps, peak=0.2, end=0.02):
    if step < warmup:
        return peak * step / warmup
    share = min((step - warmup) / (num_steps - warmup), 1)
    return {
        "linear": peak + (end - peak) * share,
        "cosine": end + (peak - end) * (1 + math.cos(math.pi * share)) / 2,
        "constant": peak,
    }[schedule]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize(("warmup", "steps"), [(0.05, 5), (0.0, 0), (7.0, 7), (1.0, 1), (0.004, 0)])
def test_learning_rates(schedule, warmup, steps):
    rate = learning_rate_schedule(options(schedule=schedule, warmup=warmup), 100)
    for step in (0, 1, 4, 5, 6, 7, 8, 50, 99, 100, 1000):
        assert float(rate(step)) == pytest.approx(by_hand(step, schedule, steps, 100), rel=1e-5, abs=1e-8), step


def test_the_papers_schedule():
    """5 % warm-up to 1e-3, linearly down to 1e-7 over 32,621 steps."""
    rate = learning_rate_schedule(default_config("SM").optimizer, 32_621)
    assert float(rate(0)) == 0
    assert float(rate(1631)) == pytest.approx(1e-3, rel=1e-5)
    assert float(rate((1631 + 32_621) // 2)) == pytest.approx(5e-4, rel=1e-3)
    assert float(rate(32_621)) == pytest.approx(1e-7, rel=1e-2)


@pytest.mark.parametrize(
    ("fields", "num_steps", "message"),
    [
        (dict(warmup=100.0), 100, "warmup=100.0 leaves none of the 100 steps"),
        (dict(warmup=2000.0), 100, "warmup=2000.0"),
        (dict(warmup=0.999), 100, "warmup=0.999"),
        (dict(schedule="cosin"), 100, "schedule='cosin' is not known; did you mean 'cosine'"),
    ],
)
def test_schedules_that_cannot_work(fields, num_steps, message):
    with pytest.raises(UserError, match=message):
        learning_rate_schedule(options(**fields), num_steps)


DECAYED = {"kernel", "token_embedding", "position_embedding", "value_embedding", "head"}


@pytest.mark.parametrize("fields", [{}, dict(bias="all", tied_head=False)])
def test_matrices_and_embeddings_decay_and_nothing_else(fields):
    for name in ARCHITECTURES:
        params = shapes(tiny(name, **fields))["params"]
        mask = flatten_dict(decay_mask(params))
        assert mask.keys() == flatten_dict(params).keys(), name
        decayed = {path for path, decays in mask.items() if decays}
        assert decayed == {path for path in mask if path[-1] in DECAYED}, name
        assert decayed >= {("token_embedding",), ("position_embedding",)}, name
        layers = [stack for stack in ("blocks", "blocks_without_ffn") if stack in params]
        projections = {(s, "attention", p, "kernel") for s in layers for p in ("query", "key", "value", "out")}
        assert decayed >= projections, name


def test_a_decay_without_gradient_shrinks_what_decays():
    params = {"kernel": jnp.ones(3), "bias": jnp.ones(3), "threshold": jnp.ones(3), "head": jnp.ones(3)}
    optimizer = make_optimizer(options(schedule="constant", warmup=0.0, weight_decay=0.1), 10)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    for name, update in updates.items():
        np.testing.assert_allclose(update, -0.2 * 0.1 if name in ("kernel", "head") else 0, rtol=1e-6)


@pytest.mark.parametrize(("clip_norm", "expected"), [(1.0, 1.0), (0.5, 0.5), (100.0, 10.0), (0.0, 10.0)])
def test_clipping_is_by_the_norm_of_all_gradients(clip_norm, expected):
    gradients = {"kernel": jnp.full(50, 1.0), "bias": jnp.full(50, -1.0)}
    optimizer = make_optimizer(options(clip_norm=clip_norm, beta1=0.9), 10)
    _, state = optimizer.update(gradients, optimizer.init(gradients), gradients)
    moments = optax.tree_utils.tree_get(state, "mu")
    assert float(optax.global_norm(moments)) == pytest.approx(0.1 * expected, rel=1e-5)


def test_adamw_by_hand():
    fields = dict(beta1=0.8, beta2=0.95, epsilon=1e-3, weight_decay=0.3, clip_norm=0.0, warmup=0.2)
    optimizer = make_optimizer(options(**fields), 10)
    rng = np.random.default_rng(0)
    p = rng.standard_normal(5)
    params, m, v = {"kernel": jnp.asarray(p, jnp.float32)}, np.zeros(5), np.zeros(5)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for step in range(6):
        g = rng.standard_normal(5)
        updates, state = update({"kernel": jnp.asarray(g, jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g**2
        adam = m / (1 - 0.8 ** (step + 1)) / (np.sqrt(v / (1 - 0.95 ** (step + 1))) + 1e-3)
        p = p - by_hand(step, "linear", 2, 10) * (adam + 0.3 * p)
        np.testing.assert_allclose(params["kernel"], p, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["SM+ScFuFFN+Mem2^1", "SM+WNorm(QK)^1"])
def test_qk_clip_scales_queries_and_keys_of_a_head_and_nothing_else(name):
    """By the root of what its logits exceed the limit by, in either stack of layers, whatever gives the matrix."""
    before = scattered(tiny(name, num_heads=2))["params"]
    largest_LxN = jnp.array([[50.0, 4.0], [100.0, 25.0]])
    after, factor_LxN = qk_clip(before, largest_LxN, 25.0)
    np.testing.assert_array_equal(factor_LxN, [[0.5, 1], [0.25, 1]])
    for stack, factor_N in (("blocks", factor_LxN[0]), ("blocks_without_ffn", factor_LxN[1])):
        for side in ("query", "key"):
            old, new = (
                {k: np.asarray(v[0]) for k, v in params[stack]["attention"][side].items()} for params in (before, after)
            )
            matrices = [effective_matrix(x["kernel"].reshape(16, 16), x.get("gain"), None) for x in (old, new)]
            scale_O = np.repeat(np.sqrt(factor_N), 8)
            np.testing.assert_allclose(matrices[1], matrices[0] * scale_O[None], rtol=1e-6)
            np.testing.assert_allclose(new["bias"].ravel(), old["bias"].ravel() * scale_O, rtol=1e-6)
        if "Mem2" in name:
            old, new = (params[stack]["attention"]["slot_key"] for params in (before, after))
            np.testing.assert_allclose(new, old * np.sqrt(factor_N)[None, None, :, None], rtol=1e-6)
    pairs = zip(*(flatten_dict(params, sep="/").items() for params in (before, after)), strict=True)
    changed = {path for (path, old), (_, new) in pairs if not np.array_equal(old, new)}
    assert all(path.split("/attention/")[1].startswith(("query/", "key/", "slot_key")) for path in changed)


def test_qk_clip_of_normalised_queries_and_keys_scales_their_scalar():
    """What is done to their matrices the norm undoes; learned keys, which it does not touch, follow all the same."""
    config = tiny("SM+QKN+Mem2", attention="dense")
    variables, tokens = scattered(config), random_tokens(2, 9)
    largest = jax.jit(
        lambda params: Transformer(config).apply({"params": params}, tokens)[1].stats.max_logit.max((1, 3))
    )
    before_LxN = largest(variables["params"])
    params, factor_LxN = qk_clip(variables["params"], before_LxN, limit := 0.5 * float(before_LxN.min()))
    np.testing.assert_allclose(factor_LxN, limit / before_LxN, rtol=1e-6)
    np.testing.assert_allclose(largest(params)[0], limit, rtol=1e-5)  # later layers read what this one says
    assert not [
        path for path, old in flatten_dict(variables["params"], sep="/").items()
        if not path.endswith("qk_gain") and not np.array_equal(old, flatten_dict(params, sep="/")[path])
    ]  # fmt: skip
