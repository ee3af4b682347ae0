"""Paths that people name: what is expanded, what is refused, and in which words."""

from pathlib import Path

import pytest

from jax_entropy.errors import UserError
from jax_entropy.paths import cache_directory, local_path, reading, writing


def test_the_home_folder_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert local_path("~/runs/a", "--workdir") == Path("/somewhere/runs/a")
    assert local_path("p[0]/~run", "--workdir") == Path("p[0]/~run")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "--workdir='' is empty; name a path"),
        ("gs://bucket/run", r"--workdir='gs://bucket/run' is an address on a network \(gs://\)"),
        ("s3://bucket", "only folders of this machine"),
        ("~nobody-of-this-name/run", "there is no home folder for its '~nobody-of-this-name'"),
        ("a\0b", "holds a zero byte"),
        ("x" * 256, "a name of 256 bytes is too long"),
        ("ü" * 128, "a name of 256 bytes is too long"),
        ("x/" * 2100, "bytes is too long"),
    ],
)
def test_what_is_no_path_of_this_machine_is_refused(text, reason):
    with pytest.raises(UserError, match=reason):
        local_path(text, "--workdir")


def test_the_cache_follows_xdg(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert cache_directory() == Path("/elsewhere/jax_entropy")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/somewhere")
    assert cache_directory() == Path("/somewhere/.cache/jax_entropy")


def test_what_cannot_be_read_or_written_is_a_sentence(tmp_path):
    sentence = f"--prompt_file={str(tmp_path)!r} cannot be read: Is a directory"
    with pytest.raises(UserError, match=sentence), reading(tmp_path, "--prompt_file"):
        tmp_path.read_text()
    sentence = f"--json={tmp_path} cannot be written: Is a directory"
    with pytest.raises(UserError, match=sentence), writing(tmp_path, "--json"):
        tmp_path.write_text("x")
