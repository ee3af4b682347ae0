"""The documentation says what the code does: fields and defaults, architectures, numbers, and where links lead.

`python -m tests.docs_test` writes the tables of docs/configuration.md from the table of fields.
"""

import dataclasses
import os
import re
import shutil
import subprocess
import sys

import pytest
from ml_collections import ConfigDict

from jax_entropy.architecture import CHOICES, ModelConfig, architecture
from jax_entropy.config import default_config, flatten
from jax_entropy.entropy import max_entropy
from jax_entropy.fields import FIELDS
from tests import REPOSITORY

PAGES = sorted(path for path in (*REPOSITORY.glob("docs/**/*.md"), REPOSITORY / "README.md") if path.exists())
CONFIGURATION = REPOSITORY / "docs" / "configuration.md"


def rows(page, columns):
    """The cells of a page's table rows of that many columns."""
    lines = (REPOSITORY / "docs" / page).read_text().splitlines()
    cells = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|"))
    return [row for row in cells if len(row) == columns]


def written(value):
    """A default as the page writes it."""
    if value is None:
        return "unset"
    return f"`{value}`" if value != "" else '`""`'


def documented():
    return {row[0].strip("`"): row[2] for row in rows("configuration.md", 4) if row[0].startswith("`")}


def generated(page):
    """The page on the configuration with every field's row, and the choices of what the notation sets, made anew."""
    special = {"architecture": "from the file", "mesh.rules": "`fields.RULES`"}
    for field in FIELDS:
        unit = field.unit or ", ".join(f"`{choice}`" for choice in field.bound)
        row = f"| `{field.name}` | {unit} | {special.get(field.name, written(field.default))} | {field.help} |"
        page, count = re.subn(rf"^\| `{re.escape(field.name)}` \|.*$", lambda _, row=row: row, page, flags=re.M)
        assert count == 1, f"docs/configuration.md has {count} rows that begin with: | `{field.name}` |"
    for name, choices in CHOICES.items():
        cell = ", ".join(map(written, choices))
        page = re.sub(rf"^(\| `{name}` \|) [^|]* \|", rf"\1 {cell} |", page, flags=re.M)
    return page


def test_the_tables_of_fields_are_generated():
    page = CONFIGURATION.read_text()
    assert page == generated(page), "python -m tests.docs_test writes the tables of docs/configuration.md anew"


def test_every_field_of_the_notation_is_documented_with_its_default():
    # train.dtype and penalty.threshold_init are documented where they are set
    elsewhere = {*default_config("SM").model, "dtype", "threshold_init"}
    fields = {field.name: field.default for field in dataclasses.fields(ModelConfig) if field.name not in elsewhere}
    on_the_page = {name: default for name, default in documented().items() if name in fields}
    assert on_the_page == {name: written(default) for name, default in fields.items()}


def test_no_documented_field_is_gone():
    known = {*flatten(default_config("SM")), *(field.name for field in dataclasses.fields(ModelConfig))}
    assert set(documented()) <= known


def test_fields_named_in_prose_exist():
    sections = {name for name, value in default_config("SM").items() if isinstance(value, ConfigDict)}
    known = {f"config.{name}" for name in (*flatten(default_config("SM")), *sections)}
    for page in PAGES:
        text = re.sub(r"```diff.*?```|^::: \S+$", "", page.read_text(), flags=re.S | re.M)
        named = set(re.findall(r"(?<![/\w])config\.[a-z]\w*(?:\.[a-z]\w*)*", text.replace(".update(", "(")))
        named -= {"config.json"}
        assert named <= known, f"{page.name}: {named - known}"


def test_files_named_in_prose_exist():
    tests = {path.name for path in REPOSITORY.glob("tests/**/*_test.py")}
    for page in PAGES:
        text = re.sub(r"```diff.*?```|https://\S+", "", page.read_text(), flags=re.S)
        assert set(re.findall(r"`(\w+_test\.py)`", text)) <= tests, page.name
        for name in re.findall(r"\b(?:jax_entropy|tests|configs|launch|constraints)/[\w./-]*\w", text):
            assert (REPOSITORY / name).exists() or "*" in name, f"{page.name}: {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_and_images_exist(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text)
    for target in targets:
        if not re.match(r"[a-z]+:|#", target):
            assert (page.parent / target.partition("#")[0]).exists(), target


def test_every_architecture_in_a_table_is_one():
    names = set()
    for page in PAGES:
        for line in page.read_text().splitlines():
            if line.startswith("|"):
                names |= set(re.findall(r"`((?:EReg\()?SM[(+][^`]*|SM)`", line))
    assert {"SM+LN+G", "SM", "SM(t)+ScFuFFN", "EReg(SM(t)+ScFuFFN^6)", "SM+SNorm(QKVO+FFN)"} <= names
    for name in names:
        assert str(architecture(name)) == name


def test_every_row_of_the_paper_has_its_row():
    from jax_entropy.notation import EXAMPLES

    first_cells = {row[0].strip("`") for columns in (3, 4, 5, 6) for row in rows("architectures.md", columns)}
    assert set(EXAMPLES) - first_cells == set()


def recipe(heading):
    """The diffs under a heading of the page: (file, text that is there, text to put there)."""
    page = (REPOSITORY / "docs/architectures.md").read_text()
    section = page.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    for block in re.findall(r"```diff\n(.*?)```", section, flags=re.S):
        for name, hunk in re.findall(r"^@@ (\S+) @@\n(.*?)(?=^@@|\Z)", block, flags=re.S | re.M):
            before, after = (
                "\n".join(line[1:] for line in hunk.splitlines() if line[0] in kept) for kept in (" -", " +")
            )
            yield name, before, after


@pytest.mark.slow
@pytest.mark.parametrize(("heading", "lines", "name", "tests", "passed"), [
    ("How to add an architecture in seven lines", 7, "SM+LN+G+P", ("docs",), 4),
    ("How to add a nonlinearity, executed privately", 9, "SM+LN+SqR", ("private/export", "private/inference"), 6),
])  # fmt: skip
def test_the_recipes_for_new_architectures_work(tmp_path, heading, lines, name, tests, passed):
    for folder in ("jax_entropy", "tests", "docs"):
        shutil.copytree(REPOSITORY / folder, tmp_path / folder, ignore=shutil.ignore_patterns("golden", "__pycache__"))
    new_lines = 0
    for file, before, after in recipe(heading):
        path = tmp_path / file
        text = path.read_text()
        assert text.count(before) == 1, f"{file} has changed: {before}"
        path.write_text(text.replace(before, after))
        new_lines += len(set(after.splitlines()) - set(before.splitlines()))
    assert new_lines == lines
    files = [f"tests/{test}_test.py" for test in ("architecture", "model", *tests)]
    only = (
        f"{name} and (printed or model_is or exported_as or logits_are) or survives or nearest or field_of_the_notation"
    )
    tested = subprocess.run(
        [sys.executable, "-m", "pytest", "-rp", "-p", "no:cacheprovider", "-k", only, *files],
        cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert tested.returncode == 0, tested.stdout
    assert len(re.findall(rf"PASSED .*{re.escape(name)}", tested.stdout)) >= passed, tested.stdout


def test_the_table_of_maximum_entropies_is_right():
    table = [row for row in rows("mathematics.md", 4) if row[0].isdigit()]
    assert len(table) == 4
    for length, context, causal, share in table:
        T = int(length)
        assert context == f"{max_entropy(T):.3f}" and causal == f"{max_entropy(T, 'causal'):.3f}"
        assert share == f"{max_entropy(T, 'causal') / max_entropy(T):.3f}"


def test_everything_is_installed_from_the_checkout_since_no_index_holds_a_package_of_ours():
    files = [*PAGES, *REPOSITORY.glob("*.md"), *REPOSITORY.glob("launch/*"), *REPOSITORY.glob("jax_entropy/**/*.py")]
    text = {path: path.read_text() for path in files if path.is_file()}
    assert not [path.name for path in text if re.search(r"pip install [^\n&]*\bjax_entropy(\[|\s|'|$)", text[path])]


def test_the_first_page_leads_to_every_other():
    docs = REPOSITORY / "docs"
    first = (docs / "index.md").read_text()
    pages = {str(path.relative_to(docs)) for path in (*docs.rglob("*.md"), *docs.rglob("*.ipynb"))} - {"index.md"}
    assert not [page for page in sorted(pages) if f"({page})" not in first]


if __name__ == "__main__":
    CONFIGURATION.write_text(generated(CONFIGURATION.read_text()))
