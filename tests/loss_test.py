"""Cross-entropy in chunks against Optax in one piece; the whole loss's gradients against differences of NumPy's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jax_entropy import loss as loss_module
from jax_entropy.chips import CHIPS
from jax_entropy.config import default_config
from jax_entropy.errors import UserError
from jax_entropy.loss import cross_entropy, loss_fn, token_losses, vocabulary_tiles
from jax_entropy.model import Transformer
from jax_entropy.plan.hlo import Program
from jax_entropy.sharding import batch_sharding, make_mesh, path_name
from jax_entropy.state import penalty_schedule
from tests import reference_model as reference
from tests.entropy_test import penalty_by_hand
from tests.tiny_model import ARCHITECTURES, random_tokens, scattered, tiny

B, D, V = 3, 8, 29


def problem(T, dtype):
    rng = np.random.default_rng(0)
    hidden, head = rng.standard_normal((B, T, D)).astype(dtype), rng.standard_normal((V, D))
    head = head.astype(np.float64 if dtype == "float64" else np.float32)
    return hidden, head, rng.integers(0, V, (B, T)).astype(np.int32)


def plain_cross_entropy(hidden, head, targets):
    logits = jnp.einsum("BTD,VD->BTV", hidden, head.astype(hidden.dtype), preferred_element_type=head.dtype)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


@pytest.fixture(
    params=[(1, None, "cpu"), (5 * B, None, "gpu"), (5 * B, (4, 8), "cpu"), (1 << 10, None, "cpu")], ids=str
)
def rows(request, monkeypatch):
    """So few rows in a chunk that chunks hold one position, some, or all; of 13 positions the last chunk is padded.

    Some are cut into tiles of the vocabulary too, of which the last is padded; some are computed as for a GPU.
    """
    rows, tiles, platform = request.param
    monkeypatch.setattr(loss_module, "platform", lambda: platform)
    monkeypatch.setattr(loss_module, "chunk_rows", lambda vocab_size: rows)
    monkeypatch.setattr(loss_module, "vocabulary_tiles", lambda vocab_size, rows: tiles)


@pytest.mark.parametrize("T", [12, 13])
@pytest.mark.parametrize(("dtype", "rtol"), [("float32", 1e-5), ("float64", 1e-12), (jnp.bfloat16, 2e-2)])
def test_cross_entropy_in_chunks_is_optaxs(T, dtype, rtol, rows):
    with jax.enable_x64(dtype == "float64"):
        hidden, head, targets = problem(T, dtype)
        value, gradients = jax.jit(jax.value_and_grad(cross_entropy, (0, 1)))(hidden, head, targets)
        alone = jax.jit(lambda *args: cross_entropy(*args))(hidden, head, targets)
        expected, expected_gradients = jax.jit(jax.value_and_grad(plain_cross_entropy, (0, 1)))(hidden, head, targets)
    assert value.dtype == alone.dtype == head.dtype
    np.testing.assert_allclose(value, expected, rtol=min(rtol, 1e-5))
    np.testing.assert_allclose(alone, expected, rtol=min(rtol, 1e-5))
    for one, two in zip(gradients, expected_gradients, strict=True):
        assert one.dtype == two.dtype
        one, two = np.asarray(one, np.float64), np.asarray(two, np.float64)
        np.testing.assert_allclose(one, two, rtol=rtol, atol=rtol * np.abs(two).max())


def test_a_negative_target_counts_for_nothing_and_one_beyond_the_vocabulary_is_no_number(rows):
    """In the loss alone and beside its gradient; `rows` has all forms of both."""
    hidden, head, targets = map(jnp.asarray, problem(13, "float32"))
    both, losses = jax.jit(jax.value_and_grad(cross_entropy, (0, 1))), jax.jit(lambda *of: token_losses(*of))
    expected = losses(hidden, head, targets).at[1, 2].set(0).mean()
    for nothing in (-1, -2):
        value, (d_hidden, _) = both(hidden, head, targets.at[1, 2].set(nothing))
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        np.testing.assert_allclose(losses(hidden, head, targets.at[1, 2].set(nothing)).mean(), expected, rtol=1e-6)
        np.testing.assert_array_equal(d_hidden[1, 2], 0)
    beyond = targets.at[1, 2].set(len(head))
    assert np.isnan(both(hidden, head, beyond)[0]) and np.isnan(losses(hidden, head, beyond)[1, 2])


@pytest.mark.parametrize("dtype", ["float32", jnp.bfloat16])
def test_double_precision_elsewhere_does_not_change_the_types(dtype):
    with jax.enable_x64(True):
        hidden, head, targets = problem(12, dtype)
        value, gradients = jax.jit(jax.value_and_grad(cross_entropy, (0, 1)))(hidden, head, targets)
    assert (value.dtype, gradients[0].dtype, gradients[1].dtype) == (jnp.float32, hidden.dtype, jnp.float32)


def test_a_cotangent_scales_the_gradients():
    hidden, head, targets = problem(12, "float32")
    value, gradients = jax.jit(jax.value_and_grad(cross_entropy, (0, 1)))(hidden, head, targets)
    cubed = jax.jit(jax.grad(lambda *args: cross_entropy(*args, targets) ** 3, (0, 1)))(hidden, head)
    for one, two in zip(gradients, cubed, strict=True):
        np.testing.assert_allclose(two, 3 * value**2 * one, rtol=1e-4, atol=1e-6)


def test_losses_of_tokens_are_in_their_order(rows):
    hidden, head, targets = problem(12, "float32")
    logits = np.einsum("BTD,VD->BTV", hidden, head).astype(np.float64)
    picked = np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    expected = np.log(np.exp(logits).sum(-1)) - picked
    losses = jax.jit(lambda *args: token_losses(*args))(hidden, head, targets)
    assert losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-5)


def test_the_logits_of_a_batch_never_exist(monkeypatch):
    monkeypatch.setattr(loss_module, "chunk_rows", lambda vocab_size: 4 * B)
    hidden, head, targets = problem(12, "float32")
    jaxpr = str(jax.make_jaxpr(jax.value_and_grad(cross_entropy, (0, 1)))(hidden, head, targets))
    assert f"[{B * 4},{V}]" in jaxpr
    assert f"[{B * 12},{V}]" not in jaxpr and f"[{B},12,{V}]" not in jaxpr


@pytest.mark.parametrize(("vocab_size", "rows"), [(50257, 4096), (50304, 8192), (1000, 16384), (256, 4096)])
def test_tiles_of_the_vocabulary_stay_on_the_chip(vocab_size, rows, monkeypatch):
    assert vocabulary_tiles(vocab_size, rows) is None  # here
    monkeypatch.setattr(loss_module, "chip_of", lambda kind: CHIPS["v5e"])
    count, width = vocabulary_tiles(vocab_size, rows) or (1, vocab_size)
    assert vocab_size <= count * width < 1.03 * vocab_size and width % 128 in (0, vocab_size % 128)
    assert 4 * rows * width <= CHIPS["v5e"].on_chip / 4
    with jax.set_mesh(make_mesh(4, 1, 2)):
        assert vocabulary_tiles(vocab_size, rows) is None  # the vocabulary is split


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 4, 1), (2, 2, 2), (1, 1, 8)])
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_devices_sum_their_gradients_once(platform, shape, monkeypatch):
    """However many chunks there are, one all-reduce carries the head's gradient and one gather the head itself."""
    monkeypatch.setattr(loss_module, "chunk_rows", lambda vocab_size: 1)
    monkeypatch.setattr(loss_module, "platform", lambda: platform)
    rng = np.random.default_rng(0)
    size, T, vocab_size, width = 8, 6, 32, 8
    hidden = rng.standard_normal((size, T, width)).astype(np.float32)
    head = rng.standard_normal((vocab_size, width)).astype(np.float32)
    targets = rng.integers(0, vocab_size, (size, T)).astype(np.int32)
    expected = jax.jit(jax.value_and_grad(plain_cross_entropy, (0, 1)))(hidden, head, targets)

    mesh = make_mesh(*shape)
    with jax.set_mesh(mesh):
        rows = batch_sharding(mesh)
        split = NamedSharding(mesh, PartitionSpec("tensor", "fsdp"))
        compiled = (
            jax.jit(
                jax.value_and_grad(cross_entropy, (0, 1)),
                in_shardings=(rows, split, rows),
                out_shardings=(NamedSharding(mesh, PartitionSpec()), (rows, split)),
            )
            .lower(hidden, head, targets)
            .compile()
        )
        found = compiled(*map(jax.device_put, (hidden, head, targets), (rows, split, rows)))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), found, expected)
    collectives = Program(compiled.as_text()).collectives()
    parts, tensor = shape[0] * shape[1], shape[2]
    part, positions = head.nbytes / tensor, T * size / parts
    over_batch = 2 * (parts - 1) / parts * (part + 4)
    numbers = 3 + width if platform == "cpu" else 1 + width  # maximum, sum, target; hidden gradient
    over_tensor = 2 * (tensor - 1) / tensor * positions * 4 * numbers
    assert collectives["all-reduce"].sent == pytest.approx(over_batch + over_tensor)
    together = 2 * (tensor - 1) * positions * 4 * (platform == "gpu")  # maximum and sum of each part, as one
    if shape[1] > 1 or together:
        assert collectives["all-gather"].sent <= part * (shape[1] > 1) + together


def test_logits_of_any_size_give_a_finite_loss():
    hidden, head, targets = problem(12, "float32")
    value, (d_hidden, d_head) = jax.jit(jax.value_and_grad(cross_entropy, (0, 1)))(hidden * 1e4, head, targets)
    assert np.isfinite(value) and np.all(np.isfinite(d_hidden)) and np.all(np.isfinite(d_head))


# The whole loss

OPTIONS = dict(tolerance=0.05, reduction="row_mean", shape="hinge")
WEIGHT = 0.7


def loss_by_hand(config, variables, tokens):
    logits, entropy, *_ = reference.forward(config, variables, tokens[:, :-1])
    picked = np.take_along_axis(logits, np.asarray(tokens)[:, 1:, None], -1)[..., 0]
    cross = (np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1) - picked).mean()
    if not config.entropy_regularizer:
        return cross, 0.0
    stacks = [stack for stack in ("blocks", "blocks_without_ffn") if stack in variables["params"]]
    threshold = np.concatenate([variables["params"][stack]["attention"]["threshold"] for stack in stacks])
    return cross, penalty_by_hand(entropy, threshold, *OPTIONS.values(), maximum_by_hand(config, entropy.shape[-1]))


def maximum_by_hand(config, T):
    """[L, T]: the logarithm of all keys, or of those that a row sees where slots or windows change that."""
    if not (config.window_pattern or config.num_slots):
        return np.full((config.num_layers, T), np.log(T))
    return np.log([[min(t + 1, window) + config.num_slots for t in range(T)] for window in config.windows])


@functools.cache
def loss_and_gradients(config):
    variables = {**scattered(config)}
    params = variables.pop("params")

    def function(params):
        variables_ = variables  # spectral vectors stay as they are: differences hold them fixed too
        return loss_fn(
            params,
            random_tokens(2, 9),
            model=_Frozen(Transformer(config), variables_),
            penalty_weight=WEIGHT,
            **OPTIONS,
        )

    return jax.jit(jax.value_and_grad(function, has_aux=True))(params)


class _Frozen:
    """A model that reads its other collections without updating them."""

    def __init__(self, model, collections):
        self.model, self.config, self.collections = model, model.config, collections

    def apply(self, variables, *args, mutable, **kwargs):
        assert mutable == []
        return self.model.apply({**variables, **self.collections}, *args, **kwargs), {}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_loss_and_all_its_gradients(name):
    """Along a random direction of each parameter, the slope of the float64 reference."""
    config, rng, step = tiny(name), np.random.default_rng(0), 1e-6
    variables, tokens = reference.to_float64(scattered(config)), np.asarray(random_tokens(2, 9))
    (value, parts), gradients = loss_and_gradients(config)
    cross, penalty = loss_by_hand(config, variables, tokens)
    np.testing.assert_allclose(parts.cross_entropy, cross, rtol=1e-5)
    np.testing.assert_allclose(parts.penalty, penalty, rtol=1e-4)
    np.testing.assert_allclose(value, cross + WEIGHT * penalty, rtol=1e-5)
    assert (penalty > 0) == config.entropy_regularizer

    leaves = jax.tree_util.tree_leaves_with_path(gradients)
    for moved, (path, gradient) in enumerate(leaves):
        direction = rng.standard_normal(gradient.shape)

        def at(distance, moved=moved, direction=direction):
            flat, structure = jax.tree.flatten(variables["params"])
            flat[moved] = flat[moved] + distance * direction
            cross, penalty = loss_by_hand(config, variables | {"params": jax.tree.unflatten(structure, flat)}, tokens)
            return cross + WEIGHT * penalty

        slope, expected = (gradient * direction).sum(), (at(step) - at(-step)) / (2 * step)
        scale = float(jnp.linalg.norm(gradient))
        assert abs(slope - expected) < 1e-3 * abs(expected) + 1e-4 * scale + 1e-6, path_name(path)
        # what is added to every key of a row changes nothing, nor what layer 0 takes of its own values
        in_layer_0 = config.num_layers - config.ffn_free_layers == 1 and path_name(path) == "blocks/attention/value_mix"
        assert scale > 1e-6 or path_name(path).endswith("key/bias") or in_layer_0, path_name(path)


@pytest.mark.parametrize("reduction", ["row_sum", "row_mean", "head_mean"])
@pytest.mark.parametrize("shape", ["deadzone", "hinge"])
def test_the_penaltys_gradient_reaches_queries_keys_temperatures_and_thresholds(reduction, shape):
    config = tiny("EReg(SM(t)+ScFuFFN)", num_layers=1)
    variables, tokens = scattered(config), random_tokens(2, 13)

    def penalty(params):
        _, parts = loss_fn(params, tokens, model=Transformer(config), tolerance=0.02, reduction=reduction, shape=shape)
        return parts.penalty

    gradients = jax.jit(jax.grad(penalty))(variables["params"])
    attention = gradients["blocks"]["attention"]
    t, positions = attention["temperature"], gradients["position_embedding"]
    reached = [attention[name]["kernel"] for name in ("query", "key")]
    reached += [attention["query"]["bias"], t[..., 1:12], attention["threshold"], positions[:12]]
    assert all(np.all(np.isfinite(leaf)) and np.any(np.abs(leaf) > 1e-6) for leaf in reached)
    unreached = [attention["value"], attention["out"], gradients["blocks"]["ffn"], gradients["final_norm"]]
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves([*unreached, t[..., 12:], positions[12:]]))


@pytest.mark.parametrize("name", ["SM+LN+G", "SM(t)+ScFuFFN"])
def test_without_thresholds_there_is_no_penalty(name):
    config = tiny(name)
    loss, parts = jax.jit(lambda p: loss_fn(p, random_tokens(2, 9), model=Transformer(config), penalty_weight=1e9))(
        scattered(config)["params"]
    )
    assert parts.penalty == 0 and loss == parts.cross_entropy and parts.aux.threshold is None


def test_the_weight_may_follow_a_schedule():
    config = tiny("EReg(SM(t)+ScFuFFN)")

    @jax.jit
    def run(step):
        weight = optax.linear_schedule(0.0, 1.0, 10)(step)
        return loss_fn(
            scattered(config)["params"], random_tokens(2, 9), model=Transformer(config), penalty_weight=weight
        )

    for step, weight in ((0, 0.0), (5, 0.5), (20, 1.0)):
        loss, parts = run(step)
        np.testing.assert_allclose(loss, parts.cross_entropy + weight * parts.penalty, rtol=1e-6)


def test_spectral_vectors_come_back_updated():
    config = tiny("SM+SNorm(QK)")
    collections = {**scattered(config)}
    params = collections.pop("params")
    run = jax.jit(lambda c: loss_fn(params, random_tokens(2, 9), model=Transformer(config), collections=c))
    _, parts = run(collections)
    assert jax.tree.structure(parts.collections) == jax.tree.structure(collections)
    pairs = zip(jax.tree.leaves(parts.collections), jax.tree.leaves(collections), strict=True)
    assert all(np.any(one != two) for one, two in pairs)


def test_distillation_needs_a_teacher():
    config = tiny("SM")
    with pytest.raises(UserError, match="distillation=0.5 needs a teacher"):
        loss_fn(scattered(config)["params"], random_tokens(2, 9), model=Transformer(config), distillation=0.5)


def test_dropout_needs_its_key():
    config = tiny("SM+LN+G", embedding_dropout=0.5)
    run = jax.jit(
        lambda key: loss_fn(
            scattered(config)["params"], random_tokens(2, 9), model=Transformer(config), dropout_key=key
        )[0]
    )
    assert run(None) == run(None)
    assert run(jax.random.key(0)) == run(jax.random.key(0)) != run(jax.random.key(1))
    assert run(jax.random.key(0)) != run(None)


# λ over the steps


@pytest.mark.parametrize(
    ("warmup", "expected"),
    [(0.0, {0: 0.2, 50: 0.2, 99: 0.2}), (0.5, {0: 0.0, 25: 0.1, 50: 0.2, 99: 0.2}), (1.0, {0: 0.0, 50: 0.1, 100: 0.2})],
)
def test_the_penaltys_schedule(warmup, expected):
    config = default_config("SM")
    config.penalty.update(weight=0.2, warmup=warmup)
    config.train.num_steps = 100
    schedule = penalty_schedule(config)
    for step, weight in expected.items():
        assert float(schedule(step)) == pytest.approx(weight, abs=1e-7)
