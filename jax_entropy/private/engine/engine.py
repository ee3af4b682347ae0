"""The engine of secure computation (SecretFlow SPU): a subprocess that holds shares and runs programs on them.

It knows nothing of models; nothing else talks to the subprocess, which runs in an environment of its own.
"""

import contextlib
import json
import os
import re
import select
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jax_entropy.errors import UserError, nearest
from jax_entropy.private.engine.environment import environment_python

PROTOCOLS = {"semi2k": 2, "aby3": 3, "cheetah": 2}  # parties
_RUNNER = Path(__file__).with_name("runner.py")


EXPONENTS = ("quadratic", "taylor", "pade")
# Heads in one product, at most: under SEMI2K each more opens as many zeros, under CHEETAH it encrypts them.
_HEADS_AT_ONCE = {"semi2k": 4, "aby3": 1 << 16, "cheetah": 1}


class Setting(NamedTuple):
    """How numbers are shared and the exponential is computed; the defaults are those of docs/private.md's table.

    fraction_bits: of 64. exponent: "quadratic", (1 + y + y²/2)^(2ⁿ) with y = x/2ⁿ; "taylor", (1 + y)^(2ⁿ); or "pade".
    exponent_iterations: n of the first two; 0: 6 and 10. colocated: CHEETAH may use that the server knows its own
    weights. low_bit_error: its products of two secrets may be off by one in the bits that truncation drops.
    layer_iterations: n of each layer, of the first; (): the same in all.
    """

    protocol: str = "semi2k"
    fraction_bits: int = 18
    exponent: str = "quadratic"
    exponent_iterations: int = 0
    colocated: bool = True
    low_bit_error: bool = True
    layer_iterations: tuple[int, ...] = ()

    @property
    def num_parties(self) -> int:
        return PROTOCOLS[self.protocol]

    @property
    def squarings(self) -> int:
        """n of the engine's exponential; what a layer has more, the program squares itself."""
        if self.layer_iterations:
            return min(self.layer_iterations)
        return self.exponent_iterations or {"quadratic": 6, "taylor": 10, "pade": 0}[self.exponent]

    def bent_squarings(self, num_layers: int) -> tuple[int, ...]:
        """n of each layer where the argument is bent before, which the program does; () where it is not.

        Raises:
          UserError: n is given for another number of layers.
        """
        if self.exponent != "quadratic":
            return ()
        if self.layer_iterations and len(self.layer_iterations) != num_layers:
            raise UserError(
                f"layer_iterations names {len(self.layer_iterations)} layers, and the model has {num_layers}"
            )
        return self.layer_iterations or (self.squarings,) * num_layers

    def heads_at_once(self, num_heads: int) -> int:
        """How many heads one product should serve; a divisor of their number."""
        most = _HEADS_AT_ONCE[self.protocol]
        return next(count for count in range(min(most, num_heads), 0, -1) if num_heads % count == 0)

    def check(self) -> "Setting":
        """Returns the setting itself, checked.

        Raises:
          UserError: a field has no meaning.
        """
        if self.protocol not in PROTOCOLS:
            raise UserError(f"protocol={self.protocol!r} is not known{nearest(self.protocol, list(PROTOCOLS))}")
        if self.exponent not in EXPONENTS:
            raise UserError(f"exponent={self.exponent!r} is not known{nearest(self.exponent, EXPONENTS)}")
        if not 10 <= self.fraction_bits <= 26:
            raise UserError(f"fraction_bits={self.fraction_bits} must lie between 10 and 26")
        if self.exponent_iterations and not 4 <= self.exponent_iterations <= 12:
            raise UserError(f"exponent_iterations={self.exponent_iterations} must lie between 4 and 12, or be 0")
        for squarings in self.layer_iterations:
            if not 4 <= squarings <= 12:
                raise UserError(f"layer_iterations={squarings} of a layer must lie between 4 and 12")
        if self.layer_iterations and (self.exponent != "quadratic" or self.exponent_iterations):
            raise UserError("layer_iterations are of exponent=quadratic, and go without exponent_iterations")
        return self

    def for_engine(self) -> dict[str, Any]:
        config = dict(protocol=self.protocol.upper(), fxp_fraction_bits=self.fraction_bits)
        config["fxp_exp_mode"] = "EXP_PADE" if self.exponent == "pade" else "EXP_TAYLOR"
        config["fxp_exp_iters"] = self.squarings
        # It would cut large products by their number of rows, and so open a weight anew for each number.
        config["experimental_disable_mmul_split"] = True
        if self.protocol == "cheetah":
            config["experimental_enable_colocated_optimization"] = self.colocated
            config["cheetah_2pc_config.enable_mul_lsb_error"] = self.low_bit_error
        return config


class Account(NamedTuple):
    """What running a program took; bytes and messages are what each party sent, rounds are causal (a Lamport clock)."""

    seconds: float
    bytes: tuple[int, ...]
    messages: tuple[int, ...]
    rounds: int


class Link(NamedTuple):
    """This process as one party of several, and how it finds the others.

    addresses: by rank, host and port of the parties that it connects to; None of itself and of those that connect to
    it, at `listen`. tls: certificate and private_key, files, and peers: the others' certificates, DER in hexadecimal.
    """

    rank: int
    listen: tuple[str, int] | None
    addresses: tuple[tuple[str, int] | None, ...]
    tls: dict[str, Any] | None
    timeout_seconds: int = 120
    connect_seconds: int = 60


class Engine:
    """A subprocess that holds secret-shared arrays and runs programs on them; a context manager.

    Without a link it holds all parties and counts their messages; with one it is the party `link.rank`.

    Raises:
      UserError: by every call, in a sentence: the engine fails, it takes longer than `timeout` s, or one of `lines`,
        the connections to other parties' processes, ends meanwhile.
    """

    def __init__(
        self, setting: Setting, link: Link | None = None, *, lines: Sequence[Any] = (),
        directory: Path | None = None, timeout: float = 3600,
    ) -> None:  # fmt: skip
        self.setting, self.link, self.lines, self.timeout = setting.check(), link, lines, timeout
        python = environment_python(directory)
        self.folder = tempfile.TemporaryDirectory(prefix="jax_entropy_private_")
        self.log = Path(self.folder.name) / "log"
        requests, self._requests = os.pipe()
        self._replies, replies = os.pipe()
        with self.log.open("wb") as log:
            # alone in its group: Ctrl-C is handled here
            self.process = subprocess.Popen(
                [python, _RUNNER, str(requests), str(replies)], pass_fds=(requests, replies), stdin=subprocess.DEVNULL,
                cwd=self.folder.name, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        os.close(requests)
        os.close(replies)
        self._buffer = b""
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        self.has_opened, link, joins, limit = False, self.link, {}, self.timeout  # weights, once and for all
        if link is not None:
            joins["link"] = link._asdict()
            limit = link.connect_seconds + 5
        self.ask("open", limit, num_parties=self.setting.num_parties, config=self.setting.for_engine(), **joins)

    def reset(self, setting: Setting) -> "Engine":
        """The engine as it would start under a setting: every array and program is gone. For one without a link."""
        self.setting = setting.check()
        self._open()
        return self

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Ends the subprocess; what it shared is gone."""
        for descriptor in (self._requests, self._replies):
            with contextlib.suppress(OSError):
                os.close(descriptor)
        self.process.kill()
        self.process.wait()
        self.folder.cleanup()

    def ask(self, do: str, timeout: float | None = None, **arguments: Any) -> Any:
        """One request to the subprocess and its answer."""
        try:
            os.write(self._requests, (json.dumps(dict(do=do, **arguments)) + "\n").encode())
        except BrokenPipeError:
            raise UserError(f"the engine has ended: {self._last_words()}") from None
        deadline = time.monotonic() + (timeout or self.timeout)
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not (ready := select.select([self._replies, *self.lines], [], [], left)[0]):
                raise UserError(
                    f"the other party, or the engine, did not answer within {timeout or self.timeout:.0f} s"
                )
            if self._replies not in ready:
                ready[0].read_available()  # raises where the other party is gone
                continue
            if not (data := os.read(self._replies, 1 << 16)):
                raise UserError(f"the engine has ended: {self._last_words()}")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer = json.loads(line)
        if "error" in answer:
            raise UserError(_in_a_sentence(do, answer["error"], self.link))
        return answer["result"]

    def _last_words(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines() if self.log.exists() else []
        code = self.process.poll()
        memory = "; it may have run out of memory" if code == -9 else ""
        return (lines[-1][:300] if lines else f"exit code {code}") + memory

    def load(self, name: str, hlo: bytes, visibility: Sequence[str], options: Mapping[str, bool]) -> None:
        """Compiles a program."""
        file = Path(self.folder.name) / "program"
        file.write_bytes(hlo)
        self.ask("load", name=name, file=str(file), visibility=list(visibility), options=dict(options))

    def put(
        self, names: Sequence[str], owner: int, arrays: Mapping[str, np.ndarray] | None, *, public: bool = False,
        colocated: bool = False,
    ) -> None:  # fmt: skip
        """Shares the arrays of one party with all; the others call it with the same names and no arrays."""
        file = None
        if arrays is not None:
            file = Path(self.folder.name) / "in.npz"
            np.savez(file, **{name: self._nearest(arrays[name]) for name in names})
        try:
            self.ask(
                "put", names=list(names), owner=owner, file=file and str(file),
                visibility="public" if public else "secret", colocated=colocated,
            )  # fmt: skip
        finally:
            if file:
                file.unlink(missing_ok=True)

    def _nearest(self, array: np.ndarray) -> np.ndarray:
        """The nearest numbers that fixed point holds; the engine itself would round towards zero."""
        if not np.issubdtype(array.dtype, np.floating):
            return array
        one = np.float32(2**self.setting.fraction_bits)
        return np.rint(array * one) / one

    def get(self, names: Sequence[str], to: int) -> dict[str, np.ndarray] | None:
        """Reveals arrays to one party; None for the others."""
        file = Path(self.folder.name) / "out.npz"
        mine = self.link is None or self.link.rank == to
        self.ask("get", names=list(names), to=to, file=str(file) if mine else None)
        if not mine:
            return None
        with np.load(file) as arrays:
            return {name: arrays[name] for name in names}

    def run(self, program: str, inputs: Sequence[str], outputs: Sequence[str]) -> Account:
        """Runs a program on named arrays and keeps the results, as shares, under the names of `outputs`."""
        result = self.ask("run", program=program, inputs=list(inputs), outputs=list(outputs))
        return Account(result["seconds"], tuple(result["bytes"]), tuple(result["messages"]), result["rounds"])

    def keep(self, names: Sequence[str]) -> None:
        """Drops every array but these; opened weights are forgotten."""
        self.ask("keep", names=list(names), anew=self.has_opened)
        self.has_opened = False

    def peak_memory(self) -> int:
        """Bytes that the subprocess, all of its parties together, held at most."""
        return self.ask("peak_memory")


def _in_a_sentence(do: str, error: str, link: Link | None) -> str:
    first = re.sub(r"\[[\w/.]+:\d+\]\s*", "", error.splitlines()[0])[:300]
    if link is None:
        return f"the engine failed ({do}): {first}"
    if do == "open":
        return (
            f"no secure link ({first}) within {link.connect_seconds} s: is everybody running, can each reach the "
            "engines' ports of the server and the assistant, and does it hold their certificates?"
        )
    return f"another party is gone or silent ({do}): {first}"
