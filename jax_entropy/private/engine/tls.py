"""TLS 1.3 between parties that accept each other's certificates and nothing else.

Standard library only: the engine's own Python runs it, too.
"""

import socket
import ssl
from collections.abc import Callable, Mapping
from pathlib import Path


def pinned_context(
    certificate: Path | str, private_key: Path | str, accepted: Mapping[int | str, bytes], *, server: bool,
    pass_phrase: Callable[[], str] | None = None,
) -> ssl.SSLContext:  # fmt: skip
    """What one end of a connection shows, and the certificates (DER, by their owner) that it accepts of the other."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # the certificate itself is the trust
    context.verify_mode = ssl.CERT_REQUIRED
    if server:
        context.num_tickets = 0  # nothing is ever sent to an end that only writes
    context.load_cert_chain(certificate, private_key, password=pass_phrase)
    for der in accepted.values():
        context.load_verify_locations(cadata=der)
    return context


def shake_hands(
    connection: socket.socket, context: ssl.SSLContext, accepted: Mapping[int | str, bytes], *, server: bool
) -> tuple[ssl.SSLSocket, int | str]:
    """The connection under TLS, and whose certificate the other end has shown.

    Raises:
      ssl.SSLError: it is none of those that are accepted.
    """
    connection = context.wrap_socket(connection, server_side=server)
    shown = connection.getpeercert(binary_form=True)
    for owner, der in accepted.items():
        if der == shown:
            return connection, owner
    connection.close()
    raise ssl.SSLError("the other party's certificate is not the one that is accepted")
