"""Text from a trained model, token by token with a key-value cache."""

import functools
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jax_entropy.errors import UserError, check_number
from jax_entropy.model import empty_cache
from jax_entropy.runs.load import Run, loaded
from jax_entropy.seeds import check_seed, random_key

_PIECE = 16  # tokens of a prompt that are read at once


def generate(
    run: Run | str | os.PathLike,
    prompt: str,
    *,
    num_tokens: int = 64,
    temperature: float = 0.8,
    top_k: int = 0,
    seed: int = 0,
    best: bool = False,
    notify: Callable[[str], None] = print,
) -> str:
    """The text that follows `prompt`; ends early at end-of-text.

    Args:
      run: a workdir, or what `load_run` made of one, which saves loading it again.
      num_tokens: at most so many tokens; prompt and new tokens must fit into the model's context.
      temperature: of the sampling; 0 is greedy.
      top_k: sample among the k likeliest tokens; 0: among all.
      seed: of the sampling, from 0 to 2^64 − 1.
      best, notify: as for `load_run`; a run that is loaded has its checkpoint already.
    Raises:
      UserError: an empty prompt, one that leaves no room, or options out of range; and as `load_run` does.
    """
    if not isinstance(prompt, str):
        raise UserError(f"prompt={prompt!r} must be text")
    check_sampling(num_tokens, temperature, top_k, seed)
    run = loaded(run, notify, best=best)
    ids, context, end_of_text = run.tokenizer.encode(prompt), run.model.config.context_length, run.tokenizer.end_of_text
    if not ids:
        raise UserError("the prompt is empty; give at least one character")
    if len(ids) + num_tokens > context:
        raise UserError(
            f"the prompt's {len(ids)} tokens and {num_tokens} new ones do not fit into the context of {context}; "
            + (f"ask for at most num_tokens={context - len(ids)}" if len(ids) < context else "shorten the prompt")
        )
    text_T, end = _continue(
        run.model, run.variables, jnp.asarray(ids + [0] * (context - len(ids))), len(ids), num_tokens, random_key(seed),
        jnp.asarray(temperature, jnp.float32), run.tokenizer.known(run.model.config.vocab_size),
        min(top_k, run.model.config.vocab_size), end_of_text,
    )  # fmt: skip
    ids = jax.device_get(text_T)[len(ids) : end].tolist()
    return run.tokenizer.decode(ids[:-1] if ids[-1] == end_of_text else ids)


def choose(
    logits_V: jax.Array, key: jax.Array, temperature: jax.Array | float, known_V: jax.Array | np.ndarray, top_k: int
) -> jax.Array:
    """One of the known tokens, sampled among the `top_k` likeliest (0: among all); at temperature 0 the likeliest."""
    logits_K, ids_K = jax.lax.top_k(jnp.where(known_V, logits_V, -jnp.inf), top_k or logits_V.size)
    # the largest is 0 then, whatever small temperature divides it
    sampled = jax.random.categorical(key, (logits_K - logits_K[0]) / jnp.where(temperature > 0, temperature, 1))
    return ids_K[jnp.where(temperature > 0, sampled, 0)]


def check_sampling(num_tokens: int, temperature: float, top_k: int, seed: int) -> None:
    """Checks the options of a sampling.

    Raises:
      UserError: options out of range.
    """
    check_number("num_tokens", num_tokens, 1)
    check_number("temperature", temperature, 0, whole=False)
    check_number("top_k", top_k, 0)
    check_seed(seed)


@functools.partial(jax.jit, static_argnums=(0, 8, 9))
def _continue(
    model, variables, text_T, length, num_tokens, key, temperature, known_V, top_k, end_of_text
) -> tuple[jax.Array, jax.Array]:
    """A text of `length` tokens with up to `num_tokens` new ones, and where it ends: with an end-of-text if it has one.

    One program for every prompt: it is read in pieces of one size, and what remains token by token.
    """

    def read(text_T, cache, position, size):
        known = {**variables, "cache": cache}
        tokens_1xT = jax.lax.dynamic_slice_in_dim(text_T, position, size)[None]
        (logits_1xTxV, _), changed = model.apply(known, tokens_1xT, position, method="decode", mutable=["cache"])
        return logits_1xTxV[0, -1], changed["cache"]

    def step(carry):
        text_T, cache, position = carry
        logits_V, cache = read(text_T, cache, position, 1)
        chosen = choose(logits_V, jax.random.fold_in(key, position + 1 - length), temperature, known_V, top_k)
        following = jnp.where(position + 1 < length, text_T[position + 1], chosen)
        return text_T.at[position + 1].set(following), cache, position + 1

    def goes_on(carry):
        text_T, _, position = carry
        has_ended = (position >= length) & (text_T[position] == end_of_text)
        return (position + 1 < length + num_tokens) & ~has_ended

    size = min(_PIECE, len(text_T))
    pieces = (length - 1) // size
    cache = empty_cache(model.config, 1)
    cache = jax.lax.fori_loop(0, pieces, lambda i, cache: read(text_T, cache, i * size, size)[1], cache)
    text_T, _, position = jax.lax.while_loop(goes_on, step, (text_T, cache, pieces * size))
    return text_T, position + 1
