"""Processes that trust each other's certificates and nothing else: keys, and JSON messages over mutual TLS.

Shapes, settings and lengths go over this line; shares go over the engine's own links, under the same certificates.
"""

import hashlib
import re
import select
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jax_entropy.errors import UserError
from jax_entropy.paths import writing
from jax_entropy.private.engine import tls
from jax_entropy.private.session import messages

ROLES = ("client", "server", "assistant")  # by their ranks
HANDSHAKE_SECONDS = 8
_OWN_FILES = ("certificate.pem", "private_key.pem")
_WELCOME = b"jax_entropy\n"
_LONGEST_MESSAGE = 1 << 26  # bytes; a tokenizer is the largest


class BusyError(UserError):
    """The other party has accepted a connection and not finished its handshake."""


class Keys(NamedTuple):
    """Files of one party: its certificate and private key, and by role the certificates that it accepts."""

    certificate: Path
    private_key: Path
    peers: dict[str, Path]

    def accepted(self, *roles: str) -> dict[str, bytes]:
        """Certificates of these parties, DER."""
        return {role: _read_certificate(self.peers[role]) for role in roles}

    def for_engine(self) -> dict[str, Any]:
        """`tls` of the engine's `Link`."""
        peers = {ROLES.index(role): der.hex() for role, der in self.accepted(*self.peers).items()}
        return dict(
            certificate=str(self.certificate.resolve()), private_key=str(self.private_key.resolve()), peers=peers
        )


def make_all_keys(directory: Path, num_parties: int, days: int) -> dict[str, str]:
    """Keys of all parties in one step: a folder for each, by role, which holds the others' certificates, too.

    Returns:
      The certificates' fingerprints by role.
    Raises:
      UserError: as `make_keys`, before any of them is made.
    """
    roles = ROLES[:num_parties]
    others = {role: [other for other in roles if other != role] for role in roles}
    for role in roles:
        _check_new(directory / role, _OWN_FILES + tuple(f"{other}.pem" for other in others[role]), role, days)
    found = {role: make_keys(directory / role, role, days) for role in roles}
    for role in roles:
        with writing(directory / role):
            for other in others[role]:
                shutil.copy(directory / other / "certificate.pem", directory / role / f"{other}.pem")
    return found


def make_keys(directory: Path, name: str, days: int) -> str:
    """Writes private_key.pem and a self-signed certificate.pem.

    Returns:
      The certificate's fingerprint.
    Raises:
      UserError: they are there already or cannot be made.
    """
    _check_new(directory, _OWN_FILES, name, days)
    certificate, key = (directory / file for file in _OWN_FILES)
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        _openssl(
            "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-utf8",
            "-days", str(days), "-subj", f"/CN={name}", "-keyout", str(key), "-out", str(certificate),
        )  # fmt: skip
        key.chmod(0o600)
    except OSError as error:
        raise UserError(f"{directory} cannot be written: {error.strerror}") from None
    except UserError:
        key.unlink(missing_ok=True)
        raise
    return fingerprint(certificate)


def _check_new(directory: Path, files: Sequence[str], name: str, days: int) -> None:
    """Checks that these files can be made in a folder: keys of such a name, valid for so many days.

    Raises:
      UserError: one of them is there, or something cannot be.
    """
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory} is a file; keys need a folder")
    if there := [file for file in files if (directory / file).exists()]:
        raise UserError(f"{directory} holds keys already ({there[0]}); choose another folder")
    if not 1 <= days <= 36500:
        raise UserError(f"days={days} must lie between 1 and 36500")
    if not re.fullmatch(r"[\w .-]{1,64}", name):
        raise UserError(f"name={name!r} must be 1 to 64 letters, digits, spaces, dots or dashes")


def _openssl(*arguments: str) -> str:
    if not shutil.which("openssl"):
        raise UserError("the program openssl is not on the PATH; install it to make and check certificates")
    done = subprocess.run(["openssl", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"openssl {arguments[0]} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return done.stdout


def read_keys(folder: Path, peers: Mapping[str, Path | None]) -> Keys:
    """The files of one party, and the certificates of its peers by role; `folder/ROLE.pem` where no file is named.

    Raises:
      UserError: one is missing, damaged, expired, or does not fit its key.
    """
    files = {role: file or folder / f"{role}.pem" for role, file in peers.items()}
    keys = Keys(folder / "certificate.pem", folder / "private_key.pem", files)
    for path in (keys.certificate, keys.private_key):
        if not path.is_file():
            raise UserError(f"{path} is missing; make keys with `jax-entropy private keys`, and exchange certificates")
    for role, path in files.items():
        if not path.is_file():
            raise UserError(f"{path} is missing: the certificate that the {role} gave you")
    for path in (keys.certificate, *files.values()):
        _read_certificate(path)
        try:
            _openssl("x509", "-in", str(path), "-noout", "-checkend", "0")
        except UserError:
            raise UserError(
                f"the certificate {path} has expired; make new ones with `jax-entropy private keys`"
            ) from None
    shown = {role: _read_certificate(path) for role, path in dict(files, own=keys.certificate).items()}
    for role, der in shown.items():
        if same := [other for other in shown if other != role and shown[other] == der]:
            raise UserError(f"one certificate in {folder} is of two parties: {role} and {same[0]}")
    _context(keys, *files, server=True)
    return keys


def _read_certificate(path: Path) -> bytes:
    """The certificate, DER, of a PEM file, in which text may stand before and after it.

    Raises:
      UserError: there is not exactly one: a peer is pinned by its certificate and by no other.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    blocks = re.findall(rb"^-----BEGIN CERTIFICATE-----\s.*?^-----END CERTIFICATE-----", data, re.DOTALL | re.MULTILINE)
    if len(blocks) > 1:
        raise UserError(f"{path} holds {len(blocks)} certificates; name a file with the one that is meant")
    if not blocks and data[:1] == b"\x30":  # how DER begins
        raise UserError(
            f"{path} is no certificate in PEM, but perhaps one in DER; write it anew: "
            f"openssl x509 -inform der -in {path} -out certificate.pem"
        )
    try:
        der = ssl.PEM_cert_to_DER_cert(b"".join(blocks).decode("ascii"))
        ssl.create_default_context(cadata=der)
    except (ValueError, ssl.SSLError):
        raise UserError(f"{path} is no certificate") from None
    return der


def fingerprint(certificate: Path) -> str:
    """SHA-256 of a certificate, to compare by telephone."""
    return hashlib.sha256(_read_certificate(certificate)).hexdigest()


def _context(keys: Keys, *roles: str, server: bool) -> ssl.SSLContext:
    """TLS with parties of these roles.

    Raises:
      UserError: the private key cannot be used; nobody is asked.
    """

    def pass_phrase() -> str:
        raise UserError(
            f"{keys.private_key} is locked by a pass phrase, which the engine cannot be given; write it without: "
            f"openssl pkey -in {keys.private_key} -out unlocked.pem"
        )

    files = keys.certificate, keys.private_key, keys.accepted(*roles)
    try:
        return tls.pinned_context(*files, server=server, pass_phrase=pass_phrase)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise UserError(f"{keys.private_key} is not the key of {keys.certificate}") from None
        raise UserError(f"{keys.private_key} is no private key in PEM") from None
    except OSError as error:
        raise UserError(f"{keys.private_key} cannot be read: {error.strerror or error}") from None


class Line:
    """Messages between two processes.

    Raises:
      UserError: in a sentence: the other is gone or silent.
    """

    def __init__(
        self, connection: socket.socket, keys: Keys | None, peer: str, *, server: bool, timeout: float
    ) -> None:
        self.timeout, self._buffer = timeout, bytearray()
        connection.settimeout(HANDSHAKE_SECONDS)
        try:
            if keys:
                context = _context(keys, peer, server=server)
                connection, _ = tls.shake_hands(connection, context, keys.accepted(peer), server=server)
            # only what the server says first tells a client that its own certificate was accepted
            if server:
                connection.sendall(_WELCOME)
            elif (heard := connection.recv(len(_WELCOME))) != _WELCOME:
                raise UserError(f"the {peer} {'does not speak this protocol' if heard else 'is gone'}")
        except BaseException as error:
            connection.close()
            raise _refused(error, peer) from None
        connection.settimeout(timeout)
        self.connection, self.peer = connection, peer

    def fileno(self) -> int:
        return self.connection.fileno()

    def is_open(self) -> bool:
        """Whether the other end is still there, as far as it has said."""
        try:
            while select.select([self.connection], [], [], 0)[0]:
                self.read_available()
        except UserError:
            return False
        return True

    def send(self, message: NamedTuple) -> None:
        """Sends one of `messages`."""
        try:
            self.connection.sendall(messages.write(message))
        except OSError:
            raise UserError(f"the {self.peer} is gone") from None

    def receive(self, *kinds: type[messages.Message], timeout: float | None = None) -> messages.Message:
        """The next message, of one of these kinds, waited for `timeout` s."""
        limit = self.timeout if timeout is None else timeout
        deadline = time.monotonic() + limit
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            pending = isinstance(self.connection, ssl.SSLSocket) and self.connection.pending()
            if not pending and (left <= 0 or not select.select([self.connection], [], [], left)[0]):
                raise UserError(f"the other party said nothing for {limit:.0f} s")
            self.read_available()
        line, _, self._buffer = self._buffer.partition(b"\n")
        return messages.read(bytes(line), *kinds)

    def read_available(self) -> None:
        """Takes in what has arrived.

        Raises:
          UserError: the other party has ended the connection.
        """
        try:
            data = self.connection.recv(1 << 16)
        except ssl.SSLError as error:
            raise _refused(error, self.peer) from None
        except (TimeoutError, OSError):
            data = b""
        self._buffer += data
        if not data:
            raise UserError(f"the {self.peer} is gone")
        if len(self._buffer) > _LONGEST_MESSAGE:
            raise UserError("the other party does not speak this protocol")

    def close(self) -> None:
        self.connection.close()


def _refused(error: BaseException, peer: str) -> BaseException:
    """What went wrong in a handshake with a party of this role, as a sentence."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return UserError(f"the {peer}'s certificate is refused: {error.verify_message}")
    if isinstance(error, ssl.SSLError):
        reason = (error.reason or str(error)).replace("_", " ").lower()
        if "alert" in reason or "unknown ca" in reason:
            return UserError(f"the {peer} refuses this one's certificate ({reason})")
        return UserError(f"the {peer} does not speak TLS as expected ({reason})")
    if isinstance(error, TimeoutError):
        return BusyError(
            f"the {peer} did not finish its handshake within {HANDSHAKE_SECONDS} s; perhaps only one of the two "
            "uses TLS"
        )
    return UserError(f"the {peer} is gone") if isinstance(error, OSError) else error


def listen(host: str, port: int) -> socket.socket:
    """A socket that waits for connections.

    Raises:
      UserError: the address cannot be had.
    """
    try:
        return socket.create_server((host, port))
    except OSError as error:
        reason, _, _ = str(error.strerror or error).partition(" (while attempting")  # and the address again
        raise UserError(f"{host}:{port} cannot be had: {reason}") from None


def check_free(host: str, port: int) -> None:
    """Checks that a party's two ports can be had: the one that it is spoken to on, and the engine's after it.

    Raises:
      UserError: one cannot.
    """
    listen(host, port).close()
    try:
        listen(host, port + 1).close()
    except UserError as error:
        raise UserError(f"{error}; the engine needs the port after {port}") from None


def connect(host: str, port: int, keys: Keys | None, *, peer: str = "server", patience: float, timeout: float) -> Line:
    """A line to the server, or another `peer`, tried for `patience` s.

    Raises:
      UserError: there is none, or certificates are refused.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            return Line(socket.create_connection((host, port), timeout=5), keys, peer, server=False, timeout=timeout)
        except BusyError:
            if time.monotonic() > deadline:
                raise
        except UserError:
            raise
        except OSError as error:
            if time.monotonic() > deadline:
                command = "assist" if peer == "assistant" else "serve"
                raise UserError(
                    f"no {peer} at {host}:{port} ({error.strerror or error}); start `jax-entropy private {command}` "
                    "there"
                ) from None
            time.sleep(0.3)
