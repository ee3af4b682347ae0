"""The commands of real parties: `private keys`, `private serve`, `private ask` and `private assist`."""

import contextlib
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax_entropy.commands.console import output, warn, write_json
from jax_entropy.commands.parse import BEST, JSON, WORKDIR, Flag, command
from jax_entropy.commands.private_flags import (
    EMBEDDING,
    NEW_TOKENS,
    REVEAL,
    SAMPLING,
    SETTING,
    WITHOUT,
    Streamed,
    read_rewrites,
    read_sampling,
    read_setting,
    tell_given_away,
)
from jax_entropy.commands.runs import PROMPT, PROMPT_FILE, read_prompt
from jax_entropy.errors import UserError
from jax_entropy.private.engine.engine import Setting
from jax_entropy.private.engine.environment import environment_python

if TYPE_CHECKING:
    from jax_entropy.architecture import ModelConfig

KEYS = Flag("keys", None, "folder with this party's private_key.pem and certificate.pem, and the others'", kind=Path)
LINK = (
    Flag("insecure_loopback", False, "no TLS, on 127.0.0.1 only: to try things"),
    Flag("timeout", 120, "seconds for which another party may be silent"),
)
DAY = 24 * 3600
SESSIONS = Flag("sessions", 0, "clients to answer; 0: until interrupted")
PROTECTS = {
    "semi2k": "protects NOTHING from a client that looks into its own process, which plays the dealer",
    "aby3": "protects as long as no two of the three parties collude",
    "cheetah": "protects as long as both parties follow the protocol",
}


def listen_flag(port: int) -> Flag:
    """Where a party listens."""
    return Flag(
        "listen", f"127.0.0.1:{port}", "HOST:PORT, 0.0.0.0 for all of this machine's; the port after it is the engine's"
    )


def peer_flag(role: str) -> Flag:
    """The certificate of the other one of two."""
    return Flag("peer", None, f"file of the {role}'s certificate; unset: KEYS/{role}.pem", kind=Path)


@command(
    Flag("directory", None, "folder to write private_key.pem and certificate.pem to", kind=Path, required=True),
    Flag("name", "party", "written into the certificate"),
    Flag("days", 365, "for which the certificate is valid"),
    Flag("parties", 1, "2 or 3: folders for client, server and assistant, each complete"),
    examples=["private keys --directory=server_keys --name=server", "private keys --directory=keys --parties=3"],
)
def keys(values: Namespace) -> None:
    """A private key and a self-signed certificate, for `serve`, `ask` or `assist`."""
    from jax_entropy.private.session.keys import make_all_keys, make_keys

    if values.parties not in (1, 2, 3):
        raise UserError(f"--parties={values.parties} must be 1, 2 or 3")
    if values.parties > 1 and "name" in values.given:
        raise UserError(f"--name={values.name} goes with one party; --parties={values.parties} names each by its role")
    if values.parties == 1:
        found = make_keys(values.directory, values.name, values.days)
        print(f"give {values.directory}/certificate.pem to the other parties, and compare its SHA-256:\n{found}")
        return
    for role, found in make_all_keys(values.directory, values.parties, values.days).items():
        print(f"give {values.directory}/{role} to the {role}; its certificate's SHA-256:\n{found}")


@command(
    WORKDIR,
    listen_flag(9500),
    SESSIONS,
    BEST,
    KEYS,
    peer_flag("client"),
    *LINK,
    EMBEDDING,
    *SETTING,
    WITHOUT,
    examples=[
        "private serve runs/quickstart --protocol=cheetah --listen=0.0.0.0:9500 --keys=server_keys",
        "private serve runs/quickstart --protocol=aby3 --listen=0.0.0.0:9500 --keys=server_keys",
    ],
)
def serve(values: Namespace) -> None:
    """The party that holds the weights: waits for `ask`."""
    environment_python()
    setting = read_setting(values)
    print(protection(setting.protocol), flush=True)
    rewrites, roles = read_rewrites(values.without), ["client", "assistant"][: setting.num_parties - 1]
    with _door(values, roles) as (door, files):
        from jax_entropy.private.program.export import export
        from jax_entropy.private.program.fixed_point import check_range, random_tokens
        from jax_entropy.private.session.parties import serve as run
        from jax_entropy.runs.load import load_run
        from jax_entropy.runs.workdir import Workdir

        loaded = load_run(values.workdir, warn, best=values.best)
        config = loaded.model.config
        exported = export(config, loaded.variables, rewrites, setting, embedding=values.embedding)
        tell_given_away(exported.blueprint)
        check_range(exported, random_tokens(config.vocab_size, config.context_length), setting, steps=True)
        print(f"serves {config} on {values.listen}", flush=True)
        run(
            door(), exported, Workdir(values.workdir).tokenizer.read_text("utf-8"), setting, files,
            sessions=values.sessions, timeout=values.timeout, notify=lambda line: print(line, flush=True),
        )  # fmt: skip


@command(
    listen_flag(9700),
    Flag("server", "127.0.0.1:9500", "HOST:PORT of `serve`"),
    SESSIONS,
    KEYS,
    *LINK,
    examples=["private assist --server=HOST:9500 --listen=0.0.0.0:9700 --keys=assistant_keys"],
)
def assist(values: Namespace) -> None:
    """The third party of aby3: holds nothing, and learns nothing unless it colludes with another."""
    environment_python()
    host, _ = _address(values.server, "server")
    with _door(values, ["client", "server"], host) as (door, files):
        from jax_entropy.private.session.parties import assist as run

        print(f"assists {values.server} on {values.listen}", flush=True)
        run(
            door(), host, files, sessions=values.sessions, timeout=values.timeout,
            notify=lambda line: print(line, flush=True),
        )  # fmt: skip


@contextlib.contextmanager
def _door(values: Namespace, roles: list[str], *hosts: str) -> Iterator[tuple[Callable[[], Any], Any]]:
    """What gives a party's listening socket, which is known to be free, and its files; an interrupt is a good end."""
    from jax_entropy.private.session import line as link

    host, port = _address(values.listen, "listen")
    if values.sessions < 0:
        raise UserError(f"--sessions={values.sessions} must not be negative")
    files = read_link(values, roles, host, *hosts)
    link.check_free(host, port)
    with contextlib.ExitStack() as stack:
        try:
            yield lambda: stack.enter_context(link.listen(host, port)), files
        except KeyboardInterrupt:  # how it is meant to end
            print("stopped", flush=True)


@command(
    Flag("server", "127.0.0.1:9500", "HOST:PORT of `serve`"),
    Flag("assistant", "", "HOST:PORT of `assist`, where the server runs aby3"),
    Flag("protocol", "", "the only one to agree to; unset: the server's, whatever it is"),
    PROMPT._replace(default=None, repeated=True, help="text to go on from; may be given several times"),
    PROMPT_FILE._replace(repeated=True, help="file that holds a prompt, as it is; may be given several times"),
    NEW_TOKENS,
    REVEAL,
    JSON,
    *SAMPLING,
    Flag("patience", 8, "seconds to wait for the others' start"),
    KEYS,
    peer_flag("server"),
    *LINK,
    examples=[
        "private ask --server=HOST:9500 --prompt='def ' --keys=client_keys",
        "private ask --server=HOST:9500 --assistant=HOST:9700 --prompt='def ' --keys=client_keys",
    ],
)
def ask(values: Namespace) -> None:
    """The party that holds the prompt: asks a model of `serve`."""
    environment_python()
    server, texts = _address(values.server, "server"), read_prompts(values)
    assistant = _address(values.assistant, "assistant") if values.assistant else None
    if not 0 <= values.patience <= DAY:
        raise UserError(f"--patience={values.patience} must lie between 0 and {DAY}, a day")
    if values.protocol:
        Setting(protocol=values.protocol).check()
    roles = ["server", "assistant"] if assistant else ["server"]
    hosts = [host for host, _ in (server, assistant or server)]
    files, new_choose = read_link(values, roles, *hosts), read_sampling(values)
    from jax_entropy.private.session.parties import Question
    from jax_entropy.private.session.parties import ask as run

    answers, start = [], 0.0

    def questions(tokenizer: str, config: "ModelConfig", setting: Setting) -> list[Question]:
        nonlocal start
        start = time.monotonic()  # those that were answered before are not counted
        if values.protocol not in ("", setting.protocol):
            raise UserError(f"the server runs --protocol={setting.protocol}, and --protocol={values.protocol} is asked")
        warn(f"{config}; {protection(setting.protocol)}")
        reader = read_tokenizer(tokenizer, config)
        answers.extend(Streamed(reader, text, output(values.json)) for text in texts)
        return [
            Question(reader.encode(answer.prompt), new_choose(reader), reader.end_of_text, answer.token, answer.end)
            for answer in answers
        ]

    try:
        model = run(
            server, assistant, files, values.tokens, questions=questions, reveal=values.reveal,
            timeout=values.timeout, patience=values.patience, notify=warn,
        )  # fmt: skip
    except BaseException:
        for answer in answers:
            answer.break_off()
        raise
    count, seconds = sum(len(answer.ids) for answer in answers), time.monotonic() - start
    safety, setting = "mutual TLS" if files else "NO TLS", model.engine.setting
    sent, rounds = (sum(values) for values in zip(*((a.bytes[0], a.rounds) for _, a in model.accounts), strict=True))
    warn(
        f"{count} tokens in {seconds:.1f} s under {setting.protocol}, {safety}: "
        f"{sent / 1e6:,.2f} MB sent, {rounds:,} rounds"
    )
    write_json(values.json, dict(
        setting=setting, link=safety, seconds=seconds,
        answers=[dict(prompt=answer.prompt, tokens=answer.ids, text=answer.written) for answer in answers],
        programs=[dict(name=name, **account._asdict()) for name, account in model.accounts],
    ))  # fmt: skip


def _address(text: str, flag: str) -> tuple[str, int]:
    """The host and the port of HOST:PORT.

    Raises:
      UserError: `text` is not of that form.
    """
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65535:
        raise UserError(f"--{flag}={text!r} must be HOST:PORT, like 127.0.0.1:9500")
    if ":" in host:
        raise UserError(f"--{flag}={text!r} is an IPv6 address; the engine's links need an IPv4 address or a name")
    return host, int(port)


def _check_loopback(*hosts: str) -> None:
    """Checks that all hosts are this machine.

    Raises:
      UserError: one of them is not.
    """
    for host in hosts:
        if host not in ("127.0.0.1", "localhost"):
            raise UserError(f"--insecure_loopback is for 127.0.0.1 only, not {host}; give --keys")


def read_prompts(values: Namespace) -> list[str]:
    """What --prompt and --prompt_file ask.

    Raises:
      UserError: it is nothing.
    """
    texts = [*(read_prompt(text, None) for text in values.prompt), *(read_prompt("", f) for f in values.prompt_file)]
    if not texts or "" in texts:
        raise UserError("the prompt is empty; give --prompt, or --prompt_file with one that is not")
    return texts


def read_tokenizer(text: str, config: "ModelConfig") -> Any:
    """The tokenizer that a server sent.

    Raises:
      UserError: it is none, or has tokens that the model does not know.
    """
    from jax_entropy.data import load_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tokenizer.json"
        file.write_text(text, encoding="utf-8")
        try:
            tokenizer = load_tokenizer(file)
        except Exception as error:  # a stranger's file: the reader of one's own need not foresee everything in it
            raise UserError(f"the server's tokenizer cannot be used: {str(error)[:200]}") from None
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"the server's tokenizer has {tokenizer.vocab_size} entries, and its model {config.vocab_size}; they do "
            "not belong together"
        )
    return tokenizer


def protection(protocol: str) -> str:
    """What a user of a protocol must know before trusting it."""
    line = f"{protocol}: {PROTECTS[protocol]}"
    return f"{line}; --protocol=aby3 (three machines) or cheetah do" if protocol == "semi2k" else line


def read_link(values: Namespace, roles: list[str], *hosts: str) -> Any:
    """The files of mutual TLS with parties of these roles, or None on a loopback link without."""
    from jax_entropy.private.session.keys import fingerprint, read_keys

    peer = getattr(values, "peer", None)
    if not 1 <= values.timeout <= DAY:
        raise UserError(f"--timeout={values.timeout} must lie between 1 and {DAY}, a day")
    if values.insecure_loopback:
        if values.keys or peer:
            raise UserError("--insecure_loopback goes without --keys and --peer; leave one or the other out")
        _check_loopback(*hosts)
        return None
    if not values.keys:
        raise UserError("--keys is missing: the folder that `jax-entropy private keys` made")
    files = read_keys(values.keys, {role: peer if role == roles[0] else None for role in roles})
    for role, path in files.peers.items():
        warn(f"accepts of the {role} the certificate with SHA-256 {fingerprint(path)} only")
    return files
