"""Models made of the authors' published PyTorch blocks: their logits, entropies, losses and every gradient.

The blocks add biases to the outputs of V, O and the feed-forward that they never train. They are zero when training
starts and so are not part of our `bias="qk"`; the files hold random ones, so that our `bias="all"` is compared here.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_entropy.architecture import ModelConfig, architecture
from jax_entropy.loss import loss_fn
from jax_entropy.model import Transformer
from tests import GOLDEN

ACTIVATIONS = {"gelu": "G", "relu": "R", "leaky_relu": "LR(0.03)", "learnable_lrelu": "LR(layer)"}
UNTRAINED = ("attn.v_attn.bias", "attn.c_proj.bias", "mlp.c_fc.bias", "mlp.c_proj.bias")


def published_config(golden: dict[str, np.ndarray], norm: str, activation: str, implementation: str) -> ModelConfig:
    stored = json.loads(str(golden["config"]))
    return architecture(
        ("SM+LN+" if norm == "ln" else "SM+") + ACTIVATIONS[activation],
        num_layers=stored["n_layer"],
        num_heads=stored["num_attention_heads"],
        model_dim=stored["hidden_size"],
        ffn_dim=stored["n_inner"],
        context_length=stored["max_position_embeddings"],
        vocab_size=stored["vocab_size"],
        norm_epsilon=stored["layer_norm_epsilon"],
        bias="all",
        attention=implementation,
    )


def as_ours(published: dict[str, np.ndarray], config: ModelConfig) -> dict:
    """Parameters (or their gradients) of the published blocks in our tree; uses up every entry of `published`."""
    L, D, N, H, F = config.num_layers, config.model_dim, config.num_heads, config.head_dim, config.hidden_dim

    def stack(name: str) -> jax.Array:
        return jnp.stack([published.pop(f"h.{layer}.{name}") for layer in range(L)])

    def linear(name: str, in_shape: tuple[int, ...], out_shape: tuple[int, ...]) -> dict:
        kernel, bias = stack(f"{name}.weight"), stack(f"{name}.bias")
        return {"kernel": kernel.reshape(L, *in_shape, *out_shape), "bias": bias.reshape(L, *out_shape)}

    def normalisation(name: str) -> dict:
        return {"scale": stack(f"{name}.weight"), "bias": stack(f"{name}.bias")}

    weight_LxDx2xNxH = stack("attn.qk_attn.weight").reshape(L, D, 2, N, H)
    bias_Lx2xNxH = stack("attn.qk_attn.bias").reshape(L, 2, N, H)
    attention = {
        "query": {"kernel": weight_LxDx2xNxH[:, :, 0], "bias": bias_Lx2xNxH[:, 0]},
        "key": {"kernel": weight_LxDx2xNxH[:, :, 1], "bias": bias_Lx2xNxH[:, 1]},
        "value": linear("attn.v_attn", (D,), (N, H)),
        "out": linear("attn.c_proj", (N, H), (D,)),
    }
    ffn = {"up": linear("mlp.c_fc", (D,), (F,)), "down": linear("mlp.c_proj", (F,), (D,))}
    if config.slope == "layer":
        ffn["negative_slope"] = jnp.diagonal(stack("mlp.act.slopes"))  # each layer uses its own entry of its own copy
    blocks = {"attention": attention, "ffn": ffn}
    if config.norm == "layer":
        blocks |= {"norm1": normalisation("ln_1"), "norm2": normalisation("ln_2")}
    return {
        "token_embedding": published.pop("wte.weight"),
        "position_embedding": published.pop("wpe.weight"),
        "blocks": blocks,
        "final_norm": {"scale": published.pop("ln_f.weight"), "bias": published.pop("ln_f.bias")},
    }


def rounding_error(run, params: dict, exact: dict) -> dict:
    """How far one rounding of the weights moves each array that `run` returns, by its largest entry.

    Without normalisation the last layer's scores reach ±6000, where neighbouring float32 numbers are 5e-4 apart, and
    some rows are nearly ties: there no two float32 programs agree to five digits, torch's own among them.
    """
    rng = np.random.default_rng(0)
    moved = jax.tree.map(lambda x: 0.0, exact)
    for _ in range(4):
        rounded = jax.tree.map(lambda x: x * (1 + 2.0**-23 * rng.uniform(-1, 1, x.shape)).astype(np.float32), params)
        moved = jax.tree.map(lambda m, x, y: max(m, np.max(np.abs(x - y))), moved, run(rounded), exact)
    return moved


@pytest.mark.parametrize("implementation", ["dense", "blockwise"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", ["ln", "free"])
def test_numbers_of_the_published_blocks(norm, activation, implementation):
    golden = dict(np.load(GOLDEN / f"gpt2_{norm}_{activation}.npz"))
    config = published_config(golden, norm, activation, implementation)
    model, tokens_BxT = Transformer(config), jnp.asarray(golden["input_ids"], jnp.int32)
    published, expected = (
        {name.removeprefix(kind): value for name, value in golden.items() if name.startswith(kind)}
        for kind in ("param/", "grad/")
    )
    # An untrained bias has no gradient: not-a-number stands for it.
    expected |= {name: np.full_like(published[name], np.nan) for name in published if name.endswith(UNTRAINED)}
    params, expected_gradients = as_ours(published, config), as_ours(expected, config)
    assert not published and not expected

    @jax.jit
    def run(params):
        logits, aux = model.apply({"params": params}, tokens_BxT)
        (loss, _), gradients = jax.value_and_grad(loss_fn, has_aux=True)(params, tokens_BxT, model=model)
        return {"logits": logits, "entropy": aux.stats.entropy, "loss": loss, "gradients": gradients}

    actual = run(params)
    desired = {name: golden[name] for name in ("logits", "entropy", "loss")} | {"gradients": expected_gradients}
    assert jax.tree.structure(actual) == jax.tree.structure(desired)
    slack = rounding_error(run, params, actual) if norm == "free" else jax.tree.map(lambda x: 0.0, actual)

    def compare(path, actual, desired, slack):
        rtol = 1e-3 if path[0].key == "gradients" else 1e-4
        if not np.isnan(desired).all():
            name = jax.tree_util.keystr(path)
            assert slack <= 1e-4 + 0.01 * np.max(np.abs(desired)), name
            np.testing.assert_allclose(actual, desired, rtol=rtol, atol=1e-5 + 2 * slack, err_msg=name)

    jax.tree_util.tree_map_with_path(compare, actual, desired, slack)
