"""The commands of two real parties: `private keys`, `private serve` and `private ask`."""

import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax_entropy.commands.console import output, warn, write_json
from jax_entropy.commands.parse import BEST, JSON, WORKDIR, Flag, command
from jax_entropy.commands.private_flags import (
    NEW_TOKENS,
    REVEAL,
    SAMPLING,
    SETTING,
    WITHOUT,
    Streamed,
    read_rewrites,
    read_sampling,
    read_setting,
)
from jax_entropy.commands.runs import PROMPT, PROMPT_FILE, read_prompt
from jax_entropy.errors import UserError
from jax_entropy.private.engine.engine import Setting
from jax_entropy.private.engine.environment import environment_python

if TYPE_CHECKING:
    from jax_entropy.architecture import ModelConfig

LINK = (
    Flag("keys", None, "folder with this party's private_key.pem and certificate.pem", kind=Path),
    Flag("peer", None, "file of the other party's certificate, the only one that is accepted", kind=Path),
    Flag("insecure_loopback", False, "no TLS, on 127.0.0.1 only: to try things"),
    Flag("timeout", 120, "seconds for which the other party may be silent"),
)


@command(
    Flag("directory", None, "folder to write private_key.pem and certificate.pem to", kind=Path, required=True),
    Flag("name", "party", "written into the certificate"),
    Flag("days", 365, "for which the certificate is valid"),
    examples=["private keys --directory=server_keys --name=server"],
)
def keys(values: Namespace) -> None:
    """A private key and a self-signed certificate, for `serve` or `ask`."""
    from jax_entropy.private.session.line import make_keys

    found = make_keys(values.directory, values.name, values.days)
    print(f"give {values.directory}/certificate.pem to the other party, and compare its SHA-256:\n{found}")


@command(
    WORKDIR,
    Flag("listen", "127.0.0.1:9500", "HOST:PORT, 0.0.0.0 for all of this machine's; the port after it is the engine's"),
    Flag("sessions", 0, "clients to answer; 0: until interrupted"),
    BEST,
    *LINK,
    *SETTING,
    WITHOUT,
    examples=[
        "private serve runs/quickstart --listen=0.0.0.0:9500 --keys=server_keys --peer=client_keys/certificate.pem"
    ],
)
def serve(values: Namespace) -> None:
    """The party that holds the weights: waits for `ask`."""
    from jax_entropy.private.session import line as link

    environment_python()
    setting, (host, port) = read_setting(values), _address(values.listen, "listen")
    rewrites = read_rewrites(values.without)
    if setting.num_parties != 2:
        raise UserError(f"--protocol={values.protocol} has {setting.num_parties} parties; serve and ask are two")
    if values.sessions < 0:
        raise UserError(f"--sessions={values.sessions} must not be negative")
    files = read_link(values, host)
    link.check_free(host, port, port + 1)
    from jax_entropy.private.program.export import export
    from jax_entropy.private.program.fixed_point import check_range, random_tokens
    from jax_entropy.private.session.parties import serve as run
    from jax_entropy.runs.load import load_run
    from jax_entropy.runs.workdir import Workdir

    loaded = load_run(values.workdir, warn, best=values.best)
    exported = export(loaded.model.config, loaded.variables, rewrites)
    config = loaded.model.config
    check_range(exported, random_tokens(config.vocab_size, config.context_length), setting)
    warn(dealer(setting.protocol))
    with link.listen(host, port) as door:
        try:
            print(f"serves {config} on {host}:{port}", flush=True)
            run(
                door, exported, Workdir(values.workdir).tokenizer.read_text(), setting, files,
                sessions=values.sessions, timeout=values.timeout, notify=lambda line: print(line, flush=True),
            )  # fmt: skip
        except KeyboardInterrupt:  # how it is meant to end
            print("stopped", flush=True)


@command(
    Flag("server", "127.0.0.1:9500", "HOST:PORT of `serve`"),
    Flag("port", 9600, "where the server's engine reaches this one"),
    Flag("protocol", "", "the only one to agree to; unset: the server's, whatever it is"),
    PROMPT._replace(default=None, repeated=True, help="text to go on from; may be given several times"),
    PROMPT_FILE._replace(repeated=True, help="file that holds a prompt, as it is; may be given several times"),
    NEW_TOKENS,
    REVEAL,
    JSON,
    *SAMPLING,
    Flag("patience", 8, "seconds to wait for the server's start"),
    *LINK,
    examples=["private ask --server=HOST:9500 --prompt='def ' --keys=client_keys --peer=server_keys/certificate.pem"],
)
def ask(values: Namespace) -> None:
    """The party that holds the prompt: asks a model of `serve`."""
    from jax_entropy.private.session import line as link

    environment_python()
    server, texts, start = _address(values.server, "server"), read_prompts(values), time.monotonic()
    if not 0 < values.port < 65536:
        raise UserError(f"--port={values.port} is no port")
    if values.patience < 0:
        raise UserError(f"--patience={values.patience} must not be negative")
    if values.protocol:
        Setting(protocol=values.protocol).check()
    files, new_choose = read_link(values, server[0]), read_sampling(values)
    link.check_free("127.0.0.1" if values.insecure_loopback else "0.0.0.0", values.port)
    from jax_entropy.private.session.parties import Question
    from jax_entropy.private.session.parties import ask as run

    answers = []

    def questions(tokenizer: str, config: "ModelConfig", setting: Setting) -> list[Question]:
        if values.protocol not in ("", setting.protocol):
            raise UserError(f"the server runs --protocol={setting.protocol}, and --protocol={values.protocol} is asked")
        warn(f"{config}; {dealer(setting.protocol)}")
        reader = read_tokenizer(tokenizer, config)
        answers.extend(Streamed(reader, text, output(values.json)) for text in texts)
        return [
            Question(reader.encode(answer.prompt), new_choose(), reader.end_of_text, answer.token, answer.end)
            for answer in answers
        ]

    model = run(
        server, values.port, files, values.tokens, questions=questions, reveal=values.reveal,
        timeout=values.timeout, patience=values.patience,
    )  # fmt: skip
    count, seconds = sum(len(answer.ids) for answer in answers), time.monotonic() - start
    safety, setting = "mutual TLS" if files else "NO TLS", model.engine.setting
    warn(f"{count} tokens in {seconds:.1f} s under {setting.protocol}, {safety}")
    write_json(values.json, dict(
        setting=setting, link=safety, seconds=seconds,
        answers=[dict(prompt=answer.prompt, tokens=answer.ids, text=answer.written) for answer in answers],
        programs=[dict(name=name, seconds=account.seconds) for name, account in model.accounts],
    ))  # fmt: skip


def _address(text: str, flag: str) -> tuple[str, int]:
    """The host and the port of HOST:PORT.

    Raises:
      UserError: `text` is not of that form.
    """
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65535:
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
            raise UserError(f"--insecure_loopback is for 127.0.0.1 only, not {host}; give --keys and --peer")


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


def dealer(protocol: str) -> str:
    """What a user of a protocol must know before trusting it."""
    if protocol == "semi2k":
        return (
            "semi2k: the client's process plays the dealer, so that a client that looks into it could work out the "
            "weights; --protocol=cheetah needs no dealer"
        )
    return f"{protocol}: safe as long as both parties follow the protocol"


def read_link(values: Namespace, *hosts: str) -> Any:
    """The files of mutual TLS, or None on a loopback link without."""
    from jax_entropy.private.session import line as link

    if values.timeout < 1:
        raise UserError(f"--timeout={values.timeout} must be at least 1")
    if values.insecure_loopback:
        if values.keys or values.peer:
            raise UserError("--insecure_loopback goes without --keys and --peer; leave one or the other out")
        _check_loopback(*hosts)
        return None
    if not values.keys:
        raise UserError("--keys is missing: the folder that `jax-entropy private keys` made")
    if not values.peer:
        raise UserError("--peer is missing: the file of the other party's certificate")
    files = link.read_keys(values.keys, values.peer)
    warn(f"accepts the certificate with SHA-256 {link.fingerprint(files.peer_certificate)} only")
    return files
