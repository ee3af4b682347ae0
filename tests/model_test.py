"""The model as a whole against NumPy in float64, itself read token by token, and its own other ways of computing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_entropy import layers, model
from jax_entropy.errors import UserError
from jax_entropy.loss import loss_fn
from jax_entropy.model import Transformer, empty_cache
from jax_entropy.sharding import make_mesh
from tests import reference_model as reference
from tests.tiny_model import ARCHITECTURES, VARIED, initial, random_tokens, scattered, shapes, tiny

T = 12  # shorter than the context of 16


@functools.cache
def forward(config):
    """(logits, aux) of the scattered model on two rows of T tokens."""
    return jax.jit(Transformer(config).apply)(scattered(config), random_tokens(2, T))


def assert_is_the_reference(config, rtol=1e-4):
    logits, aux = forward(config)
    expected, *statistics = reference.forward(config, scattered(config), random_tokens(2, T))
    scale = np.abs(expected).max()
    np.testing.assert_allclose(logits, expected, rtol=rtol, atol=rtol * scale)
    for name, value, of_reference in zip(aux.stats._fields, aux.stats, statistics, strict=True):
        assert value.dtype == jnp.float32 and value.shape == (config.num_layers, 2, config.num_heads, T)
        np.testing.assert_allclose(value, of_reference, rtol=rtol, atol=rtol * np.abs(of_reference).max(), err_msg=name)
    return aux


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_model_is_the_papers(name):
    config = tiny(name)
    aux = assert_is_the_reference(config)
    if not config.entropy_regularizer:
        assert aux.threshold is None
    else:
        params = scattered(config)["params"]
        stacks = [params[s]["attention"]["threshold"] for s in ("blocks", "blocks_without_ffn") if s in params]
        np.testing.assert_array_equal(aux.threshold, np.concatenate(stacks))
        assert aux.threshold.shape == (2, 2)
    if not config.learnable_temperature:
        assert aux.temperature is None
    else:
        params = scattered(config)["params"]
        stacks = [params[s]["attention"]["temperature"] for s in ("blocks", "blocks_without_ffn") if s in params]
        expected = np.sqrt(np.square(np.concatenate(stacks)) + 1e-8)[..., :T]
        np.testing.assert_allclose(aux.temperature, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("SM+LN+G", dict(bias="all", tied_head=False, embedding_scale=4.0, final_norm="rms")),
        ("SM+G", dict(activation="gelu_tanh", bias="none", final_norm="none")),
        ("SM(t)", dict(temperature_parameter="log", ffn_dim=24, num_heads=4)),
        ("SM+RN+ScFFN^2", dict(num_layers=4, bias="all", norm_epsilon=0.1)),
        ("SM+LN+LR(-0.5)", dict(num_layers=1, num_heads=1)),
        ("EReg(SM(t)+ScFuFFN)", dict(attention="blockwise")),
        ("EReg(SM(t)+ScFuFFN)", dict(attention="dense")),
    ],
)
def test_the_fields_that_the_notation_leaves_open(name, overrides):
    config = tiny(name, **overrides)
    assert_is_the_reference(config)
    params = shapes(config)["params"]
    assert ("head" in params) != config.tied_head
    assert ("final_norm" in params) == (config.final_norm != "none")


def decode(config, variables, tokens, cache, position):
    """(logits, aux, cache) after tokens that stand at `position`."""
    (logits, aux), changed = Transformer(config).apply(
        {**variables, "cache": cache}, tokens, position, method="decode", mutable=["cache"]
    )
    return logits, aux, changed["cache"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_reading_with_a_cache_is_reading_at_once(name):
    config = tiny(name)
    variables, tokens = scattered(config), random_tokens(2, T)

    @jax.jit
    def read(variables):
        """Seven tokens, then one, then four."""
        cache, parts, position = empty_cache(config, 2), [], 0
        for size in (7, 1, 4):
            piece = tokens[:, position : position + size]
            logits, aux, cache = decode(config, variables, piece, cache, position)
            parts.append((jnp.moveaxis(logits, 1, -1), aux.stats.entropy))
            position += size
        return [jnp.concatenate(pieces, axis=-1) for pieces in zip(*parts, strict=True)]

    logits, aux = forward(config)
    read_logits, entropy = read(variables)
    logits = jnp.moveaxis(logits, 1, -1)
    np.testing.assert_allclose(read_logits, logits, rtol=1e-4, atol=1e-5 * float(jnp.abs(logits).max()))
    np.testing.assert_allclose(entropy, aux.stats.entropy, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", VARIED)
def test_a_cache_may_be_read_at_a_position_known_only_later(name):
    config = tiny(name)
    variables, tokens = scattered(config), random_tokens(2, T)

    @jax.jit
    def read(variables):
        def step(carry, token_B):
            cache, position = carry
            logits, _, cache = decode(config, variables, token_B[:, None], cache, position)
            return (cache, position + 1), logits[:, 0]

        return jnp.moveaxis(jax.lax.scan(step, (empty_cache(config, 2), 0), tokens.T)[1], 0, 1)

    logits, _ = forward(config)
    np.testing.assert_allclose(read(variables), logits, rtol=1e-4, atol=1e-5 * float(jnp.abs(logits).max()))


def test_what_lies_behind_in_a_cache_is_not_seen():
    config = tiny("SM+LN+G")
    variables, tokens = scattered(config), random_tokens(2, T)
    read = jax.jit(lambda cache: decode(config, variables, tokens, cache, 0)[:2])
    clean = empty_cache(config, 2)
    dirty = jax.tree.map(lambda leaf: leaf + 1e3, clean)
    jax.tree.map(np.testing.assert_array_equal, read(clean), read(dirty))


@pytest.mark.parametrize("name", VARIED)
def test_no_position_depends_on_a_later_one(name):
    """Gradients of what is computed at position i reach the embeddings of the tokens up to i, and no later one."""
    config, position = tiny(name), 5
    tokens = jnp.arange(T)[None]  # all different, so that rows of the embedding are positions
    config_untied = tiny(name, tied_head=False)
    model, variables = Transformer(config_untied), scattered(config_untied)

    @jax.jit
    @jax.grad
    def gradient(table):
        params = variables["params"] | {"token_embedding": table}
        logits, aux = model.apply({**variables, "params": params}, tokens)
        return jnp.sum(jnp.sin(logits[:, position])) + sum(jnp.sum(s[..., position]) for s in aux.stats)

    reached = np.abs(gradient(variables["params"]["token_embedding"])).sum(1)
    assert config.num_layers == 2 and np.all(np.isfinite(reached))
    assert np.all(reached[: position + 1] > 0)
    np.testing.assert_array_equal(reached[position + 1 :], 0)


@pytest.mark.parametrize("name", VARIED[2:4])
@pytest.mark.parametrize(
    "how",
    [dict(scan_unroll=2), dict(scan_unroll=99, remat="attention"), dict(remat="attention+ffn"), dict(remat="full")],
)
def test_unrolling_and_recomputing_do_not_change_the_numbers(name, how):
    config = tiny(name, num_layers=3, ffn_free_layers=1 if "^" in name else 0)
    loss, gradients, collections = loss_and_gradients(config)
    other = tiny(name, num_layers=3, ffn_free_layers=config.ffn_free_layers, **how)
    assert jax.tree.structure(shapes(other)) == jax.tree.structure(shapes(config))
    loss_other, gradients_other, collections_other = loss_and_gradients(other)
    np.testing.assert_allclose(loss_other, loss, rtol=1e-6)
    atol = 1e-6 * float(optax.global_norm(gradients))
    for one, two in zip(jax.tree.leaves(gradients), jax.tree.leaves(gradients_other), strict=True):
        np.testing.assert_allclose(two, one, rtol=1e-4, atol=atol)
    for one, two in zip(jax.tree.leaves(collections), jax.tree.leaves(collections_other), strict=True):
        np.testing.assert_allclose(two, one, rtol=1e-5, atol=1e-6)


def test_accelerators_compute_activations_again_and_the_numbers_stay(monkeypatch):
    config = tiny("SM+LN+G")
    loss, gradients, _ = loss_and_gradients(config)
    monkeypatch.setattr(layers, "platform", lambda: "tpu")
    loss_again, gradients_again, _ = loss_and_gradients.__wrapped__(config)
    np.testing.assert_allclose(loss_again, loss, rtol=1e-6)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), gradients_again, gradients)
    step = jax.grad(functools.partial(loss_fn, model=Transformer(config)), has_aux=True)
    jaxpr = str(jax.make_jaxpr(step)(shapes(config)["params"], random_tokens(2, T + 1)))
    assert "prevent_cse=True" in jaxpr


def test_layers_are_unrolled_by_a_rule_where_nothing_is_asked_for(monkeypatch):
    for platform, unrolled in (("gpu", [12, 1]), ("cpu", [1, 1]), ("tpu", [12, 1])):
        monkeypatch.setattr(model, "platform", lambda platform=platform: platform)
        assert [model._unroll(tiny("SM"), length) for length in (12, 48)] == unrolled
        assert model._unroll(tiny("SM", scan_unroll=5), 3) == 3
        assert model._unroll(tiny("SM", remat="full"), 12) == 1
        with jax.set_mesh(make_mesh(4, 2, 1)):
            assert model._unroll(tiny("SM"), 12) == 1


def test_the_more_is_kept_the_fewer_products_are_computed_again():
    def products(remat):
        config = tiny("SM+LN+G", num_layers=2, context_length=80, remat=remat, attention="blockwise")
        step = jax.grad(functools.partial(loss_fn, model=Transformer(config)), has_aux=True)
        return str(jax.make_jaxpr(step)(shapes(config)["params"], random_tokens(2, 81))).count("dot_general")

    counts = [products(remat) for remat in ("none", "attention+ffn", "attention", "full")]
    assert counts == sorted(set(counts)), counts


@functools.cache
def loss_and_gradients(config):
    collections = {**scattered(config)}
    params = collections.pop("params")
    function = functools.partial(loss_fn, model=Transformer(config), penalty_weight=0.1, reduction="row_mean")
    (loss, parts), gradients = jax.jit(jax.value_and_grad(function, has_aux=True))(
        params, random_tokens(2, T + 1), collections=collections
    )
    return loss, gradients, parts.collections


@pytest.mark.parametrize("name", VARIED)
def test_activations_in_bfloat16_keep_statistics_and_logits_in_float32(name):
    wide, narrow = tiny(name), tiny(name, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes(narrow))} == {jnp.dtype("float32")}
    logits, aux = forward(narrow)
    assert {x.dtype for x in jax.tree.leaves((logits, aux))} == {jnp.dtype("float32")}
    hidden, _, _ = jax.eval_shape(
        functools.partial(Transformer(narrow).apply, method="hidden"), shapes(narrow), random_tokens(2, T)
    )
    assert hidden.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(empty_cache(narrow, 1))} == {jnp.dtype("bfloat16")}
    expected, aux_expected = forward(wide)
    error = np.abs(logits - expected).max() / np.abs(expected).max()
    assert 1e-5 < error < 0.1  # really computed in bfloat16, and not wrongly
    np.testing.assert_allclose(aux.stats.entropy, aux_expected.stats.entropy, atol=0.15)
    below = np.asarray(aux.stats.entropy).min()
    assert below > -1e-5  # the rounded scores of a row are the same in its logsumexp and in its mean


def test_a_context_may_be_filled_but_not_passed():
    config = tiny("SM(t)+LN+G")
    model = Transformer(config)
    run = functools.partial(jax.eval_shape, model.apply, shapes(config))
    logits, aux = run(jnp.zeros((3, 16), jnp.int32))
    assert logits.shape == (3, 16, 61) and aux.stats.entropy.shape == (2, 3, 2, 16)
    logits, aux = run(jnp.zeros((3, 1), jnp.int32))
    assert logits.shape == (3, 1, 61) and aux.stats.entropy.shape == (2, 3, 2, 1)
    with pytest.raises(UserError, match="17 tokens do not fit into context_length=16"):
        run(jnp.zeros((3, 17), jnp.int32))


def test_an_attention_that_does_not_exist_is_named_before_anything_is_compiled():
    with pytest.raises(UserError, match="'blockwize'.*blockwise"):
        shapes(tiny("SM", attention="blockwize"))


def test_logits_do_not_depend_on_the_tokens_that_follow():
    config = tiny("EReg(SM(t)+ScFuFFN)")
    logits, aux = jax.jit(Transformer(config).apply)(scattered(config), random_tokens(2, 16))
    short, aux_short = jax.jit(Transformer(config).apply)(scattered(config), random_tokens(2, 16)[:, :9])
    np.testing.assert_allclose(logits[:, :9], short, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(aux.stats.entropy[..., :9], aux_short.stats.entropy, rtol=1e-4, atol=1e-5)


def test_dropout_acts_with_an_rng_and_keeps_the_mean():
    """Without blocks' help: an identity model shows the embeddings that it was fed."""
    config = tiny("SM^1", num_layers=1, num_heads=1, embedding_dropout=0.25, final_norm="none", vocab_size=16)
    params = jax.tree.map(jnp.zeros_like, initial(config)["params"]) | {
        "token_embedding": jnp.eye(16), "position_embedding": jnp.ones((16, 16)),
    }  # fmt: skip
    model, tokens = Transformer(config), jnp.zeros((200, 16), jnp.int32)
    hidden = jax.jit(lambda rngs: model.apply({"params": params}, tokens, method="hidden", rngs=rngs)[0])
    fed = np.asarray(hidden({}))
    np.testing.assert_array_equal(fed, np.broadcast_to(1 + np.eye(16)[0], fed.shape))
    dropped = np.asarray(hidden({"dropout": jax.random.key(3)}))
    kept = dropped != 0
    assert abs(kept.mean() - 0.75) < 0.01
    np.testing.assert_allclose(dropped[kept], (fed / 0.75)[kept], rtol=1e-6)
    assert not np.array_equal(dropped, hidden({"dropout": jax.random.key(4)}))
    np.testing.assert_array_equal(dropped, hidden({"dropout": jax.random.key(3)}))


def test_without_dropout_an_rng_changes_nothing():
    config = tiny("SM+LN+G")
    run = jax.jit(lambda rngs: Transformer(config).apply(scattered(config), random_tokens(2, T), rngs=rngs)[0])
    np.testing.assert_array_equal(run({}), run({"dropout": jax.random.key(0)}))


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, "float32") for name in ARCHITECTURES), *((name, "bfloat16") for name in VARIED)]
)
def test_every_variant_trains(name, dtype):
    """Thirty steps on text that repeats itself: every loss is finite, and the last is below the first."""
    config = tiny(name, dtype=dtype)
    model, optimizer = Transformer(config), optax.adam(3e-3)
    text = np.tile(np.random.default_rng(0).permutation(61), 3)
    tokens = jnp.asarray(np.stack([text[start : start + 17] for start in range(0, 64, 8)]))

    @jax.jit
    def train(variables):
        collections = {**variables}
        params = collections.pop("params")

        def step(carry, _):
            params, collections, moments = carry
            (loss, parts), gradients = jax.value_and_grad(loss_fn, has_aux=True)(
                params, tokens, model=model, penalty_weight=0.1, reduction="row_mean", collections=collections
            )
            updates, moments = optimizer.update(gradients, moments)
            return (optax.apply_updates(params, updates), parts.collections, moments), (loss, parts.aux.stats)

        (params, *_), (losses, stats) = jax.lax.scan(step, (params, collections, optimizer.init(params)), length=30)
        return losses, params, stats

    losses, params, stats = jax.device_get(train(initial(tiny(name))))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((losses, params, stats)))
    assert losses.dtype == np.float32 and losses.shape == (30,)
    assert losses[-1] < 0.8 * losses[0]
