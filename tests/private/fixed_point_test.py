"""What fixed point would not hold is refused before it is run; what it holds, the engine computes right."""

import jax
import numpy as np
import pytest

from jax_entropy.errors import UserError
from jax_entropy.private.cost.account import run_whole
from jax_entropy.private.engine.engine import Setting
from jax_entropy.private.program.blueprint import Rewrites
from jax_entropy.private.program.export import export
from jax_entropy.private.program.fixed_point import check_range, largest_value
from jax_entropy.private.program.forward import float32_logits
from tests.tiny_model import changed, scattered, tiny

PROMPT = (0, 5, 3)


def test_numbers_beyond_fixed_point_are_refused_with_layer_and_value():
    config = tiny("SM")
    variables = jax.tree.map(lambda x: x, scattered(config))
    up = variables["params"]["blocks"]["ffn"]["up"]
    variables["params"]["blocks"]["ffn"]["up"] = {"kernel": up["kernel"] * np.array([1, 5e7])[:, None, None]}
    with pytest.raises(UserError, match=r"layer 1 reaches .*e\+.*fraction_bits=18"):
        check_range(export(config, variables, Rewrites(merged=False)), list(PROMPT), Setting())
    check_range(export(config, scattered(config)), list(PROMPT), Setting())


def test_scores_beyond_the_exponential_are_refused():
    config = tiny("SM")
    variables = {"params": dict(scattered(config)["params"])}
    block = dict(variables["params"]["blocks"])
    attention = dict(block["attention"])
    attention["query"] = jax.tree.map(lambda x: x * 12000, attention["query"])
    variables["params"]["blocks"] = block | dict(attention=attention)
    with pytest.raises(UserError, match="softmax of layer 0 .* exponent=pade"):
        check_range(export(config, variables), list(PROMPT), Setting())
    with pytest.raises(UserError, match="down to -48; raise exponent_iterations, or leave out the rewrite shifts"):
        check_range(export(config, variables), list(PROMPT), Setting(), steps=True)
    with pytest.raises(UserError, match="softmax of layer 0 .* down to -108.8; .* exponent=pade"):
        check_range(export(config, variables, Rewrites(shifts=False)), list(PROMPT), Setting(), steps=True)
    pade = Setting(exponent="pade")
    check_range(export(config, variables, setting=pade), list(PROMPT), pade)


def widened(config, scale):
    """The model with hidden values that are so many times larger, and what reads them as much smaller."""
    params = scattered(config)["params"]
    params = changed(params, "blocks/ffn/up/kernel", lambda kernel: kernel * scale)
    return {"params": changed(params, "blocks/ffn/down/kernel", lambda kernel: kernel / scale)}


@pytest.mark.parametrize("scale", [30, 300])
def test_a_cube_inside_of_gelu_is_looked_at(engine, scale):
    """tanh-GELU's result stays far below what its x³ reaches, which decides whether the engine is right."""
    config, setting = tiny("SM+LN+G", activation="gelu_tanh"), Setting(fraction_bits=20)
    exported = export(config, widened(config, scale))
    _, _, logits = run_whole(engine(setting), exported, PROMPT)
    error = np.abs(logits - float32_logits(exported, PROMPT)).max()
    if scale == 30:
        check_range(exported, PROMPT, setting)
        assert error < 0.1
    else:
        with pytest.raises(UserError, match=r"a value in GELU \(tanh\) of layer 0 reaches .* fewer fraction bits"):
            check_range(exported, PROMPT, setting)
        assert error > 1


def test_every_operation_on_a_secret_is_looked_at():
    """No result of a stage is too large here; a sum of squares inside of a norm is."""
    setting = Setting(fraction_bits=24)
    config = tiny("SM+LN", model_dim=16)
    variables = {"params": changed(scattered(config)["params"], "position_embedding", lambda x: 0 * x)}
    largest = np.abs(variables["params"]["token_embedding"]).max()
    at_limit = changed(variables["params"], "token_embedding", lambda x: x / largest * 0.1 * largest_value(setting))
    with pytest.raises(UserError, match="a value in LayerNorm of layer 0 reaches"):
        check_range(export(config, {"params": at_limit}, Rewrites(folded=False)), PROMPT, setting)
