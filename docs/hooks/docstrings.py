"""Puts a blank line before each section of a docstring: the reference is made by a reader that wants one."""

import re
from typing import Any

import griffe


class Sections(griffe.Extension):
    """Changes what is read, not the source."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for every object of the package."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"\n(?=(?:Args|Returns|Raises|Attributes):\n)", "\n\n", obj.docstring.value)
