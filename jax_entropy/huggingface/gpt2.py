"""GPT-2 as Hugging Face writes it; its weights are [in, out], and its head is its embedding."""

from jax_entropy.architecture import ModelConfig
from jax_entropy.huggingface.family import Family
from jax_entropy.notation import written_fields


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    D, F = config.model_dim, config.hidden_dim
    block = {"ln_1": (D,), "attn.c_attn": (D, 3 * D), "attn.c_proj": (D, D)}
    block |= {"ln_2": (D,), "mlp.c_fc": (D, F), "mlp.c_proj": (F, D)}
    modules = {f"h.{layer}.{name}": shape for layer in range(config.num_layers) for name, shape in block.items()}
    shapes = {"wte.weight": (config.vocab_size, D), "wpe.weight": (config.context_length, D)}
    for name, shape in (modules | {"ln_f": (D,)}).items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[-1:]}
    return shapes


GPT2 = Family(
    model_type="gpt2",
    language_model="GPT2LMHeadModel",
    sizes={
        "vocab_size": ("vocab_size", 50257),
        "n_positions": ("context_length", 1024),
        "n_embd": ("model_dim", 768),
        "n_layer": ("num_layers", 12),
        "n_head": ("num_heads", 12),
        "n_inner": ("ffn_dim", None),
        "layer_norm_epsilon": ("norm_epsilon", 1e-5),
        "initializer_range": ("init_std", 0.02),
        "embd_pdrop": ("embedding_dropout", 0.1),
    },
    activations={
        "gelu_new": "gelu_tanh",
        "gelu_pytorch_tanh": "gelu_tanh",
        "gelu_python_tanh": "gelu_tanh",
        "gelu_accurate": "gelu_tanh",
        "gelu_fast": "gelu_tanh",  # √(2/π) to ten digits
        "gelu": "gelu",
        "gelu_python": "gelu",
        "relu": "relu",
    },
    fixed_keys={
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    },
    free_keys={"reorder_and_upcast_attn": False},  # the order of a product and a scale, in float32 the same
    fields=dict(norm="layer", final_norm="layer", bias="all"),
    fixed_fields=dict(norm="layer", final_norm="layer", tied_head=True, embedding_scale=1.0, learned_positions=True)
    | {name: value for name, value in written_fields("SM+LN+G").items() if name != "activation"},
    tensors={
        "wte.weight": "token_embedding",
        "wpe.weight": "position_embedding",
        "ln_f.weight": "final_norm/scale",
        "ln_f.bias": "final_norm/bias",
    },
    block_tensors={
        "ln_1.weight": ("blocks/norm1/scale",),
        "ln_1.bias": ("blocks/norm1/bias",),
        "attn.c_attn.weight": tuple(f"blocks/attention/{name}/kernel" for name in ("query", "key", "value")),
        "attn.c_attn.bias": tuple(f"blocks/attention/{name}/bias" for name in ("query", "key", "value")),
        "attn.c_proj.weight": ("blocks/attention/out/kernel",),
        "attn.c_proj.bias": ("blocks/attention/out/bias",),
        "ln_2.weight": ("blocks/norm2/scale",),
        "ln_2.bias": ("blocks/norm2/bias",),
        "mlp.c_fc.weight": ("blocks/ffn/up/kernel",),
        "mlp.c_fc.bias": ("blocks/ffn/up/bias",),
        "mlp.c_proj.weight": ("blocks/ffn/down/kernel",),
        "mlp.c_proj.bias": ("blocks/ffn/down/bias",),
    },
    tensor_prefix="transformer.",
    block_prefix="h.{}.",
    constants=(".attn.bias", ".attn.masked_bias"),
    shapes=_shapes,
)  # fmt: skip
