"""What befalls files: a bit flips, a disk is full or read-only; and the one sentence with which a command answers."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from jax_entropy.commands.main import main


def flip(path: Path, bit: int | None = None) -> None:
    """Changes one bit of a file, the first one of the middle byte if none is named."""
    data = bytearray(path.read_bytes())
    bit = 8 * (len(data) // 2) if bit is None else bit
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


class Disk:
    """A small disk in memory; the test is skipped where none can be mounted."""

    def __init__(self, path: Path, kilobytes: int) -> None:
        self.path = path
        path.mkdir()
        self._mount(f"size={kilobytes}k", "tmpfs")

    def _mount(self, options: str, *what: str) -> None:
        command = ["mount", *(("-t", "tmpfs") if what else ()), "-o", options, *what, str(self.path)]
        if os.geteuid() or not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("a tmpfs cannot be mounted here (needs root)")

    def fill(self, but: int = 0) -> None:
        """Leaves `but` bytes free."""
        (self.path / "filler").write_bytes(bytes(shutil.disk_usage(self.path).free - but))

    def read_only(self) -> None:
        self._mount("remount,ro")

    def enlarge(self, kilobytes: int) -> None:
        self._mount(f"remount,size={kilobytes}k")


def sentence(capture, *arguments: object) -> str:
    """The sentence of a command that must fail; `capture` is pytest's capsys or capfd."""
    capture.readouterr()
    code = main([str(argument) for argument in arguments])
    captured = capture.readouterr()
    assert code == 2, captured
    assert "Traceback" not in captured.out + captured.err
    return captured.err.strip().splitlines()[-1]
