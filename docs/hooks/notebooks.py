"""Makes a page of each notebook in docs/colab, with the outputs that are kept in it; links to notebooks lead there."""

import json
import re
from html import escape
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages."""
    for file in files.media_files():
        if file.src_uri.endswith(".ipynb"):
            cells = json.loads(Path(file.abs_src_path).read_text("utf-8"))["cells"]
            title, *rest = (part for cell in cells for part in _cell(cell))
            colab = config.extra["repository"].replace("github.com", "colab.research.google.com/github")
            open_it = f"[Open in Colab]({colab}/blob/main/docs/{file.src_uri})"
            links = f"{open_it} · [the notebook]({Path(file.src_uri).name})"
            heading, _, opening = title.partition("\n")
            content = "\n\n".join([heading, links, opening, *rest])
            files.append(File.generated(config, file.src_uri.replace(".ipynb", ".md"), content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A link to a notebook leads to its page, but for the one to the file itself, which stands beside the page."""
    return re.sub(r"(\]\((?:\.\./)*colab/\w+)\.ipynb\)", r"\1.md)", markdown)


def _cell(cell: dict[str, Any]) -> list[str]:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return [source]
    return [f"```python\n{source}\n```", *filter(None, map(_output, cell["outputs"]))]


def _output(output: dict[str, Any]) -> str:
    """What a cell shows: a page, a picture, a table or text."""
    data = output.get("data", {"text/plain": output.get("text", "")})
    kind = next(kind for kind in ("text/html", "image/png", "text/markdown", "text/plain") if kind in data)
    content = "".join(data[kind])
    if output.get("name") == "stderr" or not content.strip():
        return ""
    if kind == "text/html":
        return f'<div class="output">{content}</div>'
    if kind == "image/png":
        picture = content.replace("\n", "")
        return f'<div class="output"><img alt="what the cell above draws" src="data:image/png;base64,{picture}"></div>'
    if kind == "text/markdown":
        return re.sub("^#", "###", content, flags=re.M)  # its headings are not the page's
    return f'<pre class="output">{escape(content.rstrip())}</pre>'
