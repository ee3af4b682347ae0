"""Text from a trained model, token by token with a key-value cache."""

import functools
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jax_entropy.errors import UserError, check_number
from jax_entropy.model import empty_cache
from jax_entropy.runs.load import Run, loaded
from jax_entropy.seeds import check_seed, random_key


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
    ids = _continue(
        run.model, run.variables, jnp.asarray([ids]), random_key(seed), jnp.asarray(temperature, jnp.float32),
        num_tokens, min(top_k, run.model.config.vocab_size), end_of_text,
    )  # fmt: skip
    ids = jax.device_get(ids).tolist()
    return run.tokenizer.decode(ids[: ids.index(end_of_text)] if end_of_text in ids else ids)


def choose(logits_V: jax.Array, key: jax.Array, temperature: jax.Array | float, top_k: int) -> jax.Array:
    """A token, sampled among the `top_k` likeliest (0: among all); the likeliest where the temperature is 0."""
    logits_K, ids_K = jax.lax.top_k(logits_V, top_k or logits_V.size)
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


@functools.partial(jax.jit, static_argnums=(0, 5, 6, 7))
def _continue(model, variables, prompt_1xT, key, temperature, num_tokens, top_k, end_of_text) -> jax.Array:
    """The `num_tokens` ids after the prompt; after an end-of-text only end-of-text."""

    def read(tokens_1xT, cache, position):
        known = {**variables, "cache": cache}
        (logits_1xTxV, _), changed = model.apply(known, tokens_1xT, position, method="decode", mutable=["cache"])
        return logits_1xTxV, changed["cache"]

    def step(carry, key):
        cache, token, position = carry
        logits_1xTxV, cache = read(token[None, None], cache, position)
        following = jnp.where(token == end_of_text, token, choose(logits_1xTxV[0, -1], key, temperature, top_k))
        return (cache, following, position + 1), following

    keys = jax.random.split(key, num_tokens)
    logits_1xTxV, cache = read(prompt_1xT, empty_cache(model.config, 1), 0)
    first = choose(logits_1xTxV[0, -1], keys[0], temperature, top_k)
    _, rest = jax.lax.scan(step, (cache, first, prompt_1xT.shape[1]), keys[1:])
    return jnp.concatenate([first[None], rest])
