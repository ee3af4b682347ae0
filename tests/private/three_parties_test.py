"""Three processes' engines over mutual TLS: the text agrees, identities cannot be swapped, and clients queue."""

import contextlib
import re
import socket
import threading
from types import SimpleNamespace
from unittest.mock import Mock

import jax
import numpy as np
import pytest

from jax_entropy.errors import UserError
from jax_entropy.private.engine.engine import Engine, Link, Setting
from jax_entropy.private.program.export import export
from jax_entropy.private.session import parties
from jax_entropy.private.session.door import GREETING, Door
from jax_entropy.private.session.keys import make_all_keys, make_keys, read_keys
from jax_entropy.private.session.line import check_free, connect, listen
from jax_entropy.private.session.messages import Hello, Offer, Queued, Refusal
from tests.private.helpers import free_ports, greedy
from tests.tiny_model import scattered, tiny

CONFIG = tiny("EReg(SM(t)+ScFuFFN)", context_length=16)
ABY3 = Setting(protocol="aby3")


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("three")
    make_all_keys(folder, 3, 2)
    make_keys(folder / "stranger", "stranger", 2)
    return folder


def files(keys, role, *peers):
    return read_keys(keys / role, dict.fromkeys(peers))


@pytest.fixture(scope="module")
def three(installed, keys):
    """The doors' ports of a server and an assistant, each in a thread with an engine of its own, and what they say."""
    ports, said = free_ports(2), []
    common = dict(sessions=0, timeout=30, notify=said.append)
    exported = export(CONFIG, scattered(CONFIG))

    def serve(door):
        parties.serve(door, exported, "{}", ABY3, files(keys, "server", "client", "assistant"), **common)

    def assist(door):
        parties.assist(door, "127.0.0.1", files(keys, "assistant", "client", "server"), **common)

    with contextlib.ExitStack() as stack:
        for run, port in zip((serve, assist), ports, strict=True):
            door = stack.enter_context(listen("127.0.0.1", port))
            threading.Thread(target=run, args=(door,), daemon=True).start()
        yield *ports, said


def ask(three, keys, prompts, assistant=True, **options):
    """The text after each prompt."""
    texts, roles = [], ["server", "assistant"] if assistant else ["server"]

    def questions(tokenizer, config, setting):
        texts.extend([] for _ in prompts)
        return [parties.Question(p, np.argmax, -1, t.append, str) for p, t in zip(prompts, texts, strict=True)]

    at = [("127.0.0.1", port) for port in three[:2]]
    model = parties.ask(
        at[0], at[1] if assistant else None, files(keys, "client", *roles), 4,
        **dict(questions=questions, reveal="logits", timeout=30, patience=8, notify=print) | options,
    )  # fmt: skip
    assert all(account.bytes[0] > 0 and account.rounds > 0 for name, account in model.accounts)
    return texts


def test_the_text_of_three_is_the_plain_models(three, keys):
    prompts = [(0, 5, 3), (7,)]
    for reveal in ("logits", "token"):  # and a second client after the first
        assert ask(three, keys, prompts, reveal=reveal) == [greedy(CONFIG, prompt, 4) for prompt in prompts]


def test_a_server_of_three_says_that_it_needs_a_third(three, keys):
    with pytest.raises(UserError, match="'aby3', which needs an assistant"):
        ask(three, keys, [(1,)], assistant=False)


def test_a_party_is_known_by_its_own_certificate_only(three, keys, tmp_path):
    """The assistant's key is accepted of the assistant, not of one that calls itself the server."""
    make_all_keys(tmp_path / "swapped", 3, 2)
    (tmp_path / "swapped/client/server.pem").write_bytes((keys / "server/certificate.pem").read_bytes())
    swapped = read_keys(tmp_path / "swapped/client", dict.fromkeys(["server", "assistant"]))
    with pytest.raises(UserError, match="refuse"):
        parties.ask(("127.0.0.1", three[0]), ("127.0.0.1", three[1]), swapped, 4, questions=lambda *_: [],
                    reveal="logits", timeout=5, patience=0, notify=print)  # fmt: skip
    client, [port] = files(keys, "client", "server").for_engine(), free_ports(1)
    other = dict(files(keys, "assistant", "client").for_engine())  # what the server would show
    impostors = Link(1, ("127.0.0.1", port), (None, None), other, connect_seconds=2)
    own, errors = Link(0, None, (None, ("127.0.0.1", port)), client, connect_seconds=2), []

    def impostor():
        try:
            Engine(Setting(), impostors)
        except UserError as error:
            errors.append(error)

    thread = threading.Thread(target=impostor)
    thread.start()
    with pytest.raises(UserError, match=r"no secure link .*no link with party 1"):
        Engine(Setting(), own)
    thread.join()
    assert errors


def test_one_certificate_is_not_of_two_parties(keys, tmp_path):
    with pytest.raises(UserError, match="of two parties: client and server"):
        read_keys(keys / "assistant", {"client": None, "server": keys / "client/certificate.pem"})


def test_a_busy_port_is_named_with_what_it_is_for():
    [port] = free_ports(1)
    for taken, needed, message in (
        (port, port, "cannot be had: Address already in use$"),
        (port + 1, port, f"cannot be had: .*; the engine needs the port after {port}"),
    ):
        with listen("127.0.0.1", taken), pytest.raises(UserError, match=rf"127\.0\.0\.1:{taken} {message}"):
            check_free("127.0.0.1", needed)


def test_clients_queue_and_know_it(keys):
    said = []
    with listen("127.0.0.1", 0) as door:
        port = door.getsockname()[1]
        entrance = Door(door, files(keys, "server", "client"), timeout=5, notify=said.append)
        silent = socket.create_connection(("127.0.0.1", port))  # keeps nobody waiting

        def come(greeting=GREETING):
            line = connect("127.0.0.1", port, files(keys, "client", "server"), patience=5, timeout=5)
            line.send(Hello(greeting, jax.__version__))
            return line

        first = come()
        served, _ = entrance.next()
        waiting = [come()]
        assert waiting[0].receive(Queued) == Queued(1)
        waiting += [come(), come()]
        assert sorted(line.receive(Queued).ahead for line in waiting[1:]) == [2, 3]
        assert any("waits; 1 before it" in line for line in said)
        waiting[1].close()
        served.close()
        first.close()
        served, _ = entrance.next()
        left = waiting[2].receive(Queued)
        assert left == Queued(1)  # one is served, one has gone
        assert re.search("waits no longer", " ".join(said))
        assert isinstance(come("jax_entropy private 3").receive(Queued, Refusal), Refusal)
        silent.close()


def test_a_client_that_takes_its_offer_and_says_nothing_is_let_go():
    with listen("127.0.0.1", 0) as door:
        port, exported = door.getsockname()[1], export(CONFIG, scattered(CONFIG))
        run = lambda: parties.serve(  # noqa: E731
            door, exported, "{}", Setting(), None, sessions=0, timeout=1, notify=lambda line: None
        )
        threading.Thread(target=run, daemon=True).start()
        lines = [connect("127.0.0.1", port, None, patience=5, timeout=10) for _ in range(2)]
        for line in lines:
            line.send(Hello(GREETING, jax.__version__))
            heard = line.receive(Queued, Offer)
        assert heard == Queued(1) and isinstance(lines[1].receive(Offer), Offer)


def test_no_client_ends_the_service_for_the_others():
    line = SimpleNamespace(close=lambda: None)
    entrance, answer = SimpleNamespace(next=lambda: (line, "a client")), Mock()
    answer.side_effect = [UserError("nonsense"), MemoryError("of one client"), 2]
    parties._answer_all(entrance, answer, 1, (said := []).append)
    assert (
        "nonsense" in said[0]
        and "MemoryError: of one client" in said[1]
        and said[2] == "answered 2 prompts of a client"
    )
