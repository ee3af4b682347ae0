"""`jax-entropy private`: a trained model under secure computation."""

import functools
import signal
import sys
import time
from argparse import Namespace

from jax_entropy.commands.console import output, warn, write_json
from jax_entropy.commands.parse import BEST, JSON, WORKDIR, Command, Flag, command
from jax_entropy.commands.parties import ask, assist, keys, serve
from jax_entropy.commands.private_costs import calibrate, compare, precision, predict, profile
from jax_entropy.commands.private_flags import (
    EMBEDDING,
    MEMORY,
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
from jax_entropy.private.engine.engine import Engine
from jax_entropy.private.engine.environment import environment_python


@command(
    Flag("check", False, "only say what is there"),
    Flag("force", False, "make it anew"),
    examples=["private setup", "private setup --check"],
)
def setup(values: Namespace) -> None:
    """Makes the engine's own environment, once: 730 MB."""
    from jax_entropy.private.engine import environment

    if values.check and values.force:
        raise UserError("--check only says what is there, and goes without --force")
    found = environment.check() if values.check else environment.setup(print, force=values.force)
    print(f"engine {found['engine']} on Python {found['python']} in {found['directory']}")


@command(
    WORKDIR,
    PROMPT,
    PROMPT_FILE,
    NEW_TOKENS,
    REVEAL,
    EMBEDDING,
    MEMORY,
    BEST,
    JSON,
    *SAMPLING,
    *SETTING,
    WITHOUT,
    examples=["private generate runs/quickstart --prompt='def ' --tokens=16"],
)
def generate(values: Namespace) -> None:
    """Text under secure computation, all parties on this machine."""
    environment_python()
    setting, rewrites, prompt = (
        read_setting(values),
        read_rewrites(values.without),
        read_prompt(values.prompt, values.prompt_file),
    )
    new_choose = read_sampling(values)
    from jax_entropy.commands.private_tables import spent
    from jax_entropy.private.cost.memory import layout, read_memory
    from jax_entropy.private.program.export import export
    from jax_entropy.private.program.fixed_point import check_range
    from jax_entropy.private.session.inference import PrivateModel, check_request, padded_length
    from jax_entropy.private.session.inference import generate as run
    from jax_entropy.runs.load import load_run

    loaded, limit = load_run(values.workdir, warn, best=values.best), read_memory(values.memory)
    config, ids, start = loaded.model.config, loaded.tokenizer.encode(prompt), time.monotonic()
    read, plain = padded_length(len(ids), config.context_length), values.without == "all"
    of = layout(config, read, setting, plain, limit=limit, logits="last", embedding=values.embedding)
    exported = export(config, loaded.variables, rewrites, setting, embedding=values.embedding, piece=of.piece)
    tell_given_away(exported.blueprint)
    if str(of):
        warn(f"to fit into memory: {of}")
    check_request(exported.blueprint, ids, values.tokens, values.reveal)
    check_range(exported, ids, setting, steps=True)
    text, came = Streamed(loaded.tokenizer, prompt, output(values.json)), []

    def notify(token: int) -> None:
        came.append(time.monotonic() - start)
        text.token(token)

    with Engine(setting) as started:
        warn(f"sharing {sum(value.size for value in exported.weights.values()):,} weights")
        model = PrivateModel.of(started, exported)
        warn(f"reading {len(ids)} tokens")
        try:
            new = run(
                model,
                ids,
                values.tokens,
                choose=new_choose(loaded.tokenizer),
                end_of_text=loaded.tokenizer.end_of_text,
                reveal=values.reveal,
                notify=notify,
            )
        except BaseException:
            text.break_off()
            raise
        peak = started.peak_memory()
    text.end()
    seconds = time.monotonic() - start
    warn(spent(model.accounts, came, seconds, peak, setting))
    write_json(values.json, dict(
        architecture=str(exported.blueprint.config), setting=setting, seconds=seconds, token_seconds=came,
        peak_memory_bytes=peak, prompt_tokens=len(ids), tokens=new,
        programs=[dict(name=name, **account._asdict()) for name, account in model.accounts],
    ))  # fmt: skip


def _closing_engines(found: Command) -> Command:
    """The command, with engines that are closed when a signal ends it; nohup's choice is left alone."""

    @functools.wraps(found.run)
    def run(values: Namespace) -> None:
        ends = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]
        before = [signal.signal(number, lambda number, _: sys.exit(128 + number)) for number in ends]
        try:
            found.run(values)
        finally:
            for number, handler in zip(ends, before, strict=True):
                signal.signal(number, handler)

    return found._replace(run=run)


COMMANDS = {
    found.name: _closing_engines(found)
    for found in (setup, generate, profile, compare, predict, precision, calibrate, keys, serve, ask, assist)
}
