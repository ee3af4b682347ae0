"""The exported program is the model, in every architecture and with every step on, off and alone."""

import dataclasses
import functools
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_entropy.architecture import architecture
from jax_entropy.census import KINDS
from jax_entropy.model import Transformer
from jax_entropy.private.cost.work import exponentials, work
from jax_entropy.private.engine.engine import Setting
from jax_entropy.private.program.blueprint import NO_REWRITES, REWRITES, Blueprint, Rewrites
from jax_entropy.private.program.export import export
from jax_entropy.private.program.forward import float32_logits, forward, prefill, step
from jax_entropy.private.program.stage import caches, compose, external_inputs, pieces, run_stage
from tests.private.helpers import plain_logits
from tests.tiny_model import ARCHITECTURES, VARIED, random_tokens, scattered, tiny


def run(exported, stages, outputs, **values):
    names = external_inputs(stages)
    return compose(stages, names, outputs)(*((exported.weights | values)[name] for name in names))


def assert_equal_to_model(config, rewrites, num_tokens=16):
    expected_TxV, exported = plain_logits(config, num_tokens), export(config, scattered(config), rewrites)
    logits_TxV = float32_logits(exported, random_tokens(1, num_tokens)[0])
    np.testing.assert_allclose(logits_TxV, expected_TxV, atol=2e-5 * np.abs(expected_TxV).max(), rtol=0)
    return exported


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("rewrites", [Rewrites(), NO_REWRITES], ids=["all", "none"])
def test_every_architecture_is_exported_as_it_is(name, rewrites):
    """And its cost is predicted of what it executes: a kind that is not there costs nothing, one that is, something."""
    config = tiny(name)
    executed = {stage.kind for stage in forward(assert_equal_to_model(config, rewrites).blueprint, 16)}
    predicted = {*work(config, 16, rewrites == NO_REWRITES, "semi2k", "every")}
    # a residual without scales is a sum, which nobody sends anything for
    assert executed & {kind.name for kind in KINDS} - {"residual"} == predicted - {"residual"}


@pytest.mark.parametrize("overrides", [dict(num_layers=3), dict(value_embedding_layers="all")])
@pytest.mark.parametrize("rewrites", [Rewrites(), NO_REWRITES], ids=["all", "none"])
def test_the_first_values_may_be_those_of_a_layer_with_a_table(overrides, rewrites):
    config = tiny("SM+ScFuFFN+VRes+VEmb+Mem3", **overrides)
    assert config.embedded_values[0]
    assert_equal_to_model(config, rewrites)


@pytest.mark.parametrize("overrides", [
    dict(bias="all"), dict(bias="none"), dict(final_norm="none"), dict(final_norm="rms"), dict(tied_head=False),
    dict(embedding_scale=4.0),
])  # fmt: skip
@pytest.mark.parametrize("name", VARIED)
def test_biases_heads_and_norms_are_folded_right(name, overrides):
    assert_equal_to_model(tiny(name, **overrides), Rewrites())


@pytest.mark.parametrize("name", ["SM+LN+G", "EReg(SM(t)+LN+LR(global)+SNorm(QKVO+FFN)+ScFFN^1)"])
@pytest.mark.parametrize("field", REWRITES)
def test_every_rewrite_alone_and_left_out_is_the_same_function(name, field):
    assert_equal_to_model(tiny(name, bias="all"), dataclasses.replace(NO_REWRITES, **{field: True}))
    assert_equal_to_model(tiny(name, bias="all"), dataclasses.replace(Rewrites(), **{field: False}))


@pytest.mark.parametrize("name", ["EReg(SM(t)+ScFuFFN^1)", "SM+LN+G+Conv2"])
def test_products_in_pieces_are_the_same_function(name):
    config = tiny(name, bias="all")
    whole, cut = (export(config, scattered(config), piece=piece) for piece in (0, 200))
    tokens = random_tokens(1, 16)[0]
    np.testing.assert_allclose(float32_logits(cut, tokens), float32_logits(whole, tokens), atol=1e-5, rtol=0)
    for size, other in ((61, 16), (48, 16)):
        parts = pieces(size, other, 200)
        assert [part.start for part in parts[1:]] == [part.stop for part in parts[:-1]] and parts[-1].stop == size
        assert max(part.stop - part.start for part in parts) * other <= 200 < size * other


@pytest.mark.parametrize("num_tokens", [1, 3, 8, 15])
def test_any_number_of_tokens(num_tokens):
    assert_equal_to_model(tiny("EReg(SM(t)+ScFuFFN^1)"), Rewrites(), num_tokens)


@pytest.mark.parametrize("name", VARIED)
@pytest.mark.parametrize("rewrites", [Rewrites(), NO_REWRITES], ids=["all", "none"])
def test_prefill_and_steps_go_on_like_the_whole_forward_pass(name, rewrites):
    config = tiny(name)
    tokens_T = np.asarray(random_tokens(1, 16)[0])
    expected_TxV = plain_logits(config)
    exported = export(config, scattered(config), rewrites, Setting(exponent="pade"))  # exp itself
    names = tuple(caches(exported.blueprint))
    padded_T = np.concatenate([tokens_T[:5], [0, 0, 0]])  # a prompt of 5 in a program for 8
    logits_1xV, *cache = run(
        exported,
        prefill(exported.blueprint, 8),
        ("logits", *names),
        tokens=exported.blueprint.enter(padded_T),
        last=jnp.int32(4),
    )
    tolerance = dict(atol=2e-5 * np.abs(expected_TxV).max(), rtol=0)
    np.testing.assert_allclose(logits_1xV[0], expected_TxV[4], **tolerance)
    for position in range(5, 16):
        past = {f"{name}.past": value for name, value in zip(names, cache, strict=True)}
        logits_1xV, *cache = run(
            exported, step(exported.blueprint, 8 if position < 8 else 16), ("logits", *names), **past,
            tokens=exported.blueprint.enter(tokens_T[position : position + 1]), position=jnp.int32(position),
        )  # fmt: skip
        np.testing.assert_allclose(logits_1xV[0], expected_TxV[position], **tolerance)


def test_a_soft_cap_is_taken_of_what_is_seen_only():
    """Of tiles on and under the diagonal, within windows, and not of the square that a whole prompt's scores are."""
    config = tiny("SM+Cap(30)+Win(SL,4)")
    exported, counted = export(config, scattered(config)), []
    known = exported.weights | dict(tokens=exported.enter(range(16)))
    for stage in forward(exported.blueprint, 16):
        if stage.kind == "soft cap":
            counted.append(known["scores"].size)
        inputs = {name: known[name] for name in stage.inputs}
        known |= zip(stage.outputs, jax.eval_shape(functools.partial(run_stage, stage), inputs), strict=True)
    assert counted == [exponentials(config, layer, 16, plain=False, alone=False) for layer in range(config.num_layers)]
    assert max(counted) < config.num_heads * 16**2


def test_tokens_enter_in_the_memory_of_their_rows():
    """Not of the square of the vocabulary, which was 10 GB of GPT-2's for every token."""
    blueprint = Blueprint(architecture("SM", vocab_size=50_257), Rewrites(), {})
    tracemalloc.start()
    rows_TxV = blueprint.enter([3, 50_256])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 * rows_TxV.nbytes and rows_TxV.sum() == 2
    assert rows_TxV.shape == (2, 50_257) and rows_TxV.argmax(-1).tolist() == [3, 50_256]


def test_a_linear_feed_forward_is_one_matrix_and_an_activated_one_is_not():
    for name, merged in (("SM", True), ("SM+ScFFN", True), ("SM+R", False)):
        exported = export(tiny(name), scattered(tiny(name)), Rewrites(joined=False))
        assert exported.blueprint.one_matrix(0) == merged


def test_products_of_beta_beyond_what_fixed_point_takes_are_not_folded():
    config = tiny("SM+ScFuFFN")
    variables = scattered(config)
    small = variables["params"]["blocks"]["beta"] * 0 + 1e-3
    variables = {"params": variables["params"] | {"blocks": variables["params"]["blocks"] | {"beta": small}}}
    exported = export(config, variables)
    assert "0.beta" in exported.weights
    tokens = random_tokens(1, 16)
    expected = Transformer(config).apply(variables, tokens)[0][0]
    logits = float32_logits(exported, tokens[0])
    np.testing.assert_allclose(logits, expected, atol=1e-5 * float(jnp.abs(expected).max()))
