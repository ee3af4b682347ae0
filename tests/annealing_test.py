"""Runs that take nonlinearities out: where they begin, every point of the way, and what is left at the end."""

import dataclasses
import functools
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from jax_entropy import loss as loss_module
from jax_entropy.annealing import advanced, beginning, settled, trained_model
from jax_entropy.architecture import architecture
from jax_entropy.config import check, model_config
from jax_entropy.errors import UserError
from jax_entropy.layers import FeedForward
from jax_entropy.loss import loss_fn, teacher_divergence
from jax_entropy.model import Transformer
from jax_entropy.norms import FrozenNorm
from jax_entropy.plan.hlo import Program
from jax_entropy.private.program.blueprint import NO_REWRITES, Rewrites
from jax_entropy.private.program.export import export
from jax_entropy.private.program.forward import float32_logits
from jax_entropy.runs.load import load_run
from jax_entropy.sharding import batch_sharding, make_mesh
from jax_entropy.training.train import train
from tests import reference_model as reference
from tests.private.helpers import make_workdir
from tests.run_helpers import lines
from tests.tiny_model import random_tokens, run_config, scattered, tiny

TOKENS = random_tokens(2, 12)


def on_the_way(name="SM+FN", final_norm="frozen", **fields):
    """(config of a run from GELU and LayerNorm to a model without, the model that it trains)."""
    config = run_config(name, **{"anneal.activation": "gelu", "model.final_norm": final_norm, **fields})
    return config, trained_model(config, 61)


def at(amount, rate=0.7, **fields):
    """The model on its way, and its variables where every amount is `amount`, or one for each layer."""
    config, model = on_the_way(**fields)

    def one(path, leaf):
        value = amount if path[-1].key == "amount" else rate
        return (
            jnp.broadcast_to(jnp.asarray(value, jnp.float32), leaf.shape) if leaf.ndim else jnp.float32(np.max(value))
        )

    tree = jax.tree_util.tree_map_with_path(one, beginning(config, model))
    return model, {"params": scattered(model)["params"], "annealing": tree}


@functools.cache
def logits_of(model):
    return jax.jit(lambda variables: Transformer(model).apply(variables, TOKENS)[0])


def test_it_begins_as_the_model_that_it_starts_from():
    model, variables = at(0.0)
    start = dataclasses.replace(model, norm="layer", final_norm="layer")
    expected = reference.forward(start, {"params": variables["params"]}, TOKENS)[0]
    np.testing.assert_allclose(logits_of(model)(variables), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_it_ends_as_a_plain_model():
    config, _ = on_the_way()
    model, variables = at(1.0)
    end, plain = settled(model_config(config, 61), model, variables)
    assert str(end) == "SM+FN" and end.activation == "identity" and plain.keys() == {"params"}
    expected = reference.forward(end, plain, TOKENS)[0]
    np.testing.assert_allclose(logits_of(model)(variables), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_what_is_on_its_way_is_not_settled():
    config, _ = on_the_way()
    model, variables = at([1.0, 0.5])
    assert settled(model_config(config, 61), model, variables) == (model, variables)


@pytest.mark.parametrize("amount", [0.0, 0.3, 1.0])
def test_a_norm_and_an_activation_on_their_way(amount):
    config, x = tiny("SM+LN+G"), np.random.default_rng(0).standard_normal((2, 5, 16)).astype(np.float32)
    params = {"scale": np.full(16, 1.5, np.float32), "bias": np.full(16, 0.2, np.float32)}
    tree = {"amount": jnp.float32(amount), "rate": jnp.float32(0.6)}
    y = FrozenNorm(config).apply({"params": params, "annealing": tree}, 3 + 2 * x)
    centered = 2 * (x - x.mean(-1, keepdims=True))
    factor = (1 - amount) / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-5) + amount * 0.6
    np.testing.assert_allclose(y, centered * factor * 1.5 + 0.2, rtol=1e-4, atol=1e-5)

    params = jax.tree.map(lambda leaf: leaf[0], scattered(config)["params"]["blocks"]["ffn"])
    y = FeedForward(config).apply({"params": params, "annealing": {"amount": jnp.float32(amount)}}, x, None)
    hidden = x @ np.asarray(params["up"]["kernel"])
    gelu = hidden * (1 + reference.erf(hidden / math.sqrt(2))) / 2
    expected = (amount * hidden + (1 - amount) * gelu) @ np.asarray(params["down"]["kernel"])
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def test_a_rate_follows_the_rows_until_it_takes_their_place():
    config, x = tiny("SM+LN"), np.random.default_rng(0).standard_normal((2, 5, 16)).astype(np.float32)
    params = {"scale": np.ones(16, np.float32), "bias": np.zeros(16, np.float32)}

    def rate_after(amount, rate):
        tree = {"amount": jnp.float32(amount), "rate": jnp.float32(rate)}
        _, seen = FrozenNorm(config).apply({"params": params, "annealing": tree}, x, mutable=["annealing"])
        return float(seen["annealing"]["rate"])

    mean = float((1 / np.sqrt(x.var(-1) + 1e-5)).mean())
    assert rate_after(0.0, 0.0) == pytest.approx(mean, rel=1e-5)
    assert rate_after(0.5, 2.0) == pytest.approx(0.99 * 2 + 0.01 * mean, rel=1e-5)
    assert rate_after(1.0, 2.0) == 2


@pytest.mark.parametrize(("order", "first", "last"), [
    ("together", None, None), ("shallowest_first", 0, 2), ("deepest_first", 2, 0),
])  # fmt: skip
def test_amounts_rise_in_their_order(order, first, last):
    fields = {"anneal.begin": 0.2, "anneal.end": 0.8, "anneal.order": order, "train.num_steps": 20}
    config, model = on_the_way("SM+FN^1", **fields, **{"model.num_layers": 2})
    tree, seen = beginning(config, model), []
    for step in range(20):
        tree = advanced(tree, config, model, jnp.int32(step))
        blocks = np.concatenate([tree[stack]["norm1"]["amount"] for stack in ("blocks", "blocks_without_ffn")])
        np.testing.assert_array_equal(tree["blocks"]["ffn"]["amount"], blocks[:1])
        seen.append([*blocks, float(tree["final_norm"]["amount"])])
    seen = np.array(seen)
    assert np.all(np.diff(seen, axis=0) >= 0)
    np.testing.assert_array_equal(seen[:4], 0)
    np.testing.assert_array_equal(seen[15:], 1)
    config.train.num_steps = 100
    jax.tree.map(np.testing.assert_array_equal, advanced(tree, config, model, jnp.int32(20)), tree)
    if first is None:
        np.testing.assert_allclose(seen[4:16], np.arange(1, 13)[:, None].repeat(3, 1) / 12, rtol=1e-6)
    else:
        begun = np.argmax(seen > 0, axis=0)
        assert begun[first] < begun[1] < begun[last]
        assert np.all(seen[begun[last] - 1, [first, 1]] == 1)  # one layer after the other


@pytest.mark.parametrize(("steps", "begin"), [(330, 0.0), (500, 0.05), (700, 0.3), (1000, 0.05)])
def test_the_last_step_is_the_end_of_the_way(steps, begin):
    """Where the quotient of steps, rounded, is less than 1."""
    config, model = on_the_way("SM+FN", **{"train.num_steps": steps, "anneal.begin": begin, "anneal.end": 1.0})
    step = jax.jit(lambda tree, step: advanced(tree, config, model, step))
    np.testing.assert_array_equal(step(beginning(config, model), steps - 1)["final_norm"]["amount"], 1)
    assert step(beginning(config, model), steps - 2)["final_norm"]["amount"] < 1


@pytest.mark.parametrize("rewrites", [Rewrites(), NO_REWRITES], ids=["all", "none"])
@pytest.mark.parametrize("amount", [[1.0, 0.4]])
def test_every_point_of_the_way_is_exported_as_it_is(amount, rewrites):
    model, variables = at(amount, name="SM+FN+ScFFN", **{"model.bias": "all"})
    exported, expected = export(model, variables, rewrites), logits_of(model)(variables)[0]
    found = float32_logits(exported, TOKENS[0])
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max(), rtol=0)
    if rewrites == Rewrites():
        done = amount.index(1.0)
        assert f"{done}.fused.kernel" in exported.weights and f"{done}.norm1.left" not in exported.weights
        assert f"{1 - done}.up.kernel" in exported.weights and f"{1 - done}.norm1.left" in exported.weights


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_divergence_from_a_teacher(temperature):
    rng = np.random.default_rng(0)
    ours, theirs = rng.standard_normal((2, 3, 8, 5)), rng.standard_normal((2, 3, 8, 5))
    heads = rng.standard_normal((2, 7, 5))
    logits = [np.einsum("BTD,VD->BTV", h[0], head) / temperature for h, head in zip((ours, theirs), heads, strict=True)]
    log_p, log_q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in logits)
    expected = temperature**2 * (np.exp(log_q) * (log_q - log_p)).sum(-1).mean()
    with jax.enable_x64(True):
        found = teacher_divergence(ours[0], heads[0], theirs[0], heads[1], temperature=temperature)
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        same = teacher_divergence(ours[0], heads[0], ours[0], heads[0], temperature=temperature)
    assert abs(float(same)) < 1e-12


def test_over_a_mesh_the_divergence_and_its_gradients_are_the_same_and_summed_once(monkeypatch):
    rng = np.random.default_rng(1)
    hidden, heads = rng.standard_normal((2, 8, 8, 5)), rng.standard_normal((2, 16, 5))
    hidden, heads = hidden.astype(np.float32), heads.astype(np.float32)

    def divergence(ours, head):
        return teacher_divergence(ours, head, hidden[1], heads[1], temperature=2.0)

    expected, mesh, sent = jax.value_and_grad(divergence, (0, 1))(hidden[0], heads[0]), make_mesh(2, 2, 2), []
    for rows in (1, 64):
        monkeypatch.setattr(loss_module, "chunk_rows", lambda vocab_size, rows=rows: rows)
        with jax.set_mesh(mesh):
            step = jax.jit(jax.value_and_grad(divergence, (0, 1)), in_shardings=(batch_sharding(mesh), None))
            compiled = step.lower(hidden[0], heads[0]).compile()
        found = compiled(hidden[0], heads[0])
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), found, expected)
        sent.append(Program(compiled.as_text()).collectives()["all-reduce"].sent)
    assert sent[0] == sent[1] > 0  # however many chunks there are


def test_distillation_takes_the_place_of_a_share_of_the_cross_entropy():
    config = tiny("SM+LN+G")
    params, teacher = (
        scattered(config)["params"],
        {"params": jax.tree.map(lambda x: 1.1 * x, scattered(config)["params"])},
    )
    loss = functools.partial(loss_fn, model=Transformer(config), teacher=teacher, distillation=0.3)
    value, parts = jax.jit(loss)(params, random_tokens(2, 13))
    assert parts.divergence > 0
    np.testing.assert_allclose(value, 0.7 * parts.cross_entropy + 0.3 * parts.divergence, rtol=1e-6)


@pytest.mark.parametrize(("name", "fields", "message"), [
    ("SM+LN+G", {"anneal.activation": "relu"}, "anneal.activation='relu' is to be taken out, and SM.LN.G keeps an"),
    ("SM+LN+G", {"model.tanh_gelu": True, "anneal.activation": "relu"}, "SM.LN.G keeps an activation"),
    ("SM+ScFuFFN", {"anneal.activation": "gelu"}, "no room for activation='gelu'"),
    ("SM+FN", {"anneal.activation": "swish"}, "config.anneal.activation='swish' is not known"),
    ("SM+FN", {"anneal.begin": 0.5}, "anneal.end=0.5 must come after config.anneal.begin=0.5"),
    ("SM+FN", {"anneal.order": "deepest"}, "did you mean 'deepest_first'"),
])  # fmt: skip
def test_ways_that_lead_nowhere_are_sentences(name, fields, message):
    with pytest.raises(UserError, match=message):
        check(run_config(name, **fields))
        trained_model(run_config(name, **fields), 61)


def test_a_run_takes_nonlinearities_out_of_a_trained_one(tmp_path, tiny):
    """Every checkpoint is a model; the last is a plain one, in which nothing of the way is left."""
    source, run, other = make_workdir(tmp_path / "source", "SM+LN+G"), tmp_path / "run", tmp_path / "other"
    fields = {"train.num_steps": 3, "train.checkpoint_every": 1, "train.evaluate_every": 3, "train.evaluate_chunks": 8}
    fields |= {"train.log_every": 1, "train.keep": 4, "mesh.data": 8, "anneal.begin": 0.0, "anneal.end": 0.6}
    sizes = {f"model.{name}": load_run(source).config.model[name] for name in ("model_dim", "context_length")}
    config = tiny("SM+FN", **sizes | fields | {"anneal.distillation": 0.5})
    with pytest.raises(UserError, match="distillation=0.5 needs a model to learn from"):
        train(config, run, lambda line: None)
    said = []
    trained = train(config, run, said.append, start_from=source)
    assert any("100.0% of the parameters are taken over" in line for line in said)
    assert str(trained.model.config) == "SM+FN" and trained.variables.keys() == {"params"}
    assert all(np.isfinite(line["divergence"]) for line in lines(run))
    plain = load_run(run)
    assert str(plain.model.config) == "SM+FN"
    jax.tree.map(np.testing.assert_array_equal, plain.variables, trained.variables)
    with pytest.raises(UserError, match="SM.FN, has .frozen. in its place; start from it with config.anneal.end=0"):
        train(tiny("SM+FN+G", **sizes), other, lambda line: None, start_from=run)

    for step in (3, 2):
        shutil.rmtree(run / "checkpoints" / str(step))
    half = load_run(run)
    assert half.step == 1 and half.model.config.activation == "gelu" and "annealing" in half.variables
    with pytest.raises(UserError, match="is on its way to SM.FN; let it train to config.anneal.end first"):
        train(tiny("SM", **sizes), other, lambda line: None, start_from=run)
    shutil.rmtree(run / "checkpoints" / "1")
    jax.tree.map(np.testing.assert_array_equal, load_run(run).variables["params"], load_run(source).variables["params"])


def test_a_frozen_norm_from_scratch_needs_no_word_about_it():
    config = run_config("SM+FN+G")
    model = trained_model(config, 61)
    assert model == model_config(config, 61) == dataclasses.replace(model, norm="frozen")
    assert {path[-2] for path in flatten_dict(beginning(config, model))} == {"norm1", "norm2"}
    assert architecture("SM+FN").activation == "identity"
