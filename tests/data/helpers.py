"""A small corpus and its configuration, shared by the tests of jax_entropy.data."""

import random
from pathlib import Path

from ml_collections import ConfigDict

from jax_entropy.config import default_config

WORDS = "alpha beta gamma delta epsilon def return import self None True for while if else λόγος 数据 naïve".split()


def script(seed: int, lines: int = 60) -> str:
    """A text that looks like a program: indented lines, blank lines, more than ASCII."""
    rng = random.Random(seed)
    text = ""
    for _ in range(lines):
        text += rng.choice(["", "    ", "\t"]) + " ".join(rng.choices(WORDS, k=rng.randint(1, 6))) + "\n"
        text += "\n" * (rng.random() < 0.2)
    return text


def write_folder(folder: Path, count: int = 40, lines: int = 60) -> Path:
    for i in range(count):
        path = folder / f"package{i % 3}" / f"module{i:02}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(script(i, lines), encoding="utf-8")
    return folder


def data_config(home: Path, **overrides) -> ConfigDict:
    config = default_config("SM").data
    config.update(source="files", directory=str(home), vocab_size=400)
    config.update(overrides)
    return config
