"""The commands of two real parties: `private keys`, `private serve` and `private ask`."""

import time
from pathlib import Path
from typing import Any

from jax_entropy.errors import UserError
from jax_entropy.private import engine
from jax_entropy.private.settings import SAMPLING, SETTING, read_sampling, read_setting, read_steps, warn


def keys(parse: Any) -> None:
    """A private key and a self-signed certificate, for `serve` or `ask`."""
    values = parse.flags(
        directory=("", "folder to write private_key.pem and certificate.pem to"),
        name=("party", "written into the certificate"),
        days=(365, "for which the certificate is valid"),
    )
    if not values.directory:
        raise UserError("--directory is missing")
    from jax_entropy.private.link import make_keys

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
        listen=("127.0.0.1:9500", "HOST:PORT; the port after it is the engine's"),
        sessions=(0, "clients to answer; 0: until interrupted"),
        best=(False, "the best checkpoint by validation loss instead of the newest"),
        **LINK,
        **SETTING,
    )
    from jax_entropy.private import link

    engine.environment_python()
    setting, (host, port) = read_setting(values), link.address(values.listen, "listen")
    if setting.num_parties != 2:
        raise UserError(f"--protocol={values.protocol} has {setting.num_parties} parties; serve and ask are two")
    files = read_link(values, host)
    from jax_entropy.private.export import export
    from jax_entropy.private.fixed_point import check_range, random_tokens
    from jax_entropy.private.parties import serve as run
    from jax_entropy.workdir import Workdir, load_run

    loaded = load_run(values.workdir, warn, best=values.best)
    exported = export(loaded.model.config, loaded.variables, read_steps(values.without))
    check_range(exported, random_tokens(exported.shape.vocab_size, exported.shape.context_length), setting)
    warn(dealer(setting.protocol))
    with link.listen(host, port) as door:
        print(f"serves {exported.shape.architecture} on {host}:{port}", flush=True)
        run(
            door, exported, Workdir(values.workdir).tokenizer.read_text(), setting, files, engine_port=port + 1,
            sessions=values.sessions, timeout=values.timeout, notify=lambda line: print(line, flush=True),
        )  # fmt: skip


def ask(parse: Any) -> None:
    """The party that holds the prompt: asks a model of `serve`."""
    values = parse.flags(
        server=("127.0.0.1:9500", "HOST:PORT of `serve`"),
        listen=("127.0.0.1:9600", "HOST:PORT where the server's engine reaches this one"),
        prompt=("", "text to go on from"),
        prompts_file=("", "file with a prompt on each line, answered one after another"),
        tokens=(16, "tokens to write at most"),
        reveal=("logits", "what this party learns of each new token: logits | token"),
        **SAMPLING,
        patience=(8, "seconds to wait for the server's start"),
        **LINK,
    )
    from jax_entropy.private import link

    engine.environment_python()
    server, own = link.address(values.server, "server"), link.address(values.listen, "listen")
    files, new_choose = read_link(values, server[0], own[0]), read_sampling(values)
    import tempfile

    from jax_entropy.data import load_tokenizer
    from jax_entropy.private.parties import ask as run

    texts = [values.prompt]
    if values.prompts_file:
        try:
            texts = Path(values.prompts_file).read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompts_file={values.prompts_file} cannot be read: {error}") from None
    if not all(texts):
        raise UserError("the prompt is empty; give --prompt, or text on each line of --prompts_file")
    known, start = {}, time.monotonic()

    def tokens_of(tokenizer: str):
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            file.write(tokenizer)
            file.flush()
            known["tokenizer"] = load_tokenizer(Path(file.name))
        for text in texts:
            yield known["tokenizer"].encode(text)

    answers, model = run(
        server, values.listen, files, values.tokens, prompts=tokens_of,
        end_of_text=lambda: known["tokenizer"].end_of_text,
        reveal=values.reveal, timeout=values.timeout, patience=values.patience, notify=lambda token: None,
        new_choose=new_choose,
    )  # fmt: skip
    warn(dealer(model.engine.setting.protocol))
    for text, new in zip(texts, answers, strict=True):
        print(text + known["tokenizer"].decode(new))
    warn(f"{sum(map(len, answers))} tokens in {time.monotonic() - start:.1f} s under {model.engine.setting.protocol}, "
         f"{'mutual TLS' if files else 'NO TLS'}")  # fmt: skip


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
    from jax_entropy.private import link

    if values.timeout < 1:
        raise UserError(f"--timeout={values.timeout} must be at least 1")
    if values.insecure_loopback:
        link.check_loopback(*hosts)
        return None
    return link.read_keys(values.keys, values.peer)
