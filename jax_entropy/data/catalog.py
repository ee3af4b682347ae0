"""The sources that `config.data.source` may name; whoever asks for their names loads nothing else."""

from typing import NamedTuple


class Source(NamedTuple):
    """One value of `config.data.source`: how it is called in print, and the column that shards of it have."""

    title: str  # "": the name of its files
    description: str
    column: str = ""


SOURCES = {
    "stdlib": Source(
        "Python standard library",
        "The source of the running Python's standard library, without tests and generated tables.",
    ),
    "files": Source("", "Files of text or source code."),
    "codeparrot": Source(
        "CodeParrot", "Python scripts of the Hugging Face course's filtered CodeParrot set.", column="content"
    ),
    "languini": Source("Languini books", "Books, as in Languini Kitchen.", column="text"),
}
