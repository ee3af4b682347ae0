"""The one exception for mistakes of the person at the keyboard.

The command line turns it into a single sentence and exit code 2; everything else is a bug and keeps its traceback.
"""

import difflib
import numbers
import re
from collections.abc import Iterable


class UserError(ValueError):
    """A configuration, file or argument that cannot work; its message is one sentence that says what to do."""


class Diverged(UserError):
    """Training met a loss that it cannot go on from; its message is the diagnosis. In a sweep this is a result."""


def check_number(name: str, value: object, least: float, *, whole: bool = True) -> None:
    """Checks an argument that is to be a number, a whole one unless said otherwise, of at least `least`.

    Raises:
      UserError: it is not.
    """
    if not isinstance(value, numbers.Integral if whole else numbers.Real):
        raise UserError(f"{name}={value!r} must be {'a whole number' if whole else 'a number'}")
    if not value >= least:
        raise UserError(f"{name}={value} must {f'be at least {least}' if least else 'not be negative'}")


def nearest(name: object, choices: Iterable[object]) -> str:
    """Ends an error sentence: the closest valid spelling of `name`, or all `choices` if a dozen and none is close."""
    choices, name = [str(choice) for choice in choices], str(name)

    def similarity(choice: str) -> float:
        if name.rpartition(".")[2].lower() == "".join(re.findall("(?:^|_)(.)", choice.rpartition(".")[2].lower())):
            return 1.0  # its initials: lr for learning_rate
        return difflib.SequenceMatcher(None, name.lower(), choice.lower()).ratio()

    best = max(choices, key=similarity)
    if similarity(best) >= 0.5 or len(choices) > 12:
        return f"; did you mean {best!r}?"
    return f"; choose one of {', '.join(map(repr, choices))}"
