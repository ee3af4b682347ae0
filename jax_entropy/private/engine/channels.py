"""How messages of the engine travel: between threads of a process, or over mutual TLS to other parties' processes.

Runs in the engine's own environment. Every message carries a Lamport clock, so that bytes and rounds are counted alike.
"""

import os
import queue
import socket
import struct
import sys
import threading
import time

import callers
import spu.libspu as libspu
import tls

DESERTED = "another party has failed"
HANDSHAKE_SECONDS = 8
_HEADER = struct.Struct("!IQQ")  # lengths of the key, the clock, length of the message
_TOGETHER = 1 << 16  # bytes of a message that is worth copying to save a packet


class Clock:
    """A party's Lamport clock and the bytes that it sent to each other party.

    CHEETAH's threads send on links of their own. The main thread's clock is the party's; threads beside it keep theirs,
    so that what goes on at the same time is not counted one after the other, and the main thread takes them over when
    it has waited for them.
    """

    def __init__(self, num_parties) -> None:
        self.lock, self.rounds, self.sent, self.messages = threading.Lock(), 0, [0] * num_parties, 0
        self.main, self.link, self.events, self.beside = None, None, 0, {}

    def start(self, rounds) -> None:
        """The calling thread is the main one, and what comes depends on everything before."""
        self.main, self.rounds = threading.get_native_id(), rounds
        self.beside.clear()

    def send(self, peer, key, num_bytes) -> int:
        with self.lock:
            self.sent[peer] += num_bytes
            self.messages += 1
            return self._now(key, None) + 1

    def receive(self, key, stamp) -> None:
        with self.lock:
            self._now(key, stamp)

    def _now(self, key, stamp) -> int:
        """This thread's clock after a message with a stamp came in, or before one (None) goes out."""
        link, thread = key.partition(":")[0], threading.get_native_id()
        if thread == self.main:
            self._join(link)
            self.link, self.events, self.rounds = link, self.events + 1, max(self.rounds, stamp or 0)
            return self.rounds
        beside = self.beside.setdefault(link, Beside())
        if beside.thread != thread:
            beside.thread, beside.events, beside.sends = thread, self.events, False
            beside.rounds = max(beside.rounds, self.rounds)
        beside.rounds = max(beside.rounds, stamp or 0)
        beside.sends |= stamp is None
        return beside.rounds

    def end(self) -> None:
        """The main thread has waited for all others."""
        with self.lock:
            self._join(None)

    def _join(self, link) -> None:
        """Before the main thread goes on at a link: takes over the clocks of those that it has waited for."""
        for name, beside in list(self.beside.items()):
            helps = name == link or (name == self.link and not beside.sends)  # receives for the main thread
            waited = link != self.link or beside.events == self.events
            if helps or (waited and not os.path.exists(f"/proc/self/task/{beside.thread}")):
                self.rounds = max(self.rounds, beside.rounds)
                del self.beside[name]


class Beside:
    """The clock of a link that another thread than the main one uses, which had seen so many events when it began."""

    def __init__(self) -> None:
        self.rounds, self.events, self.thread, self.sends = 0, 0, None, False


class Mailbox:
    """Messages on their way to one party from one other, by key."""

    def __init__(self, timeout=3600) -> None:
        self.messages, self.arrived, self.closed, self.timeout = {}, threading.Condition(), False, timeout

    def put(self, key, message) -> None:
        with self.arrived:
            self.messages[key] = message
            self.arrived.notify_all()

    def take(self, key) -> tuple[int, bytes]:
        with self.arrived:
            if not self.arrived.wait_for(lambda: key in self.messages or self.closed, self.timeout):
                raise RuntimeError("a party waited in vain for another")
            if key not in self.messages:
                raise RuntimeError(DESERTED)
            return self.messages.pop(key)

    def close(self) -> None:
        """Whoever waits here waits no longer."""
        with self.arrived:
            self.closed = True
            self.arrived.notify_all()


class Channel(libspu.link.IChannel):
    """One party's end of its connection with another; the engine calls these methods by their C++ names."""

    def __init__(self, clock, peer, inbox, outbox) -> None:
        super().__init__()
        self.clock, self.peer, self.inbox, self.outbox = clock, peer, inbox, outbox

    def Send(self, key, value) -> None:
        value = bytes(value)
        self.outbox.put(key, (self.clock.send(self.peer, key, len(value)), value))

    SendAsync = SendAsyncThrottled = Send

    def Recv(self, key) -> bytes:
        stamp, value = self.inbox.take(key)
        self.clock.receive(key, stamp)
        return value

    def TestSend(self, timeout) -> None:
        self.outbox.put("connected", (0, b""))

    def TestRecv(self) -> None:
        self.inbox.take("connected")

    def SetThrottleWindowSize(self, size) -> None:
        pass

    SetChunkParallelSendSize = SetThrottleWindowSize

    def WaitLinkTaskFinish(self) -> None:
        pass

    Abort = WaitLinkTaskFinish


class Wire:
    """A connection with another party's process: `put` sends, and a thread takes what arrives into `inbox`.

    A socket for each way, since one under TLS is not made for two threads at once.
    """

    def __init__(self, outgoing, incoming, timeout) -> None:
        self.inbox, self._outgoing, self._lock = Mailbox(timeout), outgoing, threading.Lock()
        outgoing.settimeout(timeout)
        incoming.settimeout(None)
        threading.Thread(target=self._take_in, args=(incoming,), daemon=True).start()

    def put(self, key, message) -> None:
        (stamp, value), name = message, key.encode()
        header = _HEADER.pack(len(name), stamp, len(value)) + name
        try:
            with self._lock:
                for part in [header + value] if len(value) < _TOGETHER else [header, value]:
                    self._outgoing.sendall(part)
        except OSError:
            raise RuntimeError(DESERTED) from None

    def _take_in(self, incoming) -> None:
        try:
            while True:
                length, stamp, size = _HEADER.unpack(_read(incoming, _HEADER.size))
                self.inbox.put(_read(incoming, length).decode(), (stamp, _read(incoming, size)))
        except (OSError, EOFError):
            pass
        finally:
            self.inbox.close()


def _read(incoming, size) -> bytes:
    """So many bytes; memory is taken for those that have come, not for those that a peer promises."""
    data = bytearray()
    while len(data) < size:
        if not (part := incoming.recv(min(size - len(data), _TOGETHER))):
            raise EOFError
        data += part
    return bytes(data)


class Switchboard:
    """Finds the other parties of a link: connects to those that have an address, and is connected to by the rest.

    Args:
      link: as `engine.Link`; tls holds this party's files and the others' certificates, DER in hexadecimal, by rank.
    """

    def __init__(self, link) -> None:
        self.link, self.deadline = link, time.monotonic() + link["connect_seconds"]
        self.files = link["tls"] and (link["tls"]["certificate"], link["tls"]["private_key"])
        self.accepted = link["tls"] and {int(k): bytes.fromhex(der) for k, der in link["tls"]["peers"].items()}
        self.found = queue.SimpleQueue()  # (rank, whether it comes in here, socket)

    def connect(self) -> dict:
        """A wire to each other party, by rank.

        Raises:
          RuntimeError: one of them is not there in time.
        """
        rank, addresses = self.link["rank"], self.link["addresses"]
        missing = {(peer, way) for peer in range(len(addresses)) if peer != rank for way in (False, True)}
        expected = {peer for peer, _ in missing if addresses[peer] is None}
        door = socket.create_server(tuple(self.link["listen"])) if expected else None
        if door:
            hear = lambda connection, _: self._hear(connection, expected)  # noqa: E731
            threading.Thread(target=callers.hear_all, args=(door, hear), daemon=True).start()
        for peer, way in missing:
            if peer not in expected:
                threading.Thread(target=self._call, args=(peer, way), daemon=True).start()
        sockets = {}
        while missing - {*sockets}:
            try:
                peer, way, connection = self.found.get(timeout=max(self.deadline - time.monotonic(), 0.01))
            except queue.Empty:
                absent = sorted({peer for peer, _ in missing - {*sockets}})
                raise RuntimeError(f"no link with party {', '.join(map(str, absent))}") from None
            sockets[peer, way] = connection
        if door:
            door.close()
        return {
            peer: Wire(sockets[peer, False], sockets[peer, True], self.link["timeout_seconds"])
            for peer in range(len(addresses))
            if peer != rank
        }

    def _call(self, peer, way) -> None:
        """Connects to a party for what comes from it (way) or goes to it, until it answers."""
        while time.monotonic() < self.deadline:
            try:
                connection = socket.create_connection(tuple(self.link["addresses"][peer]), HANDSHAKE_SECONDS)
                if self.accepted:
                    accepted = {peer: self.accepted[peer]}
                    context = tls.pinned_context(*self.files, accepted, server=False)
                    connection, _ = tls.shake_hands(connection, context, accepted, server=False)
                connection.sendall(bytes([self.link["rank"], not way]))
                if connection.recv(1) != b"!":  # only now has the other one accepted this one's certificate
                    raise OSError("refused")
            except OSError as error:
                print(f"party {peer} does not answer: {error}", file=sys.stderr, flush=True)
                time.sleep(0.1)
                continue
            return self._keep(peer, way, connection)

    def _hear(self, connection, expected) -> None:
        """Takes a connection whose other end is a party that is expected; anybody else is turned away."""
        connection.settimeout(HANDSHAKE_SECONDS)
        try:
            if self.accepted:
                accepted = {peer: self.accepted[peer] for peer in expected}
                context = tls.pinned_context(*self.files, accepted, server=True)
                connection, shown = tls.shake_hands(connection, context, accepted, server=True)
            peer, way = _read(connection, 2)
            if peer not in expected or (self.accepted and peer != shown) or way > 1:
                raise OSError("not a party")
            connection.sendall(b"!")
        except (OSError, EOFError) as error:
            print(f"refused a connection: {error}", file=sys.stderr, flush=True)
            return connection.close()
        self._keep(peer, bool(way), connection)

    def _keep(self, peer, way, connection) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.found.put((peer, way, connection))
