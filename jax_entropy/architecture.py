"""What a model is made of: `ModelConfig`, and `architecture`, which makes one from the paper's notation.

`architecture("EReg(SM(t)+ScFuFFN^6)", num_layers=12)` gives the config, `str(config)` gives the notation back.
"""

import dataclasses
import math
import re
from typing import Any

from jax_entropy.errors import UserError, check_choice, check_kind, nearest
from jax_entropy.notation import TARGETS, notation, written_fields

CHOICES = {
    "norm": ("none", "layer", "rms", "frozen", "tanh"),
    "final_norm": ("none", "layer", "rms", "frozen", "tanh"),
    "activation": ("identity", "gelu", "gelu_tanh", "relu", "leaky_relu"),
    "slope": ("fixed", "layer", "global"),
    "ffn": ("full", "fused", "bilinear"),
    "reparametrization": ("none", "weight", "spectral", "sigma"),
    "reparametrized": ("", *TARGETS),
    "temperature_parameter": ("direct", "log"),
    "bias": ("none", "qk", "all"),
    "remat": ("none", "attention+ffn", "attention", "full"),  # each computes more again than the one before
    "value_embedding_layers": ("alternate", "all"),
    "dtype": ("float32", "bfloat16"),
}
_WIDER = {float: float | int, float | None: float | int | None}  # what the values of a field may be beside its own type
_KINDS = {
    int: "a whole number", int | None: "a whole number, or None", float | int: "a number",
    float | int | None: "a number, or None", bool: "True or False", str: "text",
}  # fmt: skip
_LEAST_TEMPERATURE = 1e-3  # ten times the floor, of which it is 0.5 % larger than itself
_AT_LEAST_1 = ("num_layers", "num_heads", "model_dim", "ffn_dim", "context_length", "vocab_size")
_NOT_NEGATIVE = ("scan_unroll", "conv_width", "num_slots", "window", "logit_cap")
_ABOVE_0 = ("temperature_init", "alpha_init", "init_std", "residual_init_std", "norm_epsilon", "rotary_base")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer; the defaults are the paper's GPT-2 baseline `SM+LN+G` on 12 layers.

    Raises:
      UserError (a ValueError): names the field that is wrong, its value and the nearest valid choice.
    """

    num_layers: int = 12
    num_heads: int = 12
    model_dim: int = 768
    ffn_dim: int | None = None  # None: 4·D, D where the feed-forward is fused, 2·D where it is bilinear
    context_length: int = 128  # tokens
    vocab_size: int = 50257

    # What the notation writes.
    norm: str = "layer"  # before attention and feed-forward: none | layer | rms | frozen (linear) | tanh (DyT)
    activation: str = "gelu"  # identity | gelu (erf) | gelu_tanh | relu | leaky_relu
    negative_slope: float = 0.01  # of leaky_relu; the initial value where it is learned
    slope: str = "fixed"  # of leaky_relu: fixed | layer (learned, one a layer) | global (learned, one in all)
    ffn: str = "full"  # full | fused (one D×D matrix) | bilinear (the product of two branches)
    scaled: bool = False  # Eq. 8: learned α and β around the feed-forward
    ffn_free_layers: int = 0  # the k deepest blocks have no feed-forward
    reparametrization: str = "none"  # none | weight | spectral | sigma (spectral times a learned scalar)
    reparametrized: str = ""  # which linear layers: QK | FFN | QK+FFN | QKV+FFN | QKVO+FFN
    learnable_temperature: bool = False  # SM(t), one per head and query position
    power: int = 0  # PSM(p): weights are (s + c)^p, normalised, with a learned c a head; 0: softmax
    entropy_regularizer: bool = False  # EReg: learned thresholds θ [L, N]
    conv_width: int = 0  # Conv4: causal depthwise convolution over so many positions of q, k and v
    rotary: bool = False  # RoPE: q and k are rotated by their positions
    qk_norm: bool = False  # QKN: queries and keys have the size of 1, times a learned scalar a head
    logit_cap: int = 0  # Cap(30): logits are 30·tanh(s/30); 0: none
    value_residual: bool = False  # VRes: v of layer 0 is mixed into those of the others
    log_scale: bool = False  # SM(log): scores times s·log(visible keys), one learned s for each head
    value_embedding: bool = False  # VEmb: a second table of tokens is added to v
    num_slots: int = 0  # Mem8: so many learned keys and values a head, seen by every query
    window_pattern: str = ""  # Win(SSSL,32): S a layer with a window, L one that sees all, repeated over the layers
    window: int = 0  # keys that a query sees in an S, its own and those before it

    # What it leaves open.
    temperature_init: float = 1e-2  # divisor of the scaled logits
    temperature_parameter: str = "direct"  # direct (as published) | log
    threshold_init: float = 0.5  # θ₀, a fraction of maximum entropy
    alpha_init: float = 1.0  # of the scaled feed-forward
    beta_init: float = 1.0
    final_norm: str = "layer"  # kept in the authors' normalisation-free models too
    bias: str = "qk"  # none | qk (as the authors) | all (as GPT-2)
    learned_positions: bool = True  # a table of positions, added to the embeddings
    rotary_base: float = 1e4  # the longest wavelength of RoPE is about 2π times this, in tokens
    value_residual_init: float = 0.5  # share of layer 0 in VRes
    log_scale_init: float = 0.25  # s of SM(log)
    value_embedding_init: float = 0.5  # factor of the table of VEmb
    value_embedding_layers: str = "alternate"  # alternate (the last and every other before it) | all
    tied_head: bool = True
    embedding_scale: float = 1.0  # √D in Languini's GPT
    embedding_dropout: float = 0.0
    init_std: float = 0.02
    residual_init_std: float | None = None  # of what is written to the residual stream; None: init_std
    norm_epsilon: float = 1e-5

    # How it is computed.
    attention: str = "auto"  # implementation of the operator
    scan_unroll: int = 0  # layers unrolled in one turn of the scan; 0: by the rule of the model
    remat: str = "none"  # of a block for its backward pass: nothing, all but what is named, or all, is computed again
    dtype: str = "float32"  # of activations and matrix products; statistics and loss are float32

    def __post_init__(self) -> None:
        _check_values(self)
        _check_sizes(self)
        _check_together(self)

    @property
    def head_dim(self) -> int:
        """H = D / N."""
        return self.model_dim // self.num_heads

    @property
    def hidden_dim(self) -> int:
        """F, the width between the feed-forward's matrices."""
        return self.ffn_dim or {"full": 4, "fused": 1, "bilinear": 2}[self.ffn] * self.model_dim

    @property
    def stacks(self) -> dict[str, range]:
        """The layers whose parameters lie stacked under a name."""
        with_ffn = self.num_layers - self.ffn_free_layers
        stacks = {"blocks": range(with_ffn), "blocks_without_ffn": range(with_ffn, self.num_layers)}
        return {name: layers for name, layers in stacks.items() if layers}

    @property
    def windows(self) -> tuple[int, ...]:
        """How many tokens a query sees in each layer, its own and those before it."""
        letters = (self.window_pattern or "L") * self.num_layers
        return tuple(self.window if letter == "S" else self.context_length for letter in letters[: self.num_layers])

    @property
    def embedded_values(self) -> tuple[bool, ...]:
        """Which layers have a table added to their values."""
        every = self.value_embedding_layers == "all"
        return tuple(
            self.value_embedding and (every or (self.num_layers - layer) % 2 == 1) for layer in range(self.num_layers)
        )

    def __str__(self) -> str:
        """The architecture in the paper's notation."""
        return notation(self)


def _check_values(config: ModelConfig) -> None:
    """Checks each field by itself.

    Raises:
      UserError: one cannot have its value.
    """
    for name, choices in CHOICES.items():
        check_choice(f"model field {name}", getattr(config, name), choices)
    for field in dataclasses.fields(config):
        kind, value = _WIDER.get(field.type, field.type), getattr(config, field.name)
        if not isinstance(value, kind):
            raise UserError(f"model field {field.name}={value!r} must be {_KINDS[kind]}")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"model field {field.name}={value} must be a finite number")
    given = {name: value for name, value in vars(config).items() if value is not None}
    for names, holds, words in (
        (_AT_LEAST_1, lambda value: value >= 1, "a whole number of at least 1"),
        (_NOT_NEGATIVE, lambda value: value >= 0, "a whole number of at least 0"),
        (_ABOVE_0, lambda value: value > 0, "above 0"),
    ):
        for name in names:
            if name in given and not holds(given[name]):
                raise UserError(f"model field {name}={given[name]!r} must be {words}")
    if config.temperature_parameter == "direct" and config.temperature_init < _LEAST_TEMPERATURE:
        raise UserError(
            f"model field temperature_init={config.temperature_init} is too close to the floor of direct temperatures; "
            f"the least is {_LEAST_TEMPERATURE}, or take temperature_parameter='log'"
        )
    if not 0 <= config.embedding_dropout < 1:
        raise UserError(f"model field embedding_dropout={config.embedding_dropout} must be in [0, 1)")
    if not (0 <= config.power <= 16 and config.power % 2 == 0):
        raise UserError(f"the power of PSM({config.power}) must be even, from 2 to 16")
    if config.conv_width == 1:
        raise UserError("Conv1 (conv_width=1) sees no other position; the narrowest convolution is Conv2")


def _check_sizes(config: ModelConfig) -> None:
    """Checks what is as large as something else, or a part of it.

    Raises:
      UserError: sizes that do not fit.
    """
    D, N, T, window = config.model_dim, config.num_heads, config.context_length, config.window
    if D % N:
        close = min((n for n in range(1, D + 1) if D % n == 0), key=lambda n: abs(n - N))
        raise UserError(
            f"model_dim={D} is not divisible by num_heads={N}; the nearest count of heads that divides it is {close}"
        )
    if not 0 <= config.ffn_free_layers <= config.num_layers:
        raise UserError(
            f"^{config.ffn_free_layers} asks for more blocks without feed-forward than there are layers; "
            f"with num_layers={config.num_layers} the largest is ^{config.num_layers}"
        )
    if config.ffn == "fused" and config.ffn_dim not in (None, D):
        raise UserError(f"a fused feed-forward (ScFuFFN) is D×D: ffn_dim={config.ffn_dim} must be {D}")
    if config.conv_width > T:
        raise UserError(
            f"Conv{config.conv_width} reaches over more positions than there are; with context_length={T} the widest "
            f"convolution is Conv{T}"
        )
    if bool(config.window_pattern) != bool(window) or not re.fullmatch("[SL]*", config.window_pattern):
        raise UserError(
            f"Win({config.window_pattern},{window}) is no pattern of windows: S for a layer with one, L for one that "
            "sees all, and how many keys an S sees, as in Win(SSSL,32)"
        )
    if config.window_pattern and "S" not in (config.window_pattern * config.num_layers)[: config.num_layers]:
        raise UserError(
            f"no layer of Win({config.window_pattern},{window}) has a window; the letter for one is S, among the first "
            f"{config.num_layers} of the pattern, which has a letter for each layer"
        )
    if window >= T:
        raise UserError(
            f"Win({config.window_pattern},{window}) leaves out nothing: window={window} must be below "
            f"context_length={T}"
        )
    if config.rotary and config.head_dim % 2:
        raise UserError(
            f"RoPE rotates pairs of features, and heads of model_dim={D} / num_heads={N} have {config.head_dim}; the "
            "width of a head must be even"
        )


def _check_together(config: ModelConfig) -> None:
    """Checks what excludes something else.

    Raises:
      UserError: two fields that do not go together.
    """
    if config.ffn == "fused" and not config.scaled:
        raise UserError("the notation has no fused feed-forward without scales; take ScFuFFN (scaled=True)")
    if config.ffn == "fused" and config.activation != "identity":
        raise UserError(f"a fused feed-forward (ScFuFFN) has no room for activation={config.activation!r}; use ScFFN")
    if config.ffn == "bilinear" and config.scaled:
        raise UserError("the notation has no bilinear feed-forward with scales; take BiFFN (scaled=False)")
    if config.ffn == "bilinear" and config.activation != "identity":
        raise UserError(
            f"a bilinear feed-forward (BiFFN) has its product in the place of activation={config.activation!r}; "
            "leave one of them out"
        )
    if (config.reparametrization == "none") != (config.reparametrized == ""):
        raise UserError(
            f"reparametrization={config.reparametrization!r} and reparametrized={config.reparametrized!r} go together"
        )
    if config.power and (config.learnable_temperature or config.log_scale):
        raise UserError(f"PSM({config.power}) has a learned shift in the place of a temperature; leave one of them out")
    if config.power and config.logit_cap:
        raise UserError(
            f"Cap({config.logit_cap}) bounds what an exponential sees, and PSM({config.power}) has none; "
            "leave one of them out"
        )


def check_model(config: ModelConfig) -> None:
    """Checks that an argument is what describes a model.

    Raises:
      UserError: it is something else.
    """
    check_kind("config", config, ModelConfig, "a ModelConfig, as architecture(…) makes one")


def architecture(name: str, **overrides: Any) -> ModelConfig:
    """Parses the paper's notation, as in Table 1, §4 and Appendix A, and its parts into a `ModelConfig`.

    Args:
      name: `[EReg(] SM[(t)|(log)]|PSM(p) [+LN|+RN|+FN|+DyT] [+G|+R|+LR(slope)] [+WNorm(X)|+SNorm(X)|+SReparam(X)]
        [+ScFFN|+ScFuFFN|+BiFFN] [+part]… [^k] [)]`.
      **overrides: any field of `ModelConfig`; they win over the notation.
    Raises:
      UserError (a ValueError): names the piece that is wrong and the nearest valid spelling.
    """
    fields = written_fields(name)
    known = [field.name for field in dataclasses.fields(ModelConfig)]
    for key in overrides:
        if key not in known:
            raise UserError(f"the model has no field {key!r}{nearest(key, known)}")
    return ModelConfig(**(fields | overrides))
