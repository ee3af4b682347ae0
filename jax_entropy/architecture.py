"""What a model is made of: `ModelConfig`, and the paper's notation for it (Table 1, §4), parsed and printed.

`architecture("EReg(SM(t)+ScFuFFN^6)", num_layers=12)` gives the config, `str(config)` gives the notation back.
"""

import dataclasses
import math
import re
from typing import Any

from jax_entropy.errors import UserError, nearest

_CHOICES = {
    "norm": ("none", "layer", "rms"),
    "final_norm": ("none", "layer", "rms"),
    "activation": ("identity", "gelu", "gelu_tanh", "relu", "leaky_relu"),
    "slope": ("fixed", "layer", "global"),
    "ffn": ("full", "fused"),
    "reparametrization": ("none", "weight", "spectral"),
    "reparametrized": ("", "QK", "FFN", "QK+FFN", "QKV+FFN", "QKVO+FFN"),
    "temperature_parameter": ("direct", "log"),
    "bias": ("none", "qk", "all"),
    "dtype": ("float32", "bfloat16"),
}
_POSITIVE = ("num_layers", "num_heads", "model_dim", "context_length", "vocab_size", "scan_unroll")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer; the defaults are the paper's GPT-2 baseline `SM+LN+G` on 12 layers.

    Raises:
      UserError (a ValueError): names the field that is wrong, its value and the nearest valid choice.
    """

    num_layers: int = 12
    num_heads: int = 12
    model_dim: int = 768
    ffn_dim: int | None = None  # None: 4·D, or D where the feed-forward is fused
    context_length: int = 128  # tokens
    vocab_size: int = 50257

    # What the notation writes.
    norm: str = "layer"  # before attention and feed-forward: none | layer | rms
    activation: str = "gelu"  # identity | gelu (erf) | gelu_tanh | relu | leaky_relu
    negative_slope: float = 0.01  # of leaky_relu; the initial value where it is learned
    slope: str = "fixed"  # of leaky_relu: fixed | layer (learned, one a layer) | global (learned, one in all)
    ffn: str = "full"  # full | fused (one D×D matrix)
    scaled: bool = False  # Eq. 8: learned α and β around the feed-forward
    ffn_free_layers: int = 0  # the k deepest blocks have no feed-forward
    reparametrization: str = "none"  # none | weight | spectral
    reparametrized: str = ""  # which linear layers: QK | FFN | QK+FFN | QKV+FFN | QKVO+FFN
    learnable_temperature: bool = False  # SM(t), one per head and query position
    entropy_regularizer: bool = False  # EReg: learned thresholds θ [L, N]

    # What it leaves open.
    temperature_init: float = 1e-2  # divisor of the scaled logits
    temperature_parameter: str = "direct"  # direct (as published) | log
    threshold_init: float = 0.5  # θ₀, a fraction of maximum entropy
    alpha_init: float = 1.0  # of the scaled feed-forward
    beta_init: float = 1.0
    final_norm: str = "layer"  # kept in the authors' normalisation-free models too
    bias: str = "qk"  # none | qk (as the authors) | all (as GPT-2)
    tied_head: bool = True
    embedding_scale: float = 1.0  # √D in Languini's GPT
    embedding_dropout: float = 0.0
    init_std: float = 0.02
    residual_init_std: float | None = None  # of what is written to the residual stream; None: init_std
    norm_epsilon: float = 1e-5

    # How it is computed.
    attention: str = "auto"  # implementation of the operator
    scan_unroll: int = 1  # layers unrolled in one turn of the scan
    remat: bool = False  # recompute each block in the backward pass
    dtype: str = "float32"  # of activations and matrix products; statistics and loss are float32

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                raise UserError(f"model field {name}={value!r} is not known{nearest(value, choices)}")
        for name in (*_POSITIVE, *(("ffn_dim",) if self.ffn_dim is not None else ())):
            if not isinstance(value := getattr(self, name), int) or value < 1:
                raise UserError(f"model field {name}={value!r} must be a whole number of at least 1")
        if self.model_dim % self.num_heads:
            widths = [n for n in range(1, self.model_dim + 1) if self.model_dim % n == 0]
            close = min(widths, key=lambda n: abs(n - self.num_heads))
            raise UserError(
                f"model_dim={self.model_dim} is not divisible by num_heads={self.num_heads}; the nearest count of "
                f"heads that divides it is {close}"
            )
        if not 0 <= self.ffn_free_layers <= self.num_layers:
            raise UserError(
                f"^{self.ffn_free_layers} asks for more blocks without feed-forward than there are layers; "
                f"with num_layers={self.num_layers} the largest is ^{self.num_layers}"
            )
        if self.ffn == "fused" and not self.scaled:
            raise UserError("the notation has no fused feed-forward without scales; take ScFuFFN (scaled=True)")
        if self.ffn == "fused" and self.activation != "identity":
            raise UserError(f"a fused feed-forward (ScFuFFN) has no room for activation={self.activation!r}; use ScFFN")
        if self.ffn == "fused" and self.ffn_dim not in (None, self.model_dim):
            raise UserError(f"a fused feed-forward (ScFuFFN) is D×D: ffn_dim={self.ffn_dim} must be {self.model_dim}")
        if (self.reparametrization == "none") != (self.reparametrized == ""):
            raise UserError(
                f"reparametrization={self.reparametrization!r} and reparametrized={self.reparametrized!r} go together"
            )
        for name in ("temperature_init", "alpha_init", "init_std", "residual_init_std", "norm_epsilon"):
            value = getattr(self, name)
            if not ((value is None and name == "residual_init_std") or value > 0):
                raise UserError(f"model field {name}={value!r} must be above 0")
        if not 0 <= self.embedding_dropout < 1:
            raise UserError(f"model field embedding_dropout={self.embedding_dropout} must be in [0, 1)")
        if not math.isfinite(self.negative_slope):
            raise UserError(f"the slope of LR({self.negative_slope}) must be a finite number")

    @property
    def head_dim(self) -> int:
        """H = D / N."""
        return self.model_dim // self.num_heads

    @property
    def hidden_dim(self) -> int:
        """F, the width between the feed-forward's matrices."""
        return self.ffn_dim or (self.model_dim if self.ffn == "fused" else 4 * self.model_dim)

    def __str__(self) -> str:
        """The architecture in the paper's notation."""
        pieces = ["SM(t)" if self.learnable_temperature else "SM"]
        pieces += {"none": [], "layer": ["LN"], "rms": ["RN"]}[self.norm]
        slope = repr(self.negative_slope) if self.slope == "fixed" else self.slope
        gelu = ["G"]
        activations = {"identity": [], "gelu": gelu, "gelu_tanh": gelu, "relu": ["R"], "leaky_relu": [f"LR({slope})"]}
        pieces += activations[self.activation]
        if self.reparametrization != "none":
            pieces.append(f"{self.reparametrization[0].upper()}Norm({self.reparametrized})")
        pieces += {"full": ["ScFFN"], "fused": ["ScFuFFN"]}[self.ffn] if self.scaled else []
        body = "+".join(pieces) + (f"^{self.ffn_free_layers}" if self.ffn_free_layers else "")
        return f"EReg({body})" if self.entropy_regularizer else body


# The pieces after SM, in the order in which they are written; each may appear once.
_GRAMMAR = (
    ("normalisation", r"LN|RN"),
    ("activation", r"G|R|LR\(.*\)"),
    ("reparametrisation", r"[WS]Norm\(.*\)"),
    ("feed-forward", r"ScFFN|ScFuFFN"),
)
_SPELLINGS = (
    "LN RN G R LR(0.01) LR(layer) LR(global) ScFFN ScFuFFN "
    + " ".join(f"{kind}Norm({target})" for kind in "WS" for target in _CHOICES["reparametrized"][1:])
).split()
EXAMPLES = (
    "SM+LN+G", "SM+LN+R", "SM+LN", "SM+RN+G", "SM+G", "SM+R", "SM", "SM+LR(0.01)", "SM+LR(layer)", "SM+LR(global)",
    *(f"SM+{kind}Norm({target})" for kind in "WS" for target in _CHOICES["reparametrized"][1:]),
    "SM+ScFFN", "SM+ScFuFFN", "SM+ScFuFFN^6", "SM(t)+ScFuFFN", "EReg(SM(t)+ScFuFFN)", "EReg(SM(t)+ScFuFFN^6)",
)  # fmt: skip
_PROPOSALS = (*EXAMPLES, *(f"EReg({name})" for name in EXAMPLES if not name.startswith("EReg")))


def architecture(name: str, **overrides: Any) -> ModelConfig:
    """Parses the paper's notation, as in Table 1, §4 and Appendix A, into a `ModelConfig`.

    Args:
      name: `[EReg(] SM[(t)] [+LN|+RN] [+G|+R|+LR(slope)] [+WNorm(X)|+SNorm(X)] [+ScFFN|+ScFuFFN] [^k] [)]`.
      **overrides: any field of `ModelConfig`; they win over the notation.
    Raises:
      UserError (a ValueError): names the piece that is wrong and the nearest valid spelling.
    """
    fields = _parse(name)
    known = [field.name for field in dataclasses.fields(ModelConfig)]
    for key in overrides:
        if key not in known:
            raise UserError(f"the model has no field {key!r}{nearest(key, known)}")
    return ModelConfig(**(fields | overrides))


def _parse(name: str) -> dict[str, Any]:
    def wrong(piece: str, choices=_SPELLINGS) -> UserError:
        return UserError(f"architecture {name!r}: {piece!r} is not understood{nearest(piece, choices)}")

    if not isinstance(name, str) or not name.strip():
        raise wrong(name, _PROPOSALS)
    body, regularized = name, name.startswith("EReg(")
    if regularized:
        if not name.endswith(")") or name.count("(") != name.count(")"):
            raise UserError(
                f"architecture {name!r}: what 'EReg(' opens must be closed by one ')' at the end"
                + nearest(name, _PROPOSALS)
            )
        body = name[len("EReg(") : -1]
    body, caret, count = body.partition("^")
    if caret and not re.fullmatch(r"[0-9]{1,9}", count):
        raise UserError(f"architecture {name!r}: {'^' + count!r} is not a count of blocks{nearest(name, _PROPOSALS)}")
    first, *pieces = re.split(r"\+(?![^(]*\))", body)
    if first not in ("SM", "SM(t)"):
        raise wrong(first, ("SM", "SM(t)") if first[:1] in "Ss" else _PROPOSALS)
    fields: dict[str, Any] = dict(
        norm="none", activation="identity", learnable_temperature=first == "SM(t)", entropy_regularizer=regularized,
        ffn_free_layers=int(count or 0),
    )  # fmt: skip
    last = -1
    for previous, piece in zip([first, *pieces], pieces, strict=False):
        rank = next((i for i, (_, pattern) in enumerate(_GRAMMAR) if re.fullmatch(pattern, piece)), None)
        if rank is None:
            raise wrong(piece)
        if rank <= last:
            raise UserError(
                f"architecture {name!r}: {piece!r} cannot follow {previous!r}, at most one of "
                f"each kind in the order {', '.join(kind for kind, _ in _GRAMMAR)}{nearest(name, _PROPOSALS)}"
            )
        last = rank
        fields |= _piece(piece, wrong)
    return fields


def _piece(piece: str, wrong) -> dict[str, Any]:
    """The fields that one piece of the notation sets."""
    simple = {
        "LN": dict(norm="layer"), "RN": dict(norm="rms"), "G": dict(activation="gelu"), "R": dict(activation="relu"),
        "ScFFN": dict(scaled=True), "ScFuFFN": dict(ffn="fused", scaled=True),
    }  # fmt: skip
    if piece in simple:
        return simple[piece]
    head, argument = piece[: piece.index("(")], piece[piece.index("(") + 1 : -1]
    if head == "LR":
        if argument in ("layer", "global"):
            return dict(activation="leaky_relu", slope=argument)
        try:
            slope = float(argument)
        except ValueError:
            slope = math.nan
        if not math.isfinite(slope):
            raise wrong(piece)
        return dict(activation="leaky_relu", negative_slope=slope)
    if argument not in _CHOICES["reparametrized"][1:]:
        raise wrong(piece)
    return dict(reparametrization="weight" if head == "WNorm" else "spectral", reparametrized=argument)
