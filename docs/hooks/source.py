"""Puts the lines of a source file where a page names the first and the last, so that no page is behind the code.

```python jax_entropy/attention/blockwise.py
how the first line begins
…
how the last line begins
```
"""

import re
import textwrap
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[2]


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fills the blocks of a page.

    Raises:
      ValueError: a file has no such lines, or the first is not the only one.
    """
    return re.sub(r"^```python (\S+\.py)\n(.*)\n(?:…\n(.*)\n)?```$", _filled, markdown, flags=re.M)


def _filled(block: re.Match) -> str:
    """A block of code with the lines from the one that begins with what the page names to that with the last."""
    name, first, last = block.groups()
    lines = (_ROOT / name).read_text("utf-8").splitlines()
    begins = [i for i, line in enumerate(lines) if line.lstrip().startswith(first)]
    if len(begins) != 1:
        raise ValueError(f"{name} has {len(begins)} lines that begin with: {first}")
    ends = [i for i in range(begins[0], len(lines)) if lines[i].lstrip().startswith(last or first)]
    if not ends:
        raise ValueError(f"{name} has no line after them that begins with: {last}")
    code = textwrap.dedent("\n".join(lines[begins[0] : ends[0] + 1]))
    return f'```python title="{name}" linenums="{begins[0] + 1}"\n{code}\n```'
