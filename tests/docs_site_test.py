"""What the site has beside its pages: the hooks of docs/hooks, the reference, the heat-maps of the first page."""

import base64
import importlib
import importlib.util
import re
from types import SimpleNamespace

import pytest

import jax_entropy as je
from jax_entropy.commands.main import COMMANDS, FAMILIES, family
from tests import REPOSITORY

DOCS = REPOSITORY / "docs"


def hook(name):
    spec = importlib.util.spec_from_file_location(name, DOCS / "hooks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_on_the_kernels_shows_the_lines_of_the_source():
    page, fill = (DOCS / "kernels.md").read_text(), hook("source").on_page_markdown
    blocks = re.findall(r'^```python title="(\S+)" linenums="(\d+)"\n(.*?)^```$', fill(page), flags=re.M | re.S)
    assert len(blocks) == page.count("```python ") >= 14
    for name, number, code in blocks:
        first, *_ = code.splitlines()
        assert (REPOSITORY / name).read_text().splitlines()[int(number) - 1].strip() == first
    with pytest.raises(ValueError, match=r"attention/dense\.py has 0 lines that begin with: z = gone\("):
        fill("```python jax_entropy/attention/dense.py\nz = gone(\n```")


@pytest.mark.parametrize(("text", "loads"), [
    ('<script src="https://cdn.example/x.js"></script>', True),
    ("<link rel=stylesheet href=//cdn.example/x.css>", True),
    ("<style>@import url('https://cdn.example/x.css')</style>", True),
    ('<a href="https://example.org">read</a><link rel="canonical" href="https://example.org"><img src="x.png">', False),
])  # fmt: skip
def test_a_site_that_loads_from_elsewhere_is_refused(tmp_path, text, loads):
    (tmp_path / "index.html").write_text(text)
    build = lambda: hook("offline").on_post_build(SimpleNamespace(site_dir=tmp_path))  # noqa: E731
    if not loads:
        return build()
    with pytest.raises(ValueError, match=r"index\.html loads from elsewhere"):
        build()


def test_the_reference_has_every_public_name():
    listed = re.findall(r"^::: jax_entropy\.(\S+)$", (DOCS / "api.md").read_text(), flags=re.M)
    assert sorted(listed) == sorted(f"{home}.{name}" for name, home in je._HOME.items())


def test_the_reference_has_a_function_for_every_command():
    listed = []
    for called, functions in re.findall(
        r"^\| `jax-entropy (.+) \| (.+) \|$", (DOCS / "api.md").read_text(), flags=re.M
    ):
        first, *more = re.findall(r"[\w ]*\w", called)
        listed += [first, *(f"{first.split()[0]} {word}" for word in more if word != " ")]
        for name in re.findall(r"`((?:je|jax_entropy)\.[\w.]+)", functions):
            module, _, function = name.replace("je.", "jax_entropy.", 1).rpartition(".")
            assert callable(getattr(importlib.import_module(module), function))
    commands = [*COMMANDS, *(f"{of} {name}" for of in FAMILIES for name in family(of))]
    assert sorted(listed) == sorted(commands)


def test_the_heat_maps_of_the_first_page_have_a_number_for_every_head_and_step():
    page = (DOCS / "index.md").read_text()
    layers, heads, steps = (re.search(rf'data-{name}="([^"]+)"', page)[1] for name in ("layers", "heads", "steps"))
    maps = [base64.b64decode(block) for block in re.findall(r'data-entropy="([^"]+)"', page)]
    assert [len(numbers) for numbers in maps] == [int(layers) * int(heads) * len(steps.split())] * 2
    assert all(numbers[0] == 255 for numbers in maps)  # a new model looks at everything alike
