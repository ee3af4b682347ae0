"""Predicted bytes and rounds are the measured ones of shapes that no coefficient was fitted to."""

import pytest

from jax_entropy.architecture import architecture
from jax_entropy.errors import UserError
from jax_entropy.private.cost_model import predict, predict_total, weights_opened_once
from jax_entropy.private.engine import Setting
from jax_entropy.private.export import export
from jax_entropy.private.fixed_point import random_tokens
from jax_entropy.private.ledger import PLAIN, profile
from jax_entropy.private.measure import random_variables
from jax_entropy.private.stage import Steps
from tests.private_helpers import need_engine

# None of these sizes is among those of docs/benchmarks/private.md's calibration.
HELD_OUT = dict(num_layers=3, num_heads=5, model_dim=80, context_length=48, vocab_size=150)


def measure(config, steps):
    need_engine()
    return profile(export(config, random_variables(config), steps), random_tokens(config.vocab_size, 48), Setting())


@pytest.mark.parametrize("steps", [PLAIN, Steps()], ids=["plain", "optimised"])
@pytest.mark.parametrize("name", ["SM+LN+G", "EReg(SM(t)+ScFuFFN)"])
def test_held_out_shapes(name, steps):
    config = architecture(name, **HELD_OUT)
    measured = measure(config, steps)
    predicted = predict(config, 48, Setting(), steps == PLAIN)
    assert {kind: account.rounds for kind, account in measured.by_kind().items()} == {
        kind: account.rounds for kind, account in predicted.items()
    }
    total = predict_total(config, 48, Setting(), steps == PLAIN)
    assert total.rounds == measured.total().rounds
    assert total.bytes[0] == pytest.approx(measured.total().bytes[0], rel=0.02)
    if steps != PLAIN:
        opened = measured.total("cold").bytes[0] - measured.total().bytes[0]
        assert opened == pytest.approx(8 * weights_opened_once(config), rel=0.02)


def test_what_was_not_measured_is_said():
    config = architecture("SM+RN+G", **HELD_OUT)
    with pytest.raises(UserError, match="RMSNorm of SM.RN.G was not measured"):
        predict(config, 48, Setting())
    with pytest.raises(UserError, match="two heads or more"):
        predict(architecture("SM", **HELD_OUT | dict(num_heads=1)), 48, Setting())
    with pytest.raises(UserError, match="no coefficients for cheetah 18 bits"):
        predict(config, 48, Setting(protocol="cheetah"))
