"""Two processes over mutual TLS: the text agrees, strangers are refused, neither holds what the other has."""

import contextlib
import json
import os
import re
import select
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jax_entropy.commands.main import main
from jax_entropy.errors import UserError
from jax_entropy.private.session.door import GREETING
from jax_entropy.private.session.keys import fingerprint, make_all_keys, make_keys, read_keys
from jax_entropy.private.session.line import connect
from jax_entropy.private.session.messages import Offer
from tests.private.helpers import (
    free_ports,
    start,
    wait_for_line,
)

pytestmark = pytest.mark.usefixtures("installed")
PROMPT = "the private prompt"


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    make_all_keys(folder, 3, 2)
    make_keys(folder / "stranger", "stranger", 2)
    certificate = folder / "server" / "certificate.pem"  # as openssl's `x509 -text` writes it
    certificate.write_text(f"Certificate: of the tests, Zürich\n{certificate.read_text()}and after it")
    (folder / "stranger/server.pem").write_text(certificate.read_text())
    return folder


class Server:
    """`private serve` in a folder of its own."""

    def __init__(self, workdir, keys, folder, peer="client", *flags, says="protects NOTHING from a client"):
        self.says = says
        [self.port] = free_ports(1)
        tls = () if keys is None else (f"--keys={keys / 'server'}", f"--peer={keys / peer / 'certificate.pem'}")
        self.process = start(
            "serve", f"--workdir={workdir}", f"--listen=127.0.0.1:{self.port}", *tls, *flags, cwd=folder / "server"
        )

    def __enter__(self):
        assert self.says in self.process.stdout.readline()  # its first words
        wait_for_line(self.process, "serves ")
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()

    def ask(self, folder, keys, *flags, name="client", peer="server", port=None, prompt=PROMPT):
        """`private ask`, started."""
        tls = () if keys is None else (f"--keys={keys / name}", f"--peer={keys / peer / 'certificate.pem'}")
        return start(
            "ask", f"--server=127.0.0.1:{port or self.port}", *tls, *([f"--prompt={prompt}"] if prompt else []),
            "--tokens=6", *flags, cwd=folder / "client",
        )  # fmt: skip


@pytest.fixture(scope="module")
def server(workdir, keys, tmp_path_factory):
    with Server(workdir, keys, tmp_path_factory.mktemp("serve")) as started:
        yield started


@pytest.fixture(scope="module")
def plain_text(workdir):
    from jax_entropy.generate import generate
    from jax_entropy.runs.load import load_run

    loaded = load_run(workdir, print)
    return lambda prompt: prompt + generate(loaded, prompt, num_tokens=6, temperature=0)


def test_the_text_is_the_plain_models_for_several_prompts(server, keys, tmp_path, plain_text):
    prompts = [PROMPT, "def f"]
    (tmp_path / "prompt").write_text(prompts[1])
    files = f"--prompt_file={tmp_path / 'prompt'}", f"--json={tmp_path / 'answers.json'}"
    asked = server.ask(tmp_path, keys, *files, prompt=prompts[0])
    out, err = asked.communicate(timeout=120)
    assert asked.returncode == 0, err
    assert out == "".join(plain_text(prompt) + "\n" for prompt in prompts)
    assert "mutual TLS" in err and err.index("protects NOTHING") < err.index("mutual TLS")
    answers = json.loads((tmp_path / "answers.json").read_text())["answers"]
    assert [answer["prompt"] + answer["text"] for answer in answers] == [plain_text(prompt) for prompt in prompts]


def test_all_prompts_are_checked_before_anything_is_shared(server, keys, tmp_path):
    asked = server.ask(tmp_path, keys, f"--prompt={'too long ' * 20}")
    out, err = asked.communicate(timeout=60)
    assert asked.returncode == 2 and not out
    assert re.search("prompt 2: the prompt's .* do not fit into the context of 32; shorten the prompt", err), err


def test_the_client_may_insist_on_a_protocol(server, keys, tmp_path):
    _, err = (asked := server.ask(tmp_path, keys, "--protocol=cheetah")).communicate(timeout=60)
    assert asked.returncode == 2 and "the server runs --protocol=semi2k, and --protocol=cheetah is asked" in err


def test_an_interrupted_server_has_stopped_as_it_should(workdir, keys, tmp_path):
    with Server(workdir, keys, tmp_path) as own:
        own.process.send_signal(signal.SIGINT)
        assert own.process.stdout.read().endswith("stopped\n")
        assert own.process.wait(timeout=20) == 0


@pytest.mark.parametrize(("name", "peer", "message"), [
    ("stranger", "server", "refuse"), ("client", "stranger", "the server's certificate is refused: self.signed"),
])  # fmt: skip
def test_a_wrong_certificate_is_refused_in_a_sentence(server, keys, tmp_path, name, peer, message):
    asked = server.ask(tmp_path, keys, name=name, peer=peer)
    connected = time.monotonic()
    _, err = asked.communicate(timeout=60)
    assert asked.returncode == 2
    assert re.search(message, err) and "Traceback" not in err
    assert len(err.strip().splitlines()) == 2  # the first tells which certificate is accepted
    assert time.monotonic() - connected < 20  # start included


@pytest.mark.slow
def test_no_certificate_is_refused_by_the_server_which_goes_on(server, keys, tmp_path, plain_text):
    asked = server.ask(tmp_path, None, "--insecure_loopback")
    _, err = asked.communicate(timeout=60)
    assert asked.returncode == 2 and re.search("is gone|did not finish its handshake", err), err
    with socket.create_connection(("127.0.0.1", server.port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n" + os.urandom(4096))
    with socket.create_connection(("127.0.0.1", server.port)):
        asked = server.ask(tmp_path, keys, "--patience=20")  # waits until the silent one is given up
        out, err = asked.communicate(timeout=120)
    assert out == plain_text(PROMPT) + "\n", err


def test_nonsense_from_an_accepted_client_does_not_end_the_server(server, keys, tmp_path, plain_text):
    files = read_keys(keys / "client", {"server": None})
    hello = dict(greeting=GREETING, jax=jax.__version__)
    for message in (dict(), dict(jax=1), hello | dict(jax=[3]), hello | dict(port="9600"), hello):
        line = connect("127.0.0.1", server.port, files, patience=5, timeout=5)
        line.connection.sendall(json.dumps(message).encode() + b"\n")
        with contextlib.suppress(UserError):
            line.receive(Offer)
            line.connection.sendall(b'{"agreed": 1}\n')
            line.receive(Offer, timeout=2)
        line.close()
    out, err = server.ask(tmp_path, keys).communicate(timeout=120)
    assert out == plain_text(PROMPT) + "\n", err


def test_it_does_not_start_without_certificates(workdir, tmp_path):
    for command in (("serve", f"--workdir={workdir}"), ("ask", "--prompt=x")):
        process = start(*command, cwd=tmp_path / "here")
        _, err = process.communicate(timeout=60)
        assert process.returncode == 2 and "--keys is missing" in err
    process = start("ask", "--server=192.0.2.1:9500", "--insecure_loopback", "--prompt=x", cwd=tmp_path / "here")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and "for 127.0.0.1 only" in err


def test_keys_are_checked_before_anything_else(keys, tmp_path):
    peer = {"server": keys / "server/certificate.pem"}
    assert read_keys(keys / "client", peer).certificate == keys / "client/certificate.pem"
    assert (keys / "client/private_key.pem").stat().st_mode & 0o077 == 0
    assert re.fullmatch("[0-9a-f]{64}", fingerprint(keys / "client/certificate.pem"))
    with pytest.raises(UserError, match="holds keys already"):
        make_keys(keys / "client", "client", 1)
    with pytest.raises(UserError, match="is missing"):
        read_keys(tmp_path, peer)
    (tmp_path / "bad.pem").write_text("no certificate")
    with pytest.raises(UserError, match="is no certificate"):
        read_keys(keys / "client", {"server": tmp_path / "bad.pem"})
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    (mixed / "certificate.pem").write_bytes((keys / "client/certificate.pem").read_bytes())
    (mixed / "private_key.pem").write_bytes((keys / "server/private_key.pem").read_bytes())
    with pytest.raises(UserError, match="is not the key of"):
        read_keys(mixed, peer)


def test_keys_of_all_parties_are_made_together_or_not_at_all(tmp_path):
    (tmp_path / "server").mkdir()
    for there, message in (("certificate.pem", "holds keys already"), ("client.pem", r"\(client.pem\)")):
        (tmp_path / "server" / there).touch()
        with pytest.raises(UserError, match=message):
            make_all_keys(tmp_path, 2, 2)
        (tmp_path / "server" / there).unlink()
    assert [*tmp_path.rglob("*")] == [tmp_path / "server"]


@pytest.mark.parametrize("flag", ["timeout=0", "timeout=100000000000", "patience=-1", "patience=100000000000"])
def test_seconds_that_no_socket_waits_for_are_refused(flag, capsys):
    name, _, value = flag.partition("=")
    assert main(["private", "ask", "--prompt=x", "--insecure_loopback", f"--{name}={value}"]) == 2
    assert f"--{name}={value} must lie between" in capsys.readouterr().err


def openssl(*arguments, cwd):
    subprocess.run(["openssl", *arguments], cwd=cwd, check=True, capture_output=True)


def test_certificates_that_are_not_one_in_pem_are_refused(keys, tmp_path):
    certificate = keys / "server/certificate.pem"
    openssl("x509", "-in", str(certificate), "-outform", "der", "-out", "certificate.der", cwd=tmp_path)
    with pytest.raises(UserError, match="perhaps one in DER; write it anew: openssl x509 -inform der"):
        read_keys(keys / "client", {"server": tmp_path / "certificate.der"})
    (tmp_path / "two.pem").write_bytes(2 * (certificate.read_bytes() + b"\n"))
    with pytest.raises(UserError, match="holds 2 certificates"):
        read_keys(keys / "client", {"server": tmp_path / "two.pem"})
    for nonsense in (b"\xff\xfe", b"-----BEGIN CERTIFICATE-----\n\xe9\n-----END CERTIFICATE-----", b""):
        (tmp_path / "bad.pem").write_bytes(nonsense)
        with pytest.raises(UserError, match="is no certificate"):
            read_keys(keys / "client", {"server": tmp_path / "bad.pem"})


def test_a_key_that_cannot_be_used_is_refused_and_nobody_is_asked(keys, tmp_path):
    (tmp_path / "certificate.pem").write_bytes((keys / "client/certificate.pem").read_bytes())
    key = str(keys / "client/private_key.pem")
    openssl("pkey", "-in", key, "-aes256", "-passout", "pass:secret", "-out", "private_key.pem", cwd=tmp_path)
    with pytest.raises(UserError, match="is locked by a pass phrase.*openssl pkey"):
        read_keys(tmp_path, {"server": keys / "server/certificate.pem"})
    openssl("pkey", "-in", key, "-outform", "der", "-out", "private_key.pem", cwd=tmp_path)
    with pytest.raises(UserError, match="is no private key in PEM"):
        read_keys(tmp_path, {"server": keys / "server/certificate.pem"})


def expired(keys: Path, folder: Path) -> Path:
    """A certificate of the client's key that ended yesterday."""
    folder.mkdir()
    (folder / "private_key.pem").write_bytes((keys / "client/private_key.pem").read_bytes())
    subprocess.run(
        ["openssl", "req", "-x509", "-key", "private_key.pem", "-subj", "/CN=client", "-out", "certificate.pem",
         "-days", "-1"], cwd=folder, check=True, capture_output=True,
    )  # fmt: skip
    return folder


def test_an_expired_certificate_is_refused_on_both_sides(keys, tmp_path):
    try:
        folder = expired(keys, tmp_path / "old")
    except subprocess.CalledProcessError:
        pytest.skip("this openssl does not make expired certificates")
    with pytest.raises(UserError, match="has expired"):
        read_keys(folder, {"server": keys / "server/certificate.pem"})
    with pytest.raises(UserError, match="has expired"):
        read_keys(keys / "server", {"client": folder / "certificate.pem"})


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.long)])
def test_a_killed_or_silent_server_ends_the_client_in_a_sentence(workdir, keys, tmp_path, how):
    with Server(workdir, keys, tmp_path) as own:
        asked = own.ask(tmp_path, keys, "--timeout=6", "--tokens=14")
        children = wait_for_children(own.process.pid)
        time.sleep(0.5)
        for pid in (*children, own.process.pid):  # a child whose parent is gone ends by itself
            with contextlib.suppress(ProcessLookupError):  # a helper that has ended since
                os.kill(pid, how)
        stopped = time.monotonic()
        _, err = asked.communicate(timeout=60)
        assert asked.returncode == 2, err
        assert re.search("gone|silent|did not answer|said nothing|no secure link", err) and "Traceback" not in err
        assert time.monotonic() - stopped < 40
        if how == signal.SIGSTOP:
            for pid in children:
                os.kill(pid, signal.SIGKILL)


def wait_for_children(pid: int) -> list[int]:
    for _ in range(600):
        if children := Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            return [int(child) for child in children]
        time.sleep(0.1)
    raise AssertionError("the server started no engine")


def test_a_killed_client_leaves_the_server_ready_for_the_next(server, keys, tmp_path, plain_text):
    asked = server.ask(tmp_path, keys, "--tokens=14")
    children = wait_for_children(asked.pid)
    for pid in (asked.pid, *children):
        os.kill(pid, signal.SIGKILL)
    asked.wait()
    again = server.ask(tmp_path, keys)
    out, err = again.communicate(timeout=120)
    assert out == plain_text(PROMPT) + "\n", err


class Tap:
    """Passes one port on to another and keeps what went by."""

    def __init__(self, port: int):
        self.door, self.target, self.heard = socket.create_server(("127.0.0.1", 0)), port, bytearray()
        self.port = self.door.getsockname()[1]
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self):
        while True:
            inside = self.door.accept()[0]
            outside = socket.create_connection(("127.0.0.1", self.target))
            threading.Thread(target=self._pass, args=(inside, outside), daemon=True).start()

    def _pass(self, *ends):
        while True:
            for end in select.select(ends, [], [])[0]:
                data = end.recv(1 << 16)
                if not data:
                    return [e.close() for e in ends]
                self.heard += data
                ends[1 - ends.index(end)].sendall(data)


def memory_of(pid: int) -> bytes:
    """What a process has in memory that it may write to."""
    found = []
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for line in maps:
            area, rights, *_ = line.split()
            start_at, end = (int(part, 16) for part in area.split("-"))
            if "w" in rights and end - start_at < 1 << 30:
                try:
                    memory.seek(start_at)
                    found.append(memory.read(end - start_at))
                except OSError:
                    pass
    return b"\n".join(found)


@pytest.mark.long
@pytest.mark.parametrize("tls", [True, False], ids=["tls", "plain"])
def test_neither_side_holds_what_the_other_has(workdir, keys, tmp_path, tls):
    """Searched for: the prompt in the server's memory and on the line, a row of a weight in the client's and there."""
    from jax_entropy.runs.load import load_run

    params = load_run(workdir, print).variables["params"]
    weight = np.asarray(params["blocks"]["ffn"]["fused"]["kernel"][0]).astype(np.float32)
    prompt = "the secret k3y of th3 test"
    used, flag = (keys, ()) if tls else (None, ("--insecure_loopback",))
    with Server(workdir, used, tmp_path, "client", *flag) as own:
        tap = Tap(own.port)
        (tmp_path / "prompt").write_text(prompt)
        asked = own.ask(
            tmp_path, used, *flag, *[f"--prompt_file={tmp_path / 'prompt'}"] * 200, port=tap.port, prompt=""
        )
        server_engine = wait_for_children(own.process.pid)
        client_engine = wait_for_children(asked.pid)
        time.sleep(6)
        everybody = (own.process.pid, *server_engine, asked.pid, *client_engine)
        for pid in everybody:
            os.kill(pid, signal.SIGSTOP)
        servers = [memory_of(pid) for pid in (own.process.pid, *server_engine)]
        clients = [memory_of(pid) for pid in (asked.pid, *client_engine)]
        for pid in everybody:
            os.kill(pid, signal.SIGKILL)
        asked.communicate()
    needle = weight[3, :8].tobytes()
    assert any(prompt.encode() in memory for memory in clients)  # the search finds what is there
    assert any(np.asarray(params["token_embedding"])[5, :4].tobytes() in memory for memory in servers)
    assert not any(prompt.encode() in memory for memory in servers)
    assert not any(needle in memory for memory in clients)
    assert len(tap.heard) > 1000
    assert prompt.encode() not in tap.heard and needle not in tap.heard
    assert (b'"blueprint"' in tap.heard) != tls  # the tap hears


@pytest.mark.long
def test_none_of_three_holds_what_another_has(workdir, keys, tmp_path):
    """As for two; the assistant's memory is searched for both."""
    from jax_entropy.runs.load import load_run

    params = load_run(workdir, print).variables["params"]
    needle = np.asarray(params["blocks"]["ffn"]["fused"]["kernel"][0]).astype(np.float32)[3, :8].tobytes()
    table = np.asarray(params["token_embedding"])[5, :4].tobytes()
    prompt = "the secret k3y of th3 test"
    (tmp_path / "prompt").write_text(prompt)
    with Server(workdir, keys, tmp_path, "client", "--protocol=aby3", says="aby3: protects as long as") as own:
        [door] = free_ports(1)
        assisting = start(
            "assist", f"--server=127.0.0.1:{own.port}", f"--listen=127.0.0.1:{door}", f"--keys={keys / 'assistant'}",
            cwd=tmp_path / "assistant",
        )  # fmt: skip
        wait_for_line(assisting, "assists ")
        asked = own.ask(
            tmp_path, keys, f"--assistant=127.0.0.1:{door}", *[f"--prompt_file={tmp_path / 'prompt'}"] * 200, prompt=""
        )
        parties = {"server": own.process, "assistant": assisting, "client": asked}
        engines = {role: wait_for_children(process.pid) for role, process in parties.items()}
        time.sleep(10)
        everybody = {role: (process.pid, *engines[role]) for role, process in parties.items()}
        for pid in sum(everybody.values(), ()):
            os.kill(pid, signal.SIGSTOP)
        held = {role: b"\n".join(map(memory_of, pids)) for role, pids in everybody.items()}
        for pid in sum(everybody.values(), ()):
            os.kill(pid, signal.SIGKILL)
        asked.communicate()
        assisting.communicate()
    assert prompt.encode() in held["client"] and table in held["server"]  # the search finds what is there
    for role in ("server", "assistant"):
        assert prompt.encode() not in held[role]
    for role in ("client", "assistant"):
        assert needle not in held[role] and table not in held[role]
