"""The families of decoders that can be looked into, a record each."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jax_entropy.errors import UserError
from jax_entropy.huggingface.decoder import Decoder, DecoderFamily, Settings
from jax_entropy.huggingface.gpt2 import GPT2 as _OURS

_ACTIVATIONS = {**_OURS.activations, "silu": "silu", "swish": "silu"}


def _decoder(
    settings: Settings, *, layers: str, heads: str, width: str, positions: str, norm: str, epsilon: str,
    hidden: tuple[str, ...], activation: str, default_activation: str, default_epsilon: float = 1e-5, **fields: Any,
) -> Decoder:  # fmt: skip
    """What all families share, under the keys that a family gives it; `fields` are known already or computed."""
    N, D, L = settings.number(heads), settings.number(width), settings.number(layers)
    context_length = settings.number(positions)
    H = settings.number("head_dim", default=D // N) if fields.get("frequencies") is not None else D // N
    common = dict(
        vocab_size=settings.number("vocab_size"), context_length=context_length, model_dim=D, num_layers=L, num_heads=N,
        num_groups=N, head_dim=H, norm=norm, gated=False, parallel=False, frequencies=(),
        hidden_dim=settings.number(*hidden, default=4 * D),
        epsilon=settings.number(epsilon, default=default_epsilon, kind=float),
        activation=settings.choice(activation, choices=_ACTIVATIONS, default=default_activation),
        windows=(context_length,) * L, scales=(H**-0.5,) * L,
    )  # fmt: skip
    return Decoder(**common | fields)


def _gpt2(settings: Settings) -> Decoder:
    decoder = _decoder(
        settings, layers="n_layer", heads="n_head", width="n_embd", positions="n_positions", norm="layer",
        epsilon="layer_norm_epsilon", hidden=("n_inner",), activation="activation_function",
        default_activation="gelu_new",
    )  # fmt: skip
    if not settings.stored.get("scale_attn_by_inverse_layer_idx"):
        return decoder
    return decoder._replace(scales=tuple(scale / (i + 1) for i, scale in enumerate(decoder.scales)))


def _gpt_neo(settings: Settings) -> Decoder:
    decoder = _decoder(
        settings, layers="num_layers", heads="num_heads", width="hidden_size", positions="max_position_embeddings",
        norm="layer", epsilon="layer_norm_epsilon", hidden=("intermediate_size",), activation="activation_function",
        default_activation="gelu_new",
    )  # fmt: skip
    L, types = decoder.num_layers, settings.stored.get("attention_types", [[["global", "local"], 12]])
    try:
        layers = [kind for kinds, count in types for _ in range(count) for kind in kinds]
        sees = {"global": decoder.context_length, "local": settings.number("window_size", default=256)}
        windows = tuple(sees[kind] for kind in layers)
    except (TypeError, ValueError, KeyError):
        windows = ()
    if len(windows) != L:
        raise UserError(f"{settings.path} has attention_types={types!r}, which do not name the attention of {L} layers")
    return decoder._replace(windows=windows, scales=(1.0,) * L)


def _gpt_neox(settings: Settings) -> Decoder:
    return _decoder(
        settings, layers="num_hidden_layers", heads="num_attention_heads", width="hidden_size",
        positions="max_position_embeddings", norm="layer", epsilon="layer_norm_eps", hidden=("intermediate_size",),
        activation="hidden_act", default_activation="gelu",
        parallel=bool(settings.stored.get("use_parallel_residual", True)), frequencies=_frequencies(settings, 0.25),
    )  # fmt: skip


def _llama(settings: Settings) -> Decoder:
    return _decoder(
        settings, layers="num_hidden_layers", heads="num_attention_heads", width="hidden_size",
        positions="max_position_embeddings", norm="rms", epsilon="rms_norm_eps", default_epsilon=1e-6,
        hidden=("intermediate_size",),
        activation="hidden_act", default_activation="silu", gated=True, frequencies=_frequencies(settings, 1.0),
        num_groups=settings.number("num_key_value_heads", "num_attention_heads"),
    )  # fmt: skip


def _mistral(settings: Settings) -> Decoder:
    decoder, stored = _llama(settings), settings.stored
    groups = settings.number("num_key_value_heads", default=8)
    unlimited = "sliding_window" in stored and stored["sliding_window"] is None
    sees = decoder.context_length if unlimited else settings.number("sliding_window", default=4096)
    return decoder._replace(num_groups=groups, windows=(sees,) * decoder.num_layers)


def _qwen2(settings: Settings) -> Decoder:
    decoder, stored = _llama(settings), settings.stored
    if not stored.get("use_sliding_window"):
        return decoder
    L, first = decoder.num_layers, settings.number("max_window_layers", default=28, least=0)
    kinds = ["full_attention"] * min(first, L) + ["sliding_attention"] * max(L - first, 0)
    kinds = stored.get("layer_types") or kinds
    sees = dict(
        full_attention=decoder.context_length, sliding_attention=settings.number("sliding_window", default=4096)
    )
    if not isinstance(kinds, list) or len(kinds) != L or not all(kind in list(sees) for kind in kinds):
        raise UserError(f"{settings.path} has layer_types={kinds!r}, which do not name the attention of {L} layers")
    return decoder._replace(windows=tuple(sees[kind] for kind in kinds))


def _frequencies(settings: Settings, share: float) -> tuple[float, ...]:
    """Of rotation, as older and newer files write it; of `share` of a head's numbers where the file does not say."""
    stored = settings.stored
    rope = stored.get("rope_parameters") or stored.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{settings.path} has rope_parameters={rope!r}, which must be an object")
    asked = Settings(settings.path, stored | rope)
    kind = rope.get("rope_type", rope.get("type", "default"))
    width = settings.number("hidden_size") // settings.number("num_attention_heads")
    width = settings.number("head_dim", default=width)
    rotated = int(width * asked.number("partial_rotary_factor", "rotary_pct", default=share, kind=float))
    if rotated > width or rotated % 2:
        raise UserError(
            f"{settings.path} rotates {rotated} numbers of a head of {width}; an even part of it can be read"
        )
    base = asked.number("rope_theta", "rotary_emb_base", default=1e4, kind=float)
    plain = [base ** (-i / rotated) for i in range(0, rotated, 2)]
    if kind == "default":
        return tuple(plain)
    if kind not in ("linear", "llama3"):
        raise UserError(f"{settings.path} has rope_type={kind!r}; only default, linear and llama3 can be read")
    factor = asked.number("factor", kind=float)
    if kind == "linear":
        return tuple(frequency / factor for frequency in plain)
    low, high = (asked.number(f"{end}_freq_factor", kind=float) for end in ("low", "high"))
    if low >= high:
        raise UserError(f"{settings.path} has high_freq_factor={high}, which must be above low_freq_factor={low}")
    turns = [asked.number("original_max_position_embeddings") * frequency / (2 * math.pi) for frequency in plain]
    kept = [min(max((turn - low) / (high - low), 0.0), 1.0) for turn in turns]
    return tuple(frequency * (k + (1 - k) / factor) for frequency, k in zip(plain, kept, strict=True))


def _thirds(array: np.ndarray, decoder: Decoder) -> Sequence[np.ndarray]:
    return np.split(array, 3, axis=-1)


def _by_head(array: np.ndarray, decoder: Decoder) -> Sequence[np.ndarray]:
    parts = array.reshape(*array.shape[:-1], decoder.num_heads, 3, decoder.head_dim)
    return [parts[..., i, :].reshape(*array.shape[:-1], -1) for i in range(3)]


_LLAMA = DecoderFamily(
    model_type="llama",
    settings=_llama,
    fixed={},
    tied=False,
    prefix="model.",
    modules=dict(embedding="embed_tokens", final_norm="norm", head="lm_head"),
    block="layers.{}.",
    block_modules=dict(
        norm1="input_layernorm", query="self_attn.q_proj", key="self_attn.k_proj", value="self_attn.v_proj",
        out="self_attn.o_proj", norm2="post_attention_layernorm", gate="mlp.gate_proj", up="mlp.up_proj",
        down="mlp.down_proj",
    ),
    constants=(".rotary_emb.inv_freq",),
)  # fmt: skip

FAMILIES = (
    DecoderFamily(
        model_type="gpt2",
        settings=_gpt2,
        fixed={"scale_attn_weights": True, "add_cross_attention": False},
        tied=True,
        prefix="transformer.",
        modules=dict(embedding="wte", positions="wpe", final_norm="ln_f", head="lm_head"),
        block="h.{}.",
        block_modules=dict(
            norm1="ln_1", fused="attn.c_attn", out="attn.c_proj", norm2="ln_2", up="mlp.c_fc", down="mlp.c_proj"
        ),
        transposed=False,
        split=_thirds,
        constants=(".attn.bias", ".attn.masked_bias"),
    ),
    DecoderFamily(
        model_type="gpt_neo",
        settings=_gpt_neo,
        fixed={},
        tied=True,
        prefix="transformer.",
        modules=dict(embedding="wte", positions="wpe", final_norm="ln_f", head="lm_head"),
        block="h.{}.",
        block_modules=dict(
            norm1="ln_1", query="attn.attention.q_proj", key="attn.attention.k_proj", value="attn.attention.v_proj",
            out="attn.attention.out_proj", norm2="ln_2", up="mlp.c_fc", down="mlp.c_proj",
        ),
        constants=(".attn.attention.bias", ".attn.attention.masked_bias"),
    ),
    DecoderFamily(
        model_type="gpt_neox",
        settings=_gpt_neox,
        fixed={},
        tied=False,
        prefix="gpt_neox.",
        modules=dict(embedding="embed_in", final_norm="final_layer_norm", head="embed_out"),
        block="layers.{}.",
        block_modules=dict(
            norm1="input_layernorm", fused="attention.query_key_value", out="attention.dense",
            norm2="post_attention_layernorm", up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h",
        ),
        split=_by_head,
        constants=(".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq"),
    ),
    _LLAMA,
    _LLAMA._replace(model_type="mistral", settings=_mistral),
    _LLAMA._replace(model_type="qwen2", settings=_qwen2),
)  # fmt: skip
