"""The one exception for mistakes of the person at the keyboard.

The command line turns it into a single sentence and exit code 2; everything else is a bug and keeps its traceback.
"""

import difflib
import math
import numbers
import re
from collections.abc import Hashable, Iterable
from types import UnionType

_NEAR = 0.6  # share of letters in common from which a spelling may have been meant
_MANY, _FEW = 12, 5  # more choices than a sentence has room for, and how many it then has
_LONGEST = 60  # characters of a value in a sentence


class UserError(ValueError):
    """A configuration, file or argument that cannot work; its message is one sentence that says what to do."""


class Diverged(UserError):
    """Training met a loss that it cannot go on from; its message is the diagnosis. In a sweep this is a result."""


def check_kind(name: str, value: object, kind: type | UnionType, words: str) -> None:
    """Checks an argument that is to be of a type, in words what that is.

    Raises:
      UserError: it is not.
    """
    if not isinstance(value, kind):
        raise UserError(f"{name}={spelled(value)} must be {words}")


def check_number(name: str, value: object, least: float, *, whole: bool = True, traced: bool = False) -> None:
    """Checks an argument that is to be a finite number, a whole one unless said otherwise, of at least `least`.

    Args:
      traced: an array without axes will do, whose value nobody need know yet.
    Raises:
      UserError: it is not.
    """
    if traced and getattr(value, "shape", None) == ():
        return
    words = "a whole number" if whole else "a number"
    if isinstance(value, bool):  # which Python counts among them
        raise UserError(f"{name}={value} must be {words}")
    check_kind(name, value, numbers.Integral if whole else numbers.Real, words)
    if not -math.inf < value < math.inf:
        raise UserError(f"{name}={value} must be a finite number")
    if not value >= least:
        raise UserError(f"{name}={value} must {f'be at least {least}' if least else 'not be negative'}")


def check_array(name: str, value: object, axes: str) -> None:
    """Checks an argument that is to be an array with axes as they are printed: [B, T], or […, T] behind any others.

    Raises:
      UserError: it is not.
    """
    count, needed = getattr(value, "ndim", -1), axes.count(",") + 1
    if not (count >= needed - 1 if "…" in axes else count == needed):
        raise UserError(f"{name}={spelled(value)} must be an array {axes}")


def check_choice(name: str, value: object, choices: Iterable[object]) -> None:
    """Checks an argument that is to be one of `choices`.

    Raises:
      UserError: it is not.
    """
    if not isinstance(value, Hashable) or value not in (choices := [*choices]):
        raise UserError(f"{name}={spelled(value)} is not known{nearest(value, choices)}")


def spelled(value: object) -> str:
    """A value in a sentence: arrays by their type and shape, what is long or has lines cut short."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}[{','.join(map(str, value.shape))}]"
    text = " ".join(repr(value).split())
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def nearest(name: object, choices: Iterable[object]) -> str:
    """Ends an error sentence: the closest valid spelling of `name`; where none is close, what there is to choose from.

    Initials are close (lr for learning_rate), and so is a part between dots by itself.
    """
    choices, name = [str(choice) for choice in choices], str(name).lower()

    def similarity(choice: str) -> float:
        choice = choice.lower()
        last = choice.rpartition(".")[2]
        if name.rpartition(".")[2] == "".join(re.findall("(?:^|_)(.)", last)):
            return 1.0
        return max(difflib.SequenceMatcher(None, name, spelling).ratio() for spelling in (choice, last))

    best = max(choices, key=similarity)
    if similarity(best) >= _NEAR:
        return f"; did you mean {best!r}?"
    shown = choices if len(choices) <= _MANY else sorted(choices, key=similarity, reverse=True)[:_FEW]
    others = f" or {len(choices) - len(shown)} others" if len(shown) < len(choices) else ""
    return f"; choose one of {', '.join(map(repr, shown))}{others}"
