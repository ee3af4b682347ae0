"""The commands of two real parties: `private keys`, `private serve` and `private ask`."""

import tempfile
import time
from pathlib import Path
from typing import Any

from jax_entropy.architecture import ModelConfig
from jax_entropy.commands.private_flags import (
    SAMPLING,
    SETTING,
    WITHOUT,
    Streamed,
    check_outputs,
    read_rewrites,
    read_sampling,
    read_setting,
    warn,
    write_json,
)
from jax_entropy.errors import UserError
from jax_entropy.paths import local_path
from jax_entropy.private.engine.engine import Setting
from jax_entropy.private.engine.environment import environment_python


def keys(parse: Any) -> None:
    """A private key and a self-signed certificate, for `serve` or `ask`."""
    values = parse.flags(
        directory=("", "folder to write private_key.pem and certificate.pem to"),
        name=("party", "written into the certificate"),
        days=(365, "for which the certificate is valid"),
    )
    if not values.directory:
        raise UserError("--directory is missing")
    from jax_entropy.private.session.line import make_keys

    directory = local_path(values.directory, "--directory")
    found = make_keys(directory, values.name, values.days)
    print(f"give {directory}/certificate.pem to the other party, and compare its SHA-256:\n{found}")


LINK = dict(
    keys=("", "folder with this party's private_key.pem and certificate.pem"),
    peer=("", "file of the other party's certificate, the only one that is accepted"),
    insecure_loopback=(False, "no TLS, on 127.0.0.1 only: to try things"),
    timeout=(120, "seconds for which the other party may be silent"),
)


def serve(parse: Any) -> None:
    """The party that holds the weights: waits for `ask`."""
    values = parse.flags(
        workdir=True,
        listen=("127.0.0.1:9500", "HOST:PORT, 0.0.0.0 for all of this machine's; the port after it is the engine's"),
        sessions=(0, "clients to answer; 0: until interrupted"),
        best=(False, "the best checkpoint by validation loss instead of the newest"),
        **LINK,
        **SETTING,
        **WITHOUT,
    )
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


def ask(parse: Any) -> None:
    """The party that holds the prompt: asks a model of `serve`."""
    values = parse.flags(
        server=("127.0.0.1:9500", "HOST:PORT of `serve`"),
        port=(9600, "where the server's engine reaches this one"),
        protocol=("", "the only one to agree to; unset: the server's, whatever it is"),
        prompt=("", "text to go on from"),
        prompts_file=("", "file with a prompt on each line, answered one after another"),
        tokens=(16, "tokens to write at most"),
        reveal=("logits", "what this party learns of each new token: logits | token"),
        json=("", "file for the answers and what they took"),
        **SAMPLING,
        patience=(8, "seconds to wait for the server's start"),
        **LINK,
    )
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
    check_outputs(values)
    link.check_free("127.0.0.1" if values.insecure_loopback else "0.0.0.0", values.port)
    from jax_entropy.private.session.parties import Question
    from jax_entropy.private.session.parties import ask as run

    answers = []

    def questions(tokenizer: str, config: ModelConfig, setting: Setting) -> list[Question]:
        if values.protocol not in ("", setting.protocol):
            raise UserError(f"the server runs --protocol={setting.protocol}, and --protocol={values.protocol} is asked")
        warn(f"{config}; {dealer(setting.protocol)}")
        reader = read_tokenizer(tokenizer, config)
        answers.extend(Streamed(reader, text) for text in texts)
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
        setting=setting._asdict(), link=safety, seconds=seconds,
        answers=[dict(prompt=answer.prompt, tokens=answer.ids, text=answer.written) for answer in answers],
        programs=[dict(name=name, seconds=account.seconds) for name, account in model.accounts],
    ))  # fmt: skip


def _address(text: str, flag: str) -> tuple[str, int]:
    """HOST:PORT. Raises UserError if it is not one."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65535:
        raise UserError(f"--{flag}={text!r} must be HOST:PORT, like 127.0.0.1:9500")
    if ":" in host:
        raise UserError(f"--{flag}={text!r} is an IPv6 address; the engine's links need an IPv4 address or a name")
    return host, int(port)


def _check_loopback(*hosts: str) -> None:
    """Raises UserError unless all hosts are this machine."""
    for host in hosts:
        if host not in ("127.0.0.1", "localhost"):
            raise UserError(f"--insecure_loopback is for 127.0.0.1 only, not {host}; give --keys and --peer")


def read_prompts(values: Any) -> list[str]:
    """What --prompt or --prompts_file asks. Raises UserError if it is nothing."""
    if values.prompt and values.prompts_file:
        raise UserError("--prompt and --prompts_file exclude each other")
    if not values.prompts_file:
        if not values.prompt:
            raise UserError("the prompt is empty; give --prompt, or --prompts_file with one on each line")
        return [values.prompt]
    try:
        texts = Path(values.prompts_file).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts_file={values.prompts_file} cannot be read: {error}") from None
    if not texts:
        raise UserError(f"--prompts_file={values.prompts_file} is empty")
    if "" in texts:
        raise UserError(f"line {texts.index('') + 1} of --prompts_file={values.prompts_file} is empty")
    return texts


def read_tokenizer(text: str, config: ModelConfig) -> Any:
    """The tokenizer that a server sent. Raises UserError if it is none, or has tokens that the model does not know."""
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


def read_link(values: Any, *hosts: str) -> Any:
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
    files = link.read_keys(local_path(values.keys, "--keys"), local_path(values.peer, "--peer"))
    warn(f"accepts the certificate with SHA-256 {link.fingerprint(files.peer_certificate)} only")
    return files
