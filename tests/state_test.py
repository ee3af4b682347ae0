"""One step of training: what it changes, what it reports, and that batches accumulate to the large batch's step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_entropy.config import model_config
from jax_entropy.errors import UserError
from jax_entropy.loss import loss_fn
from jax_entropy.model import Transformer
from jax_entropy.optimizer import make_optimizer
from jax_entropy.seeds import random_key
from jax_entropy.state import abstract_state, init_state, make_train_step
from tests.tiny_model import changed, random_tokens, run_config

EREG, SPECTRAL = "EReg(SM(t)+ScFuFFN^1)", "EReg(SM+LN+LR(global)+SNorm(QKVO+FFN)+ScFFN)"


def model_of(config):
    return Transformer(model_config(config, 61))


@functools.cache
def start(architecture=EREG, seed=1337):
    config = run_config(architecture, seed=seed)
    return jax.jit(functools.partial(init_state, config, model_of(config)))()


def step_of(config):
    return jax.jit(make_train_step(config, model_of(config)), static_argnums=2)


def assert_close(one, two, rtol=1e-5, atol=1e-6):
    one, two = jax.tree_util.tree_leaves_with_path(one), jax.tree_util.tree_leaves_with_path(two)
    assert [path for path, _ in one] == [path for path, _ in two]
    for (path, a), (_, b) in zip(one, two, strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol, err_msg=jax.tree_util.keystr(path))


def test_batches_accumulate_to_the_step_of_one_large_batch():
    tokens = random_tokens(12, 17)
    large, metrics = step_of(run_config(EREG))(start(), tokens, True)
    for accumulate in (3, 12):
        state, accumulated = step_of(run_config(EREG, **{"optimizer.accumulate": accumulate}))(start(), tokens, True)
        assert_close(state, large)
        assert_close(accumulated, metrics)


@pytest.mark.parametrize("architecture", [
    "EReg(SM(t,log)+RN+LR(layer)+WNorm(QKVO+FFN)+ScFFN+Conv4+QKN+RoPE+Cap(30)+VRes+VEmb+Mem8+Win(SL,8)^1)",
    "PSM(4)+DyT+SReparam(QKVO+FFN)+BiFFN",
])  # fmt: skip
def test_gradients_of_every_part_accumulate(architecture):
    """Traced only: where JAX cannot add a gradient to the sum that is kept, as of taps[j], it fails then."""
    config = run_config(architecture, **{"optimizer.accumulate": 2})
    step = functools.partial(make_train_step(config, model_of(config)), watch=False)
    state, _ = jax.eval_shape(step, abstract_state(config, model_of(config)), random_tokens(4, 17))
    assert state.params["blocks"]["attention"]


def test_accumulated_sums_are_means_over_the_batches():
    """A penalty that sums over its rows is the authors' mean over batches, not a sum over all of them."""
    tokens = random_tokens(12, 17)
    penalties = {}
    for accumulate in (1, 3):
        config = run_config(EREG, **{"optimizer.accumulate": accumulate, "penalty.reduction": "row_sum"})
        _, metrics = step_of(config)(start(), tokens, False)
        penalties[accumulate] = float(metrics["penalty"])
        assert float(metrics["loss"]) == pytest.approx(
            float(metrics["cross_entropy"]) + 0.3 * penalties[accumulate], rel=1e-5
        )
    assert penalties[3] == pytest.approx(penalties[1] / 3, rel=1e-5)


def test_spectral_vectors_are_iterated_once_a_batch():
    tokens = random_tokens(4, 17)
    config = run_config(SPECTRAL)
    once, _ = step_of(config)(start(SPECTRAL), tokens, False)
    twice, _ = step_of(run_config(SPECTRAL, **{"optimizer.accumulate": 2}))(start(SPECTRAL), tokens, False)
    model = model_of(config)
    collections = start(SPECTRAL).collections
    for state in (once, twice):
        run = jax.jit(lambda c: loss_fn(start(SPECTRAL).params, tokens, model=model, collections=c)[1].collections)
        collections = run(collections)
        assert_close(state.collections, collections, atol=1e-5)


@pytest.mark.parametrize("architecture", [EREG, SPECTRAL])
def test_a_step_is_the_optimisers_update_by_the_losss_gradient(architecture):
    config, tokens, state = run_config(architecture), random_tokens(4, 17), start(architecture)
    new, metrics = step_of(config)(state, tokens, False)

    @jax.jit
    def by_hand(state):
        loss = functools.partial(
            loss_fn, model=model_of(config), penalty_weight=0.3, reduction="row_mean", tolerance=0.05,
            collections=state.collections,
        )  # fmt: skip
        (value, parts), gradients = jax.value_and_grad(loss, has_aux=True)(state.params, tokens)
        updates, moments = make_optimizer(config.optimizer, 20).update(gradients, state.opt_state, state.params)
        return value, parts, optax.apply_updates(state.params, updates), moments, optax.global_norm(gradients)

    value, parts, params, moments, norm = by_hand(state)
    assert_close(new.params, params)
    assert_close(new.opt_state, moments)
    assert_close(new.collections, parts.collections)
    assert int(new.step) == int(state.step) + 1 == 1
    np.testing.assert_array_equal(new.key, state.key)
    expected = dict(loss=value, cross_entropy=parts.cross_entropy, penalty=parts.penalty, gradient_norm=norm)
    assert_close({name: metrics[name] for name in expected}, expected)
    assert metrics.keys() == expected.keys() | {"not_finite"} and metrics["not_finite"].shape == (2,)


def test_watching_changes_nothing_but_what_is_seen():
    config, tokens = run_config(EREG), random_tokens(4, 17)
    step = step_of(config)
    plain, few = step(start(), tokens, False)
    watched, many = step(start(), tokens, True)
    assert_close(watched, plain, rtol=1e-6)
    assert set(many) - set(few) >= {
        "head_entropy",
        "layer_entropy",
        "bands_observed",
        "temperature",
        "threshold",
        "gradient_norms",
    }
    assert many["head_entropy"].shape == (2, 2)
    norms = [float(norm) ** 2 for norm in many["gradient_norms"].values()]
    assert sum(norms) == pytest.approx(float(many["gradient_norm"]) ** 2, rel=1e-5)


def test_qk_clip_brings_the_largest_logit_of_a_head_back_to_its_limit():
    """Temperatures and biases included; where the update itself is next to nothing."""
    tokens, state, model = random_tokens(4, 17), start(), model_of(run_config(EREG))
    state = state._replace(params=jax.tree.map(lambda x: 1.5 * x + 0.01, state.params))
    logits = jax.jit(
        lambda params: jnp.max(model.apply({"params": params}, tokens[:, :-1])[1].stats.max_logit, axis=(1, 3))
    )
    before = logits(state.params)
    limit = float(np.mean(before[0]))  # between the heads of the first layer
    fields = {"optimizer.qk_clip": limit, "optimizer.learning_rate": 1e-12, "optimizer.accumulate": 2}
    new, metrics = step_of(run_config(EREG, **fields))(state, tokens, True)
    np.testing.assert_allclose(metrics["head_max_logit"], before, rtol=1e-5)
    np.testing.assert_allclose(metrics["qk_clip"], np.minimum(1, limit / before), rtol=1e-5)
    # the layers above read what those below now say, so only the first layer's logits are exactly at the limit
    np.testing.assert_allclose(logits(new.params)[0], np.minimum(before, limit)[0], rtol=1e-4)
    unclipped = np.asarray(metrics["qk_clip"]) == 1
    assert unclipped[0].sum() == 1


def test_the_penaltys_weight_follows_its_schedule():
    config, tokens = run_config(EREG, **{"penalty.warmup": 0.1}), random_tokens(4, 17)
    step, state = step_of(config), start()
    for weight in (0, 0.15, 0.3, 0.3):
        state, metrics = step(state, tokens, False)
        expected = metrics["cross_entropy"] + weight * metrics["penalty"]
        np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-6)
        assert metrics["penalty"] > 0


def test_dropout_follows_the_key_and_the_step():
    config, tokens = run_config(EREG, **{"model.embedding_dropout": 0.3}), random_tokens(4, 17)
    step, state = step_of(config), start()

    def loss(state):
        return float(step(state, tokens, False)[1]["loss"])

    assert loss(state) == loss(state)
    losses = {
        loss(state),
        loss(state._replace(step=state.step + 1)),
        loss(state._replace(key=jax.random.key_data(jax.random.key(5)))),
    }
    assert len(losses) == 3


def test_layers_that_are_not_finite_are_counted():
    config, tokens, state = run_config("SM+LN+G"), random_tokens(4, 17), start("SM+LN+G")
    path = "blocks/attention/query/kernel"
    params = changed(state.params, path, lambda kernel: kernel.at[1, 0, 1, 0].set(jnp.nan))
    step = step_of(config)
    np.testing.assert_array_equal(step(state, tokens, False)[1]["not_finite"], [0, 0])
    metrics = step(state._replace(params=params), tokens, False)[1]
    np.testing.assert_array_equal(metrics["not_finite"], [0, 4 * 16])  # of one head in two
    assert np.isnan(metrics["loss"])


def test_a_state_is_a_function_of_the_seed():
    config = run_config(EREG)
    again = jax.jit(functools.partial(init_state, config, model_of(config)))()
    other = start(seed=7)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(np.all(a == b)), again, start()))
    assert not np.array_equal(other.params["token_embedding"], again.params["token_embedding"])
    assert not np.array_equal(other.key, again.key)


def test_all_64_bits_of_a_seed_count():
    seeds = (0, 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**63, 2**64 - 1)
    keys = {seed: tuple(jax.random.key_data(random_key(seed)).tolist()) for seed in seeds}
    assert len(set(keys.values())) == len(seeds)
    for seed in seeds[:4]:
        assert keys[seed] == (0, seed)  # as JAX has it
    for seed in (-1, 2**64):
        with pytest.raises(UserError, match=f"seed={seed} must be a whole number from 0 to 2.64 − 1"):
            random_key(seed)


def test_a_state_holds_what_the_model_takes():
    assert set(start(SPECTRAL).variables) == {"params", "spectral"}
    assert set(start().variables) == {"params"}
    assert int(start().step) == 0
