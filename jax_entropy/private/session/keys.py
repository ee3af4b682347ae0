"""Who is who between parties that trust each other's certificates and nothing else: keys, made, read and checked."""

import hashlib
import re
import shutil
import ssl
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jax_entropy.errors import UserError
from jax_entropy.paths import writing
from jax_entropy.private.engine import tls

ROLES = ("client", "server", "assistant")  # by their ranks
_OWN_FILES = ("certificate.pem", "private_key.pem")


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

    def context(self, *roles: str, server: bool) -> ssl.SSLContext:
        """TLS with parties of these roles.

        Raises:
          UserError: the private key cannot be used; nobody is asked.
        """

        def pass_phrase() -> str:
            raise UserError(
                f"{self.private_key} is locked by a pass phrase, which the engine cannot be given; write it without: "
                f"openssl pkey -in {self.private_key} -out unlocked.pem"
            )

        files = self.certificate, self.private_key, self.accepted(*roles)
        try:
            return tls.pinned_context(*files, server=server, pass_phrase=pass_phrase)
        except ssl.SSLError as error:
            if error.reason == "KEY_VALUES_MISMATCH":
                raise UserError(f"{self.private_key} is not the key of {self.certificate}") from None
            raise UserError(f"{self.private_key} is no private key in PEM") from None
        except OSError as error:
            raise UserError(f"{self.private_key} cannot be read: {error.strerror or error}") from None


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
    keys.context(*files, server=True)
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
