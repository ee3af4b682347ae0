"""Refuses a site of which a page would load something from elsewhere: it is read without a network."""

import re
from pathlib import Path
from typing import Any

# what a browser fetches by itself; links that a reader follows are not among it
_LOADED = (
    r"<(?:script|img|iframe|source|video|audio|embed)\b[^>]*\bsrc=[\"']?(?:https?:)?//[^\"'\s>]+",
    r"<link\b(?![^>]*\brel=[\"']?(?:canonical|prev|next)\b)[^>]*\bhref=[\"']?(?:https?:)?//[^\"'\s>]+",
    r"(?:@import\s*|\burl\()\s*[\"']?(?:https?:)?//[^\"')\s]+",
)


def on_post_build(config: Any) -> None:
    """Reads every page and style sheet.

    Raises:
      ValueError: names the file and what it would load.
    """
    for path in sorted(Path(config.site_dir).rglob("*")):
        if path.suffix in (".html", ".css"):
            for pattern in _LOADED:
                if found := re.search(pattern, path.read_text("utf-8"), re.IGNORECASE):
                    raise ValueError(f"{path.relative_to(config.site_dir)} loads from elsewhere: {found[0][:200]}")
