"""What a run watches, against NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from jax_entropy.attention import AttentionStats
from jax_entropy.metrics import entropy_metrics, gradient_norms
from jax_entropy.model import Aux
from tests.tiny_model import ARCHITECTURES, changed, scattered, tiny

L, B, N, T = 3, 4, 2, 16


def random_aux():
    uniform = lambda *arguments: np.random.default_rng(0).uniform(*arguments).astype(np.float32)  # noqa: E731
    stats = AttentionStats(*(uniform(0.1, math.log(T), (L, B, N, T)) for _ in range(3)))
    return Aux(stats, uniform(0, 1, (L, N)), uniform(0.1, 2, (L, N, T)))


def quarters(entropy, maximum):
    share = np.clip((entropy / maximum * 4).astype(int), 0, 3)
    return np.bincount(share.ravel(), minlength=4) / share.size


def test_entropy_metrics():
    aux = random_aux()
    metrics = entropy_metrics(aux)
    head = aux.stats.entropy.astype(np.float64).mean((1, 3))
    causal = np.log(np.arange(1, T + 1)).mean()
    expected = dict(
        head_entropy=head,
        layer_entropy=head.mean(1),
        bands_observed=quarters(head, head.max()),
        bands_context=quarters(head, math.log(T)),
        bands_causal=quarters(head, causal),
        collapse=quarters(head, head.max())[0],
        overload=quarters(head, head.max())[3],
        max_logit=aux.stats.max_logit.max((1, 2, 3)),
        head_max_logit=aux.stats.max_logit.max((1, 3)),
        nan_count=np.zeros(L),
        inf_count=np.zeros(L),
        threshold=aux.threshold,
        threshold_mean=aux.threshold.mean(1),
        threshold_variance=aux.threshold.var(1),
    )
    of_temperature = metrics.pop("temperature")
    assert of_temperature.keys() == {"mean", "min", "max"}
    for name, value in of_temperature.items():
        np.testing.assert_allclose(value, getattr(np, name)(aux.temperature, axis=(1, 2)), rtol=1e-5)
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_the_three_maxima_give_three_shares():
    """Heads at 0.6 of log T: in the third quarter of log T, in the last of what causal heads reach."""
    stats = AttentionStats(*[np.full((L, B, N, T), 0.6 * math.log(T), np.float32)] * 3)
    metrics = entropy_metrics(Aux(stats, None, None))
    np.testing.assert_array_equal(metrics["bands_observed"], [0, 0, 0, 1])
    np.testing.assert_array_equal(metrics["bands_context"], [0, 0, 1, 0])
    np.testing.assert_array_equal(metrics["bands_causal"], [0, 0, 0, 1])
    assert metrics["overload"] == 1 and metrics["collapse"] == 0


def test_what_is_not_learned_is_not_watched():
    learned = ("threshold", "temperature")
    assert not [name for name in entropy_metrics(Aux(random_aux().stats, None, None)) if name.startswith(learned)]


def test_numbers_that_are_none_are_counted_in_their_layer():
    aux = random_aux()
    aux.stats.entropy[1, :2, 0, 3] = math.nan
    aux.stats.entropy[2, 0, 0, 0] = math.nan
    aux.stats.logsumexp[0, 1, 1, :5] = math.inf
    aux.stats.logsumexp[2, 1, 1, 0] = -math.inf
    metrics = entropy_metrics(aux)
    np.testing.assert_array_equal(metrics["nan_count"], [0, 2, 1])
    np.testing.assert_array_equal(metrics["inf_count"], [5, 0, 1])
    np.testing.assert_array_equal(np.isnan(metrics["head_entropy"]), [[False, False], [True, False], [True, False]])
    np.testing.assert_allclose(np.sum(metrics["bands_observed"]), 4 / 6, rtol=1e-6)


def test_bands_of_layers_that_see_more_or_less_have_their_own_maximum():
    """A third of what the rows of a layer can reach is a third of the range, whatever the layer sees."""
    maximum_LxT = np.log(np.random.default_rng(0).integers(2, 40, (L, T))).astype(np.float32)
    entropy = np.broadcast_to(maximum_LxT[:, None, None] / 3, (L, B, N, T))
    metrics = entropy_metrics(Aux(AttentionStats(entropy, entropy, entropy), None, None, maximum_LxT))
    np.testing.assert_array_equal(metrics["bands_causal"], [0, 1, 0, 0])
    np.testing.assert_allclose(metrics["maximum_causal"], maximum_LxT.mean(1), rtol=1e-6)
    np.testing.assert_array_equal(metrics["maximum_context"], maximum_LxT.max(1))
    shares = np.bincount((4 * maximum_LxT.mean(1) / 3 / maximum_LxT.max(1)).astype(int), minlength=4) / L
    np.testing.assert_allclose(metrics["bands_context"], shares)


GROUPS = {
    "embedding": "token_embedding position_embedding value_embedding head",
    "temperature": "blocks/attention/temperature",
    "threshold": "blocks_without_ffn/attention/threshold",
    "scale": "blocks/alpha blocks/beta negative_slope blocks/ffn/negative_slope blocks/attention/value_mix "
    "blocks/attention/value_embedding_scale blocks/attention/log_scale blocks/attention/shift "
    "blocks/attention/qk_gain blocks/attention/query/gamma blocks/norm1/alpha",
    "norm": "blocks/norm1/scale blocks/norm2/bias final_norm/scale",
    "attention": "blocks/attention/query/kernel blocks/attention/key/bias blocks/attention/value/gain "
    "blocks/attention/query_convolution/taps blocks/attention/slot_key",
    "feed_forward": "blocks/ffn/up/kernel blocks/ffn/gate/bias blocks/ffn/down/gain",
}


def test_gradient_norms_are_of_groups_that_part_the_parameters():
    for group, paths in GROUPS.items():
        for path in paths.split():
            assert gradient_norms({path: jnp.ones(4)}) == {group: 2}, path
    known = {path for paths in GROUPS.values() for path in paths.split()}
    for name in ARCHITECTURES:
        gradients = scattered(tiny(name, tied_head=False, bias="all"))["params"]
        known -= {*flatten_dict(gradients, sep="/")}
        norms = gradient_norms(gradients)
        total = sum(np.square(np.asarray(leaf, np.float64)).sum() for leaf in jax.tree.leaves(gradients))
        norm = math.sqrt(sum(float(norm) ** 2 for norm in norms.values()))
        assert norm == pytest.approx(math.sqrt(total), rel=1e-5), name
    assert not known, "no architecture has these parameters"


def test_gradient_norms_of_a_gradient_that_is_not_a_number_say_where():
    gradients = scattered(tiny("SM+LN+G"))["params"]
    path = "blocks/attention/query/kernel"
    gradients = changed(gradients, path, lambda kernel: kernel.at[1, 0, 0, 0].set(jnp.nan))
    norms = jax.jit(gradient_norms)(gradients)
    assert [group for group, norm in norms.items() if np.isnan(norm)] == ["attention"]
