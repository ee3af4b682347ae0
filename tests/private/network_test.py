"""What an account says of the time on a network is what a real link of that latency and bandwidth takes."""

import contextlib
import queue
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from jax_entropy.private.cost.account import Network, on_network, run_whole
from jax_entropy.private.engine.engine import Engine, Link, Setting
from jax_entropy.private.program.export import export
from jax_entropy.private.session.inference import CLIENT, SERVER, PrivateModel
from tests.private.helpers import free_ports
from tests.tiny_model import initial, random_tokens, tiny


class Shaper:
    """A TCP port that passes on to another with a latency in seconds and a bandwidth in bytes a second, each way."""

    def __init__(self, port: int, network: Network):
        self.door, self.target, self.network = socket.create_server(("127.0.0.1", 0)), port, network
        self.address = self.door.getsockname()
        self.free = [0.0, 0.0]  # when each way is done with what it was given, for all connections together
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self):
        while True:
            inside, _ = self.door.accept()
            try:
                outside = socket.create_connection(("127.0.0.1", self.target))
            except ConnectionRefusedError:  # not there yet; the engine tries again
                inside.close()
                continue
            for way, ends in enumerate(((inside, outside), (outside, inside))):
                for end in ends:
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                underway = queue.SimpleQueue()
                threading.Thread(target=self._read, args=(way, ends[0], underway), daemon=True).start()
                threading.Thread(target=self._write, args=(ends[1], underway), daemon=True).start()

    def _read(self, way, end, underway):
        with contextlib.suppress(OSError):
            while data := end.recv(1 << 14):
                self.free[way] = max(self.free[way], time.monotonic()) + len(data) / self.network.bandwidth
                underway.put((self.free[way] + self.network.latency, data))
        underway.put((0.0, b""))

    def _write(self, end, underway):
        with contextlib.suppress(OSError):
            while (item := underway.get())[1]:
                time.sleep(max(item[0] - time.monotonic(), 0))
                end.sendall(item[1])
            end.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("network", [Network(0.010, 1.25e8), Network(0.001, 2e6)], ids=["rounds", "bytes"])
def test_the_time_on_a_network_is_that_of_a_shaped_link(engine, network):
    """Two engines whose every byte goes through a shaper take what rounds, latency, bytes and bandwidth say."""
    config = tiny("EReg(SM(t)+ScFuFFN)", model_dim=64, context_length=64)
    tokens = np.asarray(random_tokens(1, 64)[0]).tolist()
    exported = export(config, initial(config))
    _, account, expected = run_whole(engine(Setting()), exported, tokens)
    [port] = free_ports(1)
    host, shaped_port = Shaper(port, network).address

    def party(rank):
        listen = ("127.0.0.1", port) if rank == SERVER else None
        addresses = (None, (host, shaped_port) if rank == CLIENT else None)
        with Engine(Setting(), Link(rank, listen, addresses, None)) as own:
            model = PrivateModel(own, exported.blueprint)
            model.share_weights(exported.weights if rank == SERVER else None)
            model.put_tokens(tokens if rank == CLIENT else None)
            for _ in range(2):
                model.forward(len(tokens))
            return own.get(["logits"], CLIENT), model.accounts[-1][1].seconds

    with ThreadPoolExecutor(2) as pool:
        (revealed, seconds), _ = pool.map(party, (CLIENT, SERVER))
    np.testing.assert_allclose(revealed["logits"], expected, atol=0.01)  # truncation is random
    assert seconds == pytest.approx(on_network(account, network), rel=0.25)
