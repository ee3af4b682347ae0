"""Text token by token: greedy is the argmax of the whole forward pass, chance follows its seed and the model."""

import importlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_entropy.errors import UserError
from jax_entropy.generate import generate
from jax_entropy.model import Transformer
from jax_entropy.runs.load import Run
from tests.tiny_model import VARIED, initial, scattered, tiny

END = 60
generate_module = importlib.import_module("jax_entropy.generate")  # the package's name is the function


class Letters:
    """A tokenizer of single characters: '0' is token 0; token 60 ends a text."""

    end_of_text = END

    def __init__(self, missing=()):
        self.missing = missing

    def known(self, vocab_size):
        return ~np.isin(np.arange(vocab_size), self.missing)

    def encode(self, text):
        return [ord(character) - ord("0") for character in text]

    def decode(self, ids):
        assert END not in ids
        return "".join(chr(ord("0") + int(i)) for i in ids)


def write(config, prompt="053", variables=None, num_tokens=8, missing=(), **kwargs):
    variables = scattered(config) if variables is None else variables
    run = Run(None, None, Transformer(config), variables, Letters(missing), 0)
    return generate(run, prompt, **{"num_tokens": num_tokens, "temperature": 1.0} | kwargs)


def greedy_by_hand(config, variables, prompt, num_tokens):
    forward = jax.jit(Transformer(config).apply)
    ids = Letters().encode(prompt)
    for _ in range(num_tokens):
        padded = jnp.asarray([ids + [0] * (config.context_length - len(ids))])  # causal: what follows is not seen
        following = int(np.argmax(forward(variables, padded)[0][0, len(ids) - 1]))
        if following == END:
            break
        ids.append(following)
    return Letters().decode(ids[len(prompt) :])


def with_bias_to(config, logits_V):
    """A model that gives the same logits at every position: its hidden state is one, its embedding the logits."""
    assert config.ffn_free_layers == config.num_layers
    params = jax.tree.map(jnp.zeros_like, initial(config)["params"])
    table = jnp.zeros((61, 16)).at[:, 0].set(jnp.asarray(logits_V))
    return {"params": params | {"head": table, "position_embedding": jnp.zeros((16, 16)).at[:, 0].set(1.0)}}


BIASED = tiny("SM^2", final_norm="none", tied_head=False)


@pytest.mark.parametrize("name", VARIED)
def test_greedy_is_the_argmax_of_the_whole_forward_pass(name):
    config, letters = tiny(name, context_length=44), "0530123456789" * 3
    variables = scattered(config)
    for length in (3, 16, 17, 33):  # of the prompt, which is read in pieces of 16 and then token by token
        text = write(config, letters[:length], variables, temperature=0, num_tokens=11)
        assert text == greedy_by_hand(config, variables, letters[:length], 11)
    assert len(text) > 2


@pytest.mark.parametrize(
    "options", [dict(top_k=1), dict(top_k=1, seed=5, temperature=3.0), dict(temperature=1e-30), dict(temperature=1e-6)]
)
def test_what_comes_to_greedy_is_greedy(options):
    config = tiny("SM+LN+G")
    assert write(config, **options) == write(config, temperature=0)


def test_greedy_takes_the_first_of_equals_and_so_does_the_likeliest_one():
    equal = with_bias_to(BIASED, np.zeros(61))
    assert write(BIASED, variables=equal, temperature=0) == "00000000"
    for seed in range(3):
        assert write(BIASED, variables=equal, top_k=1, seed=seed) == "00000000"


def test_a_seed_makes_the_text():
    config = tiny("EReg(SM(t)+ScFuFFN^1)")
    texts = [write(config, temperature=2.0, seed=seed) for seed in (0, 0, 1, 2)]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3


def test_each_token_has_chances_of_its_own():
    """With all tokens equally likely, neighbours differ."""
    text = write(BIASED, variables=with_bias_to(BIASED, np.where(np.arange(61) == END, -1e9, 0.0)), num_tokens=13)
    assert len(set(text)) > 6


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (0.5, 0), (2.0, 3)])
def test_chances_are_the_softmax_of_the_likeliest(temperature, top_k):
    logits = np.full(61, -1e9)
    logits[[7, 3, 9, 5]] = [1.0, 0.5, 0.0, -0.5]
    variables = with_bias_to(BIASED, logits)
    expected = np.exp(logits / temperature)
    expected[np.argsort(logits)[: -top_k or None]] *= top_k == 0
    expected /= expected.sum()
    counts, draws = np.zeros(61), 100
    for seed in range(draws):
        text = write(BIASED, "0", variables, num_tokens=15, temperature=temperature, top_k=top_k, seed=seed)
        counts += np.bincount(Letters().encode(text), minlength=61)
    total = draws * 15
    assert counts.sum() == total
    deviation = np.sqrt(total * expected * (1 - expected))
    assert np.all(np.abs(counts - total * expected) <= 4.5 * deviation)


@pytest.mark.parametrize("options", [dict(temperature=0), dict(top_k=2), dict(top_k=61), {}])
def test_entries_without_a_token_are_never_chosen(options):
    """Padding, and ids that were left out, however likely a model finds them."""
    missing = [3, *range(8, 60)]
    likely = with_bias_to(
        BIASED, np.where(np.isin(np.arange(61), missing), 50.0, np.where(np.arange(61) == END, -9, 0))
    )
    assert set(write(BIASED, variables=likely, **options)) <= set("3" + Letters().decode(missing))
    assert set(write(BIASED, variables=likely, missing=missing, num_tokens=13, **options)) <= set("0124567")


def test_a_text_ends_where_the_model_ends_it():
    ends = with_bias_to(BIASED, np.where(np.arange(61) == END, 5.0, 0.0))
    assert write(BIASED, variables=ends, temperature=0) == ""
    for seed in range(6):  # the end comes early or late, and nothing comes after it
        text = write(
            BIASED, variables=with_bias_to(BIASED, np.where(np.arange(61) == END, 3.0, 0.0)), seed=seed, num_tokens=13
        )
        assert len(text) < 13


def test_a_prompt_may_hold_the_end_of_another_text():
    config = tiny("SM+LN+G")
    assert write(config, "05" + chr(ord("0") + END), temperature=0) == greedy_by_hand(
        config, scattered(config), "05l", 8
    )


@pytest.mark.parametrize("prompt", ["0", "0123456789"])
def test_the_context_may_be_filled(prompt):
    config = tiny("SM+LN+G")
    room = 16 - len(prompt)
    assert write(config, prompt, temperature=0, num_tokens=room) == greedy_by_hand(
        config, scattered(config), prompt, room
    )


def test_prompts_of_all_lengths_are_one_program():
    config = tiny("SM+ScFuFFN", num_heads=4)
    write(config, "0")
    programs = generate_module._continue._cache_size()
    write(config, "0123456", num_tokens=3, temperature=0, seed=2)
    assert generate_module._continue._cache_size() == programs


def test_fewer_tokens_are_the_beginning_of_more():
    config = tiny("SM(t)+ScFuFFN")
    assert write(config, temperature=0, num_tokens=12).startswith(write(config, temperature=0, num_tokens=5))
    assert len(write(config, temperature=0, num_tokens=1)) <= 1


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "the prompt is empty"),
        ("0" * 16, {}, "16 tokens and 8 new ones do not fit into the context of 16; shorten the prompt"),
        ("0" * 99, {}, "99 tokens .* shorten the prompt"),
        ("0" * 10, {}, "10 tokens and 8 new ones do not fit into the context of 16; ask for at most num_tokens=6"),
        ("0", dict(num_tokens=0), "^num_tokens=0 must be at least 1"),
        ("0", dict(num_tokens="4"), "^num_tokens='4' must be a whole number"),
        ("0", dict(temperature=None), "^temperature=None must be a number"),
        ("0", dict(seed=1.5), "^seed=1.5 must be a whole number"),
        ("0", dict(num_tokens=-3), "num_tokens=-3"),
        ("0", dict(temperature=-0.1), "temperature=-0.1"),
        ("0", dict(temperature=math.nan), "temperature=nan"),
        ("0", dict(temperature=math.inf), "^temperature=inf must be a finite number"),
        ("0", dict(top_k=-1), "^top_k=-1"),
        ("0", dict(seed=-1), "^seed=-1"),
    ],
)
def test_what_cannot_be_generated_is_named(prompt, options, message):
    with pytest.raises(UserError, match=message):
        write(tiny("SM+LN+G"), prompt, **options)


def test_more_candidates_than_tokens_are_all_tokens():
    config = tiny("SM+LN+G")
    assert write(config, top_k=1000, seed=4) == write(config, top_k=61, seed=4) == write(config, seed=4)
