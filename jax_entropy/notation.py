"""The paper's notation for architectures (Table 1, §4) and its parts: what each piece says of a model's fields.

A table of places, each with its spellings, is read in both directions: `written_fields` parses, `notation` prints.
"""

import math
import re
import string
from typing import Any, NamedTuple

from jax_entropy.errors import UserError, nearest

TARGETS = ("QK", "FFN", "QK+FFN", "QKV+FFN", "QKVO+FFN")  # of a reparametrisation


class Place(NamedTuple):
    """A place in the notation: its name, its fields where nothing stands there, and the fields of each spelling.

    {field:example} in a spelling is a value that the field takes, of the example's type.
    """

    name: str
    absent: dict[str, Any]
    spellings: tuple[tuple[str, dict[str, Any]], ...]

    @property
    def fields(self) -> set[str]:
        """What it writes."""
        values = {field for spelling, _ in self.spellings for _, field, _ in _split(spelling) if field}
        return values.union(self.absent, *(fields for _, fields in self.spellings))

    def read(self, piece: str) -> dict[str, Any] | None:
        """The fields that a piece of the notation sets, None where it does not belong here."""
        for spelling, fields in self.spellings:
            parts = _split(spelling)
            pattern = "".join(re.escape(text) + (f"(?P<{field}>.*)" if field else "") for text, field, _ in parts)
            if found := re.fullmatch(pattern, piece):
                values = {field: _value(found[field], example) for _, field, example in parts if field}
                if None not in values.values():
                    return self.absent | fields | values
        return None

    def write(self, config: Any) -> str:
        """The piece of a config's notation that stands here, "" for none."""
        has = lambda fields: all(getattr(config, name) == value for name, value in fields.items())  # noqa: E731
        if self.absent and has(self.absent):
            return ""
        spelling = next(spelling for spelling, fields in self.spellings if has(fields))
        return "".join(f"{text}{getattr(config, field) if field else ''}" for text, field, _ in _split(spelling))

    def examples(self) -> list[str]:
        """A piece for each spelling."""
        return ["".join(text + (example or "") for text, _, example in _split(name)) for name, _ in self.spellings]


def _split(spelling: str) -> list[tuple[str, str | None, str | None]]:
    """A spelling as pieces of text, each with the field and the example of the value after it."""
    return [(text, field, example) for text, field, example, _ in string.Formatter().parse(spelling)]


def _value(text: str, example: str) -> Any:
    """A value as the notation writes it, of the example's type; None where it is no such value."""
    if example.isdecimal():
        return int(text) if re.fullmatch(r"[1-9][0-9]{0,8}", text) else None
    if "." not in example:
        return text
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


_ATTENTION = Place("attention", {}, (
    ("SM", dict(learnable_temperature=False, log_scale=False, power=0)),
    ("SM(t)", dict(learnable_temperature=True, log_scale=False, power=0)),
    ("SM(log)", dict(learnable_temperature=False, log_scale=True, power=0)),
    ("SM(t,log)", dict(learnable_temperature=True, log_scale=True, power=0)),
    ("PSM({power:4})", dict(learnable_temperature=False, log_scale=False)),
))  # fmt: skip
# The paper's pieces come after it in this order, each at most once.
_PIECES = (
    Place("normalisation", dict(norm="none"), (
        ("LN", dict(norm="layer")), ("RN", dict(norm="rms")), ("FN", dict(norm="frozen")), ("DyT", dict(norm="tanh")),
    )),
    Place("activation", dict(activation="identity"), (
        ("G", dict(activation="gelu")),
        ("G", dict(activation="gelu_tanh")),  # has no spelling of its own
        ("R", dict(activation="relu")),
        ("LR({negative_slope:0.01})", dict(activation="leaky_relu", slope="fixed")),
        ("LR(layer)", dict(activation="leaky_relu", slope="layer")),
        ("LR(global)", dict(activation="leaky_relu", slope="global")),
    )),
    Place("reparametrisation", dict(reparametrization="none", reparametrized=""), tuple(
        (f"{spelling}({target})", dict(reparametrization=kind, reparametrized=target))
        for spelling, kind in (("WNorm", "weight"), ("SNorm", "spectral"), ("SReparam", "sigma"))
        for target in TARGETS
    )),
    Place("feed-forward", dict(ffn="full", scaled=False), (
        ("ScFFN", dict(ffn="full", scaled=True)), ("ScFuFFN", dict(ffn="fused", scaled=True)),
        ("BiFFN", dict(ffn="bilinear", scaled=False)),
    )),
)  # fmt: skip
# Parts come last, in any order, each at most once; they are printed in this one.
_PARTS = (
    Place("convolution", dict(conv_width=0), (("Conv{conv_width:4}", {}),)),
    Place("QK-norm", dict(qk_norm=False), (("QKN", dict(qk_norm=True)),)),
    Place("rotation", dict(rotary=False), (("RoPE", dict(rotary=True)),)),
    Place("soft cap", dict(logit_cap=0), (("Cap({logit_cap:30})", {}),)),
    Place("value residual", dict(value_residual=False), (("VRes", dict(value_residual=True)),)),
    Place("value embedding", dict(value_embedding=False), (("VEmb", dict(value_embedding=True)),)),
    Place("slots", dict(num_slots=0), (("Mem{num_slots:8}", {}),)),
    Place("windows", dict(window_pattern="", window=0), (("Win({window_pattern:SSSL},{window:32})", {}),)),
)
PLACES = (_ATTENTION, *_PIECES, *_PARTS)
PARTS = tuple(example for place in _PARTS for example in place.examples())
_SPELLINGS = tuple(dict.fromkeys(example for place in (*_PIECES, *_PARTS) for example in place.examples()))
EXAMPLES = (
    "SM+LN+G", "SM+LN+R", "SM+LN", "SM+RN+G", "SM+G", "SM+R", "SM", "SM+LR(0.01)", "SM+LR(layer)", "SM+LR(global)",
    *(f"SM+{piece}" for piece in _PIECES[2].examples()),
    "SM+ScFFN", "SM+ScFuFFN", "SM+ScFuFFN^6", "SM(t)+ScFuFFN", "EReg(SM(t)+ScFuFFN)", "EReg(SM(t)+ScFuFFN^6)",
    "SM+FN+G", "SM+DyT+G", "SM+BiFFN", "PSM(4)+ScFuFFN",
)  # fmt: skip
_PROPOSALS = (*EXAMPLES, *(f"EReg({name})" for name in EXAMPLES if not name.startswith("EReg")))
_PROPOSALS += tuple(f"SM+ScFuFFN+{part}" for part in PARTS)


def written_fields(name: str) -> dict[str, Any]:
    """The fields of `ModelConfig` that a notation says something of, what is not there included.

    Raises:
      UserError (a ValueError): as `architecture` does.
    """

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
    if (fields := _ATTENTION.read(first)) is None:
        raise wrong(first, _ATTENTION.examples() if first[:1] in "SsPp" else _PROPOSALS)
    fields |= dict(entropy_regularizer=regularized, ffn_free_layers=int(count or 0))
    found: dict[int, dict[str, Any]] = {}
    for previous, piece in zip([first, *pieces], pieces, strict=False):
        readings = enumerate(place.read(piece) for place in (*_PIECES, *_PARTS))
        rank, of_piece = next(((i, reading) for i, reading in readings if reading is not None), (None, None))
        if rank is None:
            raise wrong(piece)
        if rank in found or min(rank, len(_PIECES)) < min(max(found, default=0), len(_PIECES)):
            kinds = ", ".join((*(place.name for place in _PIECES), "parts"))
            raise UserError(
                f"architecture {name!r}: {piece!r} cannot follow {previous!r}, at most one of each kind in the order "
                f"{kinds}{nearest(name, _PROPOSALS)}"
            )
        found[rank] = of_piece
    for rank, place in enumerate((*_PIECES, *_PARTS)):
        fields |= found.get(rank, place.absent)
    return fields


def notation(config: Any) -> str:
    """What `written_fields` would read the fields of a `ModelConfig` from."""
    pieces = [piece for place in PLACES if (piece := place.write(config))]
    body = "+".join(pieces) + (f"^{config.ffn_free_layers}" if config.ffn_free_layers else "")
    return f"EReg({body})" if config.entropy_regularizer else body
