"""Text under secure computation: weights shared once, a prompt read at once, then token after token.

The same code runs all parties in one process, or one of a link: party 0 has the prompt, party 1 the model, and a
third, of protocols that have one, nothing.
"""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jax_entropy.data import Tokenizer
from jax_entropy.errors import UserError, nearest
from jax_entropy.generate import check_sampling
from jax_entropy.generate import choose as choose_token
from jax_entropy.private.engine.engine import Account, Engine
from jax_entropy.private.program.blueprint import Blueprint
from jax_entropy.private.program.export import Export
from jax_entropy.private.program.forward import forward, likeliest, prefill, step
from jax_entropy.private.program.stage import (
    LAST,
    PAST,
    POSITION,
    PUBLIC,
    TOKENS,
    Stage,
    caches,
    compose,
    external_inputs,
    input_types,
    lower,
)
from jax_entropy.private.session.messages import Message, Progress, Prompt
from jax_entropy.seeds import random_key

CLIENT, SERVER, ASSISTANT = 0, 1, 2
REVEALED = ("logits", "token")
# An option of the engine's compiler that divides before it broadcasts; part of the rewrite `denominator`.
COMPILER = "enable_optimize_denominator_with_broadcast"


class PrivateModel:
    """A model inside an engine: its weights as shares, its programs compiled when they are first needed."""

    def __init__(self, engine: Engine, blueprint: Blueprint) -> None:
        if blueprint.squarings != engine.setting.bent_squarings(blueprint.config.num_layers):
            raise UserError("the program's exponential is not the one of the engine's setting")
        self.engine, self.blueprint = engine, blueprint
        self.programs: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {}
        self.accounts: list[tuple[str, Account]] = []
        self.table_VxD: np.ndarray | None = None  # where it is public

    @classmethod
    def of(cls, engine: Engine, exported: Export) -> "PrivateModel":
        """An exported model with its weights shared; for the party that has them, or all parties in one process."""
        model = cls(engine, exported.blueprint)
        model.share_weights(exported.weights)
        return model

    @property
    def asks(self) -> bool:
        """Whether the prompt is here: with the client, or with all parties in one process."""
        return self.engine.link is None or self.engine.link.rank == CLIENT

    def share_weights(self, weights: dict[str, np.ndarray] | None, names: Sequence[str] | None = None) -> None:
        """Shares the server's weights with all parties, and opens them once, masked, where that saves traffic.

        Args:
          names: of some of them; all, unless given.
        """
        setting, program = self.engine.setting, "open weights" if names is None else f"open {' '.join(names)}"
        names = list(self.blueprint.weights if names is None else names)
        colocated = setting.protocol == "cheetah" and setting.colocated
        if given := [name for name in self.blueprint.given_away if name in names]:
            names = [name for name in names if name not in given]
            self.engine.put(given, SERVER, weights, public=True)
        if "embedding" in given:
            revealed = self.engine.get(["embedding"], CLIENT)
            self.table_VxD = revealed and revealed["embedding"]
        self.engine.put(names, SERVER, weights, colocated=colocated)
        passed = (".bias", ".epsilon", ".rate", "positions", "slots.k", "slots.v")
        multiplied = tuple(name for name in names if not name.endswith(passed))
        if multiplied and self.blueprint.rewrites.cached and setting.protocol == "semi2k":
            # the engine knows opened arrays by their addresses, which those of another model might be given again
            if self.engine.has_opened:
                raise RuntimeError("an engine with opened weights holds one model; reset it first")
            self.engine.has_opened = True
            cached = Stage("weights, once", None, lambda *arrays: tuple(map(_cached, arrays)), multiplied, multiplied)
            self.run(program, [cached], multiplied, 0)

    def forward(self, num_tokens: int) -> None:
        """Reads `tokens` [num_tokens] → `logits` [num_tokens, V] of every position."""
        self.run(f"forward {num_tokens}", forward(self.blueprint, num_tokens), ("logits",), num_tokens)

    def prefill(self, num_tokens: int) -> None:
        """Reads `tokens` [num_tokens] → `logits` [1, V] after row `last`, and the caches."""
        self.run(
            f"prefill {num_tokens}",
            prefill(self.blueprint, num_tokens),
            ("logits", *caches(self.blueprint)),
            num_tokens,
        )

    def step(self, num_keys: int) -> None:
        """Reads one of `tokens` at `position` and the first keys of the caches → `logits`, and the caches with it."""
        self.run(f"step {num_keys}", step(self.blueprint, num_keys), ("logits", *caches(self.blueprint)), 1)

    def choose(self) -> None:
        """`logits` → `tokens`, the one-hot row of the largest, which stays inside."""
        stage = Stage("next token", None, likeliest, ("logits",), (TOKENS,))
        row = jax.ShapeDtypeStruct((1, self.blueprint.config.vocab_size), jnp.float32)
        self.run("choose", [stage], (TOKENS,), 1, dict(logits=row))

    def run(
        self, name: str, stages: list[Stage], outputs: Sequence[str], num_tokens: int,
        known: Mapping[str, jax.ShapeDtypeStruct] = {},
    ) -> Account:  # fmt: skip
        """Runs stages as one program, compiled when its name is new; what they write stays inside, as shares.

        Args:
          known: types of what earlier programs wrote.
        """
        if name not in self.programs:
            inputs = external_inputs(stages)
            self.load(name, compose(stages, inputs, outputs), inputs, outputs, num_tokens, known)
        account = self.engine.run(name, *self.programs[name])
        self.accounts.append((name, account))
        return account

    def load(
        self, name: str, function: Callable, inputs: Sequence[str], outputs: Sequence[str], num_tokens: int,
        known: Mapping[str, jax.ShapeDtypeStruct],
    ) -> None:  # fmt: skip
        """Compiles a function of named arrays as a program."""
        hlo = lower(function, input_types(self.blueprint, inputs, num_tokens, known))
        public = (*PUBLIC, *self.blueprint.given_away)
        visibility = ["public" if value in public else "secret" for value in inputs]
        self.engine.load(name, hlo, visibility, {COMPILER: self.blueprint.rewrites.denominator})
        self.programs[name] = tuple(value.removesuffix(PAST) for value in inputs), tuple(outputs)

    def put_public(self, name: str, value: int | None) -> None:
        self.engine.put([name], CLIENT, None if value is None else {name: np.int32(value)}, public=True)

    def put_tokens(self, tokens: Sequence[int] | None) -> None:
        """Shares the client's tokens."""
        entered = None if tokens is None else {TOKENS: self.blueprint.enter(tokens, self.table_VxD)}
        self.engine.put([TOKENS], CLIENT, entered)

    def tell(self, message: Message | None, kind: type[Message]) -> Message:
        """A message of the client to the others; each gets it back."""
        if not self.asks:
            return self.engine.lines[0].receive(kind)
        for line in self.engine.lines:
            line.send(message)
        return message


def _cached(array: jax.Array) -> jax.Array:
    return jax.ffi.ffi_call(
        "spu.make_cached_var", jax.ShapeDtypeStruct(array.shape, array.dtype), has_side_effect=True
    )(array)


def padded_length(num_tokens: int, context_length: int) -> int:
    """The length of a program that reads so many: powers of two from 8, so that few programs serve all lengths."""
    return min(max(8, 1 << (num_tokens - 1).bit_length()), context_length)


def generate(
    model: PrivateModel,
    prompt: Sequence[int] | None,
    num_tokens: int = 0,
    *,
    choose: Callable[[np.ndarray], int] = np.argmax,
    end_of_text: int | None = None,
    reveal: str = "logits",
    notify: Callable[[int], None] = lambda token: None,
) -> list[int]:
    """The tokens after a prompt; all but the client of a link call it without one and get none.

    Args:
      choose: logits [V] → token; the client's, greedy by default.
      reveal: what the client learns: "logits" of every new token, among which it chooses, or only the "token", the
        largest logit's.
      notify: called with each token as it comes.
    Raises:
      UserError: a prompt that is empty or does not fit, or a `reveal` that is not known.
    """
    if model.asks:
        check_request(model.blueprint, prompt, num_tokens, reveal)
    length, reveal = model.tell(None if prompt is None else Prompt(len(prompt), reveal), Prompt)
    if not model.asks and not (1 <= length < model.blueprint.config.context_length and reveal in REVEALED):
        raise UserError(f"a prompt of {length} tokens and reveal={reveal!r} cannot be answered")
    padded = padded_length(length, model.blueprint.config.context_length)
    model.put_tokens(None if prompt is None else [*prompt, *[0] * (padded - length)])
    model.put_public(LAST, None if prompt is None else length - 1)
    model.prefill(padded)
    new, position = [], length
    while True:
        token = _next_token(model, choose, reveal)
        done = None
        if model.asks:
            ended = token == end_of_text
            if not ended:
                new.append(token)
                notify(token)
            done = ended or len(new) == num_tokens
        if model.tell(None if done is None else Progress(done), Progress).done:
            return new
        if reveal == "logits" or model.blueprint.embedding == "public":
            model.put_tokens(None if token is None else [token])
        model.put_public(POSITION, None if prompt is None else position)
        if position == model.blueprint.config.context_length:  # only of a client that was not checked
            raise UserError(f"the context of {position} tokens is full")
        position += 1
        model.step(padded_length(position, model.blueprint.config.context_length))


def sampler(
    tokenizer: Tokenizer, num_tokens: int, temperature: float, top_k: int, seed: int
) -> Callable[[np.ndarray], int]:
    """The `choose` of a text of `num_tokens`, with the random numbers of `jax_entropy.generate`; temperature 0: greedy.

    Raises:
      UserError: options out of range.
    """
    check_sampling(num_tokens, temperature, top_k, seed)
    keys = iter(jax.random.split(random_key(seed), num_tokens))

    def choose(logits_V: np.ndarray) -> int:
        V = logits_V.size
        return int(choose_token(jnp.asarray(logits_V), next(keys), temperature, tokenizer.known(V), min(top_k, V)))

    return choose


def _next_token(model: PrivateModel, choose: Callable[[np.ndarray], int], reveal: str) -> int | None:
    if reveal == "token":
        model.choose()
    name = "logits" if reveal == "logits" else TOKENS
    revealed = model.engine.get([name], CLIENT)
    if revealed is None:
        return None
    row_V = revealed[name][0]
    return int(choose(row_V) if reveal == "logits" else np.argmax(row_V))


def check_request(blueprint: Blueprint, prompt: Sequence[int], num_tokens: int, reveal: str) -> None:
    """Checks a request before anything is shared.

    Raises:
      UserError: what `generate` cannot do.
    """
    if reveal not in REVEALED:
        raise UserError(f"reveal={reveal!r} is not known{nearest(reveal, REVEALED)}")
    if reveal == "token" and not blueprint.rewrites.one_hot:
        raise UserError("reveal=token needs the rewrite one_hot: the token stays inside as a one-hot row")
    if not len(prompt):
        raise UserError("the prompt is empty; give at least one character")
    if num_tokens < 1:
        raise UserError(f"num_tokens={num_tokens} must be at least 1")
    context = blueprint.config.context_length
    if num_tokens > (room := context - len(prompt)):
        raise UserError(
            f"the prompt's {len(prompt)} tokens and {num_tokens} new ones do not fit into the context of {context}; "
            + (f"ask for at most num_tokens={room}" if room > 0 else "shorten the prompt")
        )
