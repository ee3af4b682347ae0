"""Runs in the engine's own environment: a small machine that keeps secret-shared arrays and runs programs on them.

`python runner.py REQUESTS REPLIES` (two file descriptors) answers one JSON line with one JSON line. It holds either all
parties, as threads, or one party of a link between processes; the messages of both are counted.
"""

import ctypes
import json
import os
import signal
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import spu
import spu.libspu as libspu
from channels import DESERTED, Channel, Clock, Mailbox, Switchboard

SECRET, PUBLIC = libspu.Visibility.VIS_SECRET, libspu.Visibility.VIS_PUBLIC


def engine_config(options) -> libspu.RuntimeConfig:
    """The engine's RuntimeConfig from names and numbers, like {"protocol": "SEMI2K", "fxp_fraction_bits": 18}."""
    config = libspu.RuntimeConfig(
        protocol=getattr(libspu.ProtocolKind, options["protocol"]), field=libspu.FieldType.FM64
    )
    for name, value in options.items():
        if name == "fxp_exp_mode":
            value = getattr(libspu.RuntimeConfig.ExpMode, value)
        if name != "protocol":
            part, _, field = name.rpartition(".")
            setattr(getattr(config, part) if part else config, field, value)
    return config


class Machine:
    """The parties of a computation that this process holds, and what they can be asked to do."""

    def open(self, num_parties, config, link=None) -> None:
        """Starts all parties, or with a link (as `engine.Link`) the one that this process is.

        Whatever was there before is gone: arrays, programs, and what a runtime knows of weights that it opened.
        """
        self.contexts = self.runtimes = None
        self.num_parties, self.programs, self.config = num_parties, {}, engine_config(config)
        self.held, self.public = set(), set()  # names of arrays, and of those that everybody has
        self.io = spu.Io(num_parties, self.config)
        self.ranks = [link["rank"]] if link else list(range(num_parties))
        self.clocks = [Clock(num_parties) for _ in self.ranks]
        if link:  # (from, to): where messages wait, and where they are put
            wires = Switchboard(link).connect()
            inboxes = {(peer, link["rank"]): wire.inbox for peer, wire in wires.items()}
            outboxes = {(link["rank"], peer): wire for peer, wire in wires.items()}
        else:
            inboxes = outboxes = {(a, b): Mailbox() for a in self.ranks for b in self.ranks}
        self.boxes = inboxes.values()
        description = libspu.link.Desc()
        for rank in range(num_parties):
            description.add_party(f"party{rank}", f"rank{rank}")

        def join(i) -> libspu.link.Context:
            a = self.ranks[i]
            channels = [
                None if a == b else Channel(self.clocks[i], b, inboxes[b, a], outboxes[a, b])
                for b in range(num_parties)
            ]
            return libspu.link.create_with_channels(description, a, channels)

        self.contexts = self._together(join)
        self._start_runtimes()

    def _start_runtimes(self) -> None:
        """A runtime sets itself up with those of the others."""
        self.runtimes = self._together(lambda i: spu.Runtime(self.contexts[i], self.config))

    def keep(self, names, anew) -> None:
        """Drops all arrays but these; anew: and what the runtimes know of weights that they opened."""
        if anew:
            shares = [[runtime.get_var(name) for name in names] for runtime in self.runtimes]
            self._start_runtimes()
            for runtime, kept in zip(self.runtimes, shares, strict=True):
                for name, share in zip(names, kept, strict=True):
                    runtime.set_var(name, share)
        else:
            for runtime in self.runtimes:
                for name in self.held - {*names}:
                    runtime.del_var(name)
        self.held = {*names}

    def _together(self, function) -> list:
        """The results of function(i) for every party here, run at the same time."""
        if len(self.ranks) == 1:
            return [function(0)]

        def guarded(i) -> object:
            try:
                return function(i)
            except BaseException:
                for box in self.boxes:
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
        (self.public.update if visibility == "public" else self.public.difference_update)(names)
        self.held.update(names)
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
            if name in self.public:
                arrays[name] = self.io.reconstruct(shares * (self.num_parties // len(shares)))
                continue
            if len(self.ranks) == 1 and to not in self.ranks:
                self._send_share(to, shares[0])
                continue
            if len(self.ranks) == 1:
                shares = [shares[0] if rank == to else self._receive_share(rank) for rank in range(self.num_parties)]
            arrays[name] = self.io.reconstruct(shares)
        if file:
            np.savez(file, **arrays)

    def run(self, program, inputs, outputs) -> dict:
        """Runs a program on named arrays. Bytes sent by each party that is here, to all others, rounds, seconds."""
        executable = libspu.Executable(program, inputs, outputs, self.programs[program])
        before = [(sum(clock.sent), clock.messages) for clock in self.clocks]
        start_rounds, start = max(clock.rounds for clock in self.clocks), time.perf_counter()

        def run(i) -> None:
            self.clocks[i].start(start_rounds)
            self.runtimes[i].run(executable)
            self.clocks[i].end()

        self._together(run)
        self.held.update(outputs)
        return dict(
            seconds=time.perf_counter() - start,
            bytes=[sum(clock.sent) - sent for clock, (sent, _) in zip(self.clocks, before, strict=True)],
            messages=[clock.messages - count for clock, (_, count) in zip(self.clocks, before, strict=True)],
            rounds=max(clock.rounds for clock in self.clocks) - start_rounds,
        )

    def peak_memory(self) -> int:
        """Bytes of memory that this process held at most."""
        with open("/proc/self/status") as status:  # getrusage counts what the process held that started this one
            return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))

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
