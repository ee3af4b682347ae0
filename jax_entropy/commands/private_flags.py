"""Flags that the commands of private execution share, and how they are read."""

from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from jax_entropy.commands.console import say, warn
from jax_entropy.commands.parse import JSON, Flag
from jax_entropy.errors import UserError, nearest
from jax_entropy.paths import writing
from jax_entropy.private.engine.engine import Setting

if TYPE_CHECKING:
    from jax_entropy.architecture import ModelConfig
    from jax_entropy.data import Tokenizer
    from jax_entropy.private.program.blueprint import Rewrites

PROTOCOL = Flag(
    "protocol", Setting().protocol, "semi2k: two parties and a dealer; aby3: three parties; cheetah: two parties"
)
SETTING = (
    PROTOCOL,
    Flag("fraction_bits", Setting().fraction_bits, "of the 64 bits of a number"),
    Flag("exponent", Setting().exponent, "quadratic, taylor or pade: how the exponential is computed"),
    Flag("exponent_iterations", Setting().exponent_iterations, "squarings of quadratic or taylor; 0: 6 and 10"),
    Flag("layer_iterations", "", "of each layer, like 5,6,5: what `private precision --per_layer` finds"),
    Flag("low_bit_error", Setting().low_bit_error, "no: products of cheetah are exact below what is dropped"),
    Flag("colocated", Setting().colocated, "no: cheetah has the weights as shares, though the server knows them"),
)
WITHOUT = Flag("without", "", "rewrites to switch off, separated by commas; 'all' exports the model plainly")
NETWORK = Flag("network", "wan", "lan, wan (the paper's), or like 100mbps,80ms")
EMBEDDING = Flag(
    "embedding", "shared", "public: the server gives its table away, and a tied head", choices=("shared", "public")
)
MEMORY = Flag("memory", "", "bound on the engine's memory, checked before it starts, like 16GB; unset: what is free")
LOGITS = Flag("logits", "every", "every: of each position; last: what one token needs", choices=("every", "last"))
PRICES = Flag("prices", "aws", "list for the money that a thousand tokens cost: aws or gcp")
PICTURE = Flag("picture", None, "file for the picture", kind=Path, endings=(".png", ".svg", ".pdf"))
MEASURE = (NETWORK, JSON, PICTURE, MEMORY, *SETTING)
NEW_TOKENS = Flag("tokens", 16, "tokens to write at most")
REVEAL = Flag("reveal", "logits", "what the client learns of each new token", choices=("logits", "token"))
SAMPLING = (
    Flag("temperature", 0.0, "of the sampling among revealed logits; 0 is greedy"),
    Flag("top_k", 0, "sample among the k likeliest tokens; 0: among all"),
    Flag("seed", 0, "of the sampling"),
)


def tokens_read(default: int) -> Flag:
    """How many tokens a program reads."""
    return Flag("context_length", default, "tokens read; at most the model's, which it is where there is none yet")


def size_flags(num_layers: int, num_heads: int, model_dim: int, vocab_size: int) -> tuple[Flag, ...]:
    """The size of a model that is named by its architecture, with these defaults."""
    return (
        Flag("num_layers", num_layers, "blocks"),
        Flag("num_heads", num_heads, "heads in a block"),
        Flag("model_dim", model_dim, "width"),
        Flag("vocab_size", vocab_size, "entries of the tokenizer"),
    )


SIZE = size_flags(2, 4, 128, 512)


def read_models(names: Sequence[str], values: Namespace) -> "list[ModelConfig]":
    """The models that architectures and the flags of their size name."""
    from jax_entropy.architecture import architecture

    size = {flag.name: getattr(values, flag.name) for flag in SIZE}
    return [architecture(name, context_length=values.context_length, **size) for name in names]


def read_setting(values: Namespace) -> Setting:
    """The engine's setting of a command's flags."""
    given = {name: getattr(values, name) for name in Setting._fields}
    try:
        by_layer = tuple(int(part) for part in given["layer_iterations"].split(",") if part)
    except ValueError:
        raise UserError(f"--layer_iterations={given['layer_iterations']} must be like 5,6,5") from None
    return Setting(**given | dict(layer_iterations=by_layer)).check()


def read_rewrites(without: str) -> "Rewrites":
    """All rewrites but those named, PLAIN for "all".

    Raises:
      UserError: a name that is none.
    """
    from jax_entropy.private.program.blueprint import PLAIN, REWRITES, Rewrites

    if without == "all":
        return PLAIN
    off = [name for name in without.split(",") if name]
    for name in off:
        if name not in REWRITES:
            raise UserError(f"--without={name!r} is not a rewrite{nearest(name, [*REWRITES, 'all'])}")
    return Rewrites(**{name: name not in off for name in REWRITES})


def read_sampling(values: Namespace) -> Callable[["Tokenizer"], Callable]:
    """Gives each text's `choose`, logits [V] → token, for its tokenizer.

    Raises:
      UserError: options out of range.
    """
    from jax_entropy.generate import check_sampling
    from jax_entropy.private.session.inference import sampler

    for name in ("temperature", "top_k"):
        if values.reveal == "token" and (value := getattr(values, name)):
            raise UserError(f"--{name}={value} needs --reveal=logits; inside, the likeliest is taken")
    options = (values.tokens, values.temperature, values.top_k, values.seed)
    check_sampling(*options)
    return lambda tokenizer: sampler(tokenizer, *options)


def draw(profiles: list[dict[str, Any]], file: Path | None) -> None:
    """The picture of what `Profile.to_json` gave, where one is asked for."""
    if file:
        from jax_entropy.report.private import private_costs

        with writing(file, "--picture"):
            private_costs(profiles).savefig(file)
        warn(f"wrote {file}")


def tell_given_away(blueprint: Any) -> None:
    """Says which weights everybody gets to know."""
    if given := blueprint.given_away:
        warn(f"GIVEN AWAY to the client, in the clear: {', '.join(given)}")


class Streamed:
    """Writes a prompt and the tokens after it as they come."""

    def __init__(self, tokenizer: Any, prompt: str, file: TextIO) -> None:
        self.tokenizer, self.prompt, self.file, self.ids, self.written = tokenizer, prompt, file, [], None
        self.has_ended = False

    def token(self, token: int) -> None:
        self.ids.append(token)
        self._write(self.tokenizer.decode(self.ids))

    def end(self) -> None:
        self._write(self.tokenizer.decode(self.ids), end=True)
        self.has_ended = True

    def break_off(self) -> None:
        """Ends the line of a text that was begun and goes no further, so that what went wrong has its own."""
        if self.written is not None and not self.has_ended:
            say("", self.file)

    def _write(self, text: str, end: bool = False) -> None:
        if self.written is None:
            say(self.prompt, self.file, end="")
            self.written = ""
        if end or not text.endswith("\ufffd"):  # half a character
            say(text[len(self.written) :], self.file, end="\n" if end else "")
            self.written = text
