"""The commands of two real parties: `private keys`, `private serve` and `private ask`."""

import tempfile
import time
from pathlib import Path
from typing import Any

from jax_entropy.commands.private_flags import (
    SAMPLING,
    SETTING,
    STEPS,
    Streamed,
    check_outputs,
    read_sampling,
    read_setting,
    read_steps,
    warn,
    write_json,
)
from jax_entropy.errors import UserError
from jax_entropy.private.engine import engine


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

    found = make_keys(Path(values.directory), values.name, values.days)
    print(f"give {values.directory}/certificate.pem to the other party, and compare its SHA-256:\n{found}")


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
        **STEPS,
    )
    from jax_entropy.private.session import line as link

    engine.environment_python()
    setting, (host, port) = read_setting(values), link.address(values.listen, "listen")
    steps = read_steps(values.without)
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
    exported = export(loaded.model.config, loaded.variables, steps)
    check_range(exported, random_tokens(exported.shape.vocab_size, exported.shape.context_length), setting)
    warn(dealer(setting.protocol))
    with link.listen(host, port) as door:
        try:
            print(f"serves {exported.shape.architecture} on {host}:{port}", flush=True)
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

    engine.environment_python()
    server, texts, start = link.address(values.server, "server"), read_prompts(values), time.monotonic()
    if not 0 < values.port < 65536:
        raise UserError(f"--port={values.port} is no port")
    if values.patience < 0:
        raise UserError(f"--patience={values.patience} must not be negative")
    if values.protocol:
        engine.Setting(protocol=values.protocol).check()
    files, new_choose = read_link(values, server[0]), read_sampling(values)
    check_outputs(values)
    link.check_free("127.0.0.1" if values.insecure_loopback else "0.0.0.0", values.port)
    from jax_entropy.private.session.parties import Question
    from jax_entropy.private.session.parties import ask as run

    answers = []

    def questions(tokenizer: str, shape: Any, setting: engine.Setting) -> list[Question]:
        if values.protocol not in ("", setting.protocol):
            raise UserError(f"the server runs --protocol={setting.protocol}, and --protocol={values.protocol} is asked")
        warn(f"{shape.architecture}; {dealer(setting.protocol)}")
        reader = read_tokenizer(tokenizer)
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


def read_tokenizer(text: str) -> Any:
    """The tokenizer that a server sent."""
    from jax_entropy.data import load_tokenizer

    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        file.write(text)
        file.flush()
        return load_tokenizer(Path(file.name))


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
        link.check_loopback(*hosts)
        return None
    files = link.read_keys(values.keys, values.peer)
    warn(f"accepts the certificate with SHA-256 {link.fingerprint(files.peer_certificate)} only")
    return files
