"""Runs in the engine's own environment: a small machine that keeps secret-shared arrays and runs programs on them.

`python runner.py REQUESTS REPLIES` (two file descriptors) answers one JSON line with one JSON line. It holds either all
parties, as threads whose messages are counted, or one party of a link between two processes.
"""

import ctypes
import json
import os
import resource
import signal
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import spu
import spu.libspu as libspu

DESERTED = "another party has failed"
SECRET, PUBLIC = libspu.Visibility.VIS_SECRET, libspu.Visibility.VIS_PUBLIC


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

    def __init__(self) -> None:
        self.messages, self.arrived, self.closed = {}, threading.Condition(), False

    def put(self, key, message) -> None:
        with self.arrived:
            self.messages[key] = message
            self.arrived.notify_all()

    def take(self, key, timeout=3600) -> tuple[int, bytes]:
        with self.arrived:
            if not self.arrived.wait_for(lambda: key in self.messages or self.closed, timeout):
                raise RuntimeError("a party waited in vain for another")
            if key not in self.messages:
                raise RuntimeError(DESERTED)
            return self.messages.pop(key)

    def close(self) -> None:
        """Whoever waits here waits no longer."""
        with self.arrived:
            self.closed = True
            self.arrived.notify_all()


class CountedChannel(libspu.link.IChannel):
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


def engine_config(options) -> libspu.RuntimeConfig:
    """The engine's RuntimeConfig from names and numbers, like {"protocol": "SEMI2K", "fxp_fraction_bits": 18}."""
    config = libspu.RuntimeConfig(
        protocol=getattr(libspu.ProtocolKind, options["protocol"]), field=libspu.FieldType.FM64
    )
    for name, value in options.items():
        if name == "fxp_exp_mode":
            value = getattr(libspu.RuntimeConfig.ExpMode, value)
        if name != "protocol":
            setattr(config, name, value)
    return config


def tls_options(side, tls) -> None:
    side.cert.certificate_path, side.cert.private_key_path = tls["certificate"], tls["private_key"]
    side.verify.ca_file_path, side.verify.verify_depth = tls["peer_certificate"], 1  # 0 would accept anybody


class Machine:
    """The parties of a computation that this process holds, and what they can be asked to do."""

    def open(self, num_parties, config, link=None) -> None:
        """Starts all parties, or with a link ({rank, addresses, timeout_ms, tls}) the one that this process is.

        Whatever was there before is gone: arrays, programs, and what a runtime knows of weights that it opened.
        """
        self.contexts = self.runtimes = None
        self.num_parties, self.programs, config = num_parties, {}, engine_config(config)
        self.io = spu.Io(num_parties, config)
        description = libspu.link.Desc()
        self.ranks = [link["rank"]] if link else list(range(num_parties))
        for rank in range(num_parties):
            description.add_party(f"party{rank}", link["addresses"][rank] if link else f"thread{rank}")
        if link:
            description.recv_timeout_ms = description.http_timeout_ms = link["timeout_ms"]
            description.connect_retry_times, description.connect_retry_interval_ms = link["connect_seconds"], 1000
            description.throttle_window_size = 4000
            if link["tls"]:
                description.enable_ssl = True
                tls_options(description.client_ssl_opts, link["tls"])
                tls_options(description.server_ssl_opts, link["tls"])
            contexts = [libspu.link.create_brpc(description, link["rank"])]
            self.clocks = []
        else:
            self.clocks = [Clock(num_parties) for _ in self.ranks]
            self.boxes = boxes = {(a, b): Mailbox() for a in self.ranks for b in self.ranks}
            channels = [
                [None if a == b else CountedChannel(self.clocks[a], b, boxes[b, a], boxes[a, b]) for b in self.ranks]
                for a in self.ranks
            ]
            contexts = self._together(lambda rank: libspu.link.create_with_channels(description, rank, channels[rank]))
        self.contexts = contexts
        # a runtime sets itself up with the others
        self.runtimes = self._together(lambda i: spu.Runtime(contexts[i], config))

    def _together(self, function) -> list:
        """The results of function(i) for every party here, run at the same time."""
        if len(self.ranks) == 1:
            return [function(0)]

        def guarded(i) -> object:
            try:
                return function(i)
            except BaseException:
                for box in self.boxes.values():
                    box.close()
                raise

        with ThreadPoolExecutor(len(self.ranks)) as pool:
            futures = [pool.submit(guarded, i) for i in range(len(self.ranks))]
        errors = [future.exception() for future in futures if future.exception()]
        if errors:  # the cause first; through the engine only the text of an error comes back
            raise next((error for error in errors if DESERTED not in str(error)), errors[0])
        return [future.result() for future in futures]

    def load(self, name, file, visibility, options) -> None:
        """Compiles an HLO proto under a name."""
        with open(file, "rb") as stream:
            source = libspu.CompilationSource(
                libspu.SourceIRType.XLA, stream.read(), [_visibility(v) for v in visibility]
            )
        self.programs[name] = spu.compile(source, libspu.CompilerOptions(**options))

    def put(self, names, owner, file=None, visibility="secret", colocated=False) -> None:
        """Shares the owner's arrays with all parties; only the owner gives the .npz file."""
        arrays = np.load(file) if file else None
        own = range(self.num_parties) if len(self.ranks) > 1 else [owner]
        for name in names:
            if set(self.ranks) & set(own):
                hint = owner if colocated else -1
                shares = self.io.make_shares(np.asarray(arrays[name]), _visibility(visibility), hint)
                if len(self.ranks) == 1:
                    for rank in set(range(self.num_parties)) - set(self.ranks):
                        self._send_share(rank, shares[rank])
                    self.runtimes[0].set_var(name, shares[self.ranks[0]])
                else:
                    for runtime, share in zip(self.runtimes, shares, strict=True):
                        runtime.set_var(name, share)
            else:
                self.runtimes[0].set_var(name, self._receive_share(owner))

    def get(self, names, to, file=None) -> None:
        """Reveals arrays to one party, which writes them to the .npz file."""
        arrays = {}
        for name in names:
            shares = [runtime.get_var(name) for runtime in self.runtimes]
            if len(self.ranks) == 1 and to not in self.ranks:
                self._send_share(to, shares[0])
                continue
            if len(self.ranks) == 1:
                shares = [shares[0] if rank == to else self._receive_share(rank) for rank in range(self.num_parties)]
            arrays[name] = self.io.reconstruct(shares)
        if file:
            np.savez(file, **arrays)

    def run(self, program, inputs, outputs) -> dict:
        """Runs a program on named arrays. Bytes sent by each party (a sum over its peers), rounds, seconds."""
        executable = libspu.Executable(program, inputs, outputs, self.programs[program])
        before = [(sum(clock.sent), clock.messages) for clock in self.clocks]
        start_rounds, start = max((clock.rounds for clock in self.clocks), default=0), time.perf_counter()

        def run(i) -> None:
            if self.clocks:
                self.clocks[i].start(start_rounds)
            self.runtimes[i].run(executable)
            if self.clocks:
                self.clocks[i].end()

        self._together(run)
        return dict(
            seconds=time.perf_counter() - start,
            bytes=[sum(clock.sent) - sent for clock, (sent, _) in zip(self.clocks, before, strict=True)],
            messages=[clock.messages - count for clock, (_, count) in zip(self.clocks, before, strict=True)],
            rounds=max((clock.rounds for clock in self.clocks), default=0) - start_rounds,
        )

    def peak_memory(self) -> int:
        """Bytes of memory that this process held at most."""
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def _send_share(self, to, share) -> None:
        context, chunks = self.contexts[0], share.share_chunks
        context.send(to, share.meta)
        context.send(to, str(len(chunks)))
        for chunk in chunks:
            context.send(to, chunk)

    def _receive_share(self, source) -> libspu.Share:
        share, context = libspu.Share(), self.contexts[0]
        share.meta = context.recv(source)
        share.share_chunks = [context.recv(source) for _ in range(int(context.recv(source)))]
        return share


def _visibility(name) -> libspu.Visibility:
    return PUBLIC if name == "public" else SECRET


def main(requests_fd, replies_fd) -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: shares do not outlive who asked for them
    machine, replies = Machine(), os.fdopen(replies_fd, "w", buffering=1)
    for line in os.fdopen(requests_fd):
        request = json.loads(line)
        try:
            answer = {"result": getattr(machine, request.pop("do"))(**request)}
        except BaseException as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps(answer) + "\n")
    os._exit(0)  # the engine's own threads would outlive a link whose other end is gone


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
