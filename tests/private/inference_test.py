"""Under the real engine: logits and texts are the plain model's, keys and values stay shares, rounds are counted."""

import dataclasses

import jax
import numpy as np
import pytest

from jax_entropy.data.tokenizer import train_tokenizer
from jax_entropy.errors import UserError
from jax_entropy.model import Transformer
from jax_entropy.private.engine.engine import PROTOCOLS, Setting
from jax_entropy.private.program.blueprint import NO_REWRITES, Rewrites
from jax_entropy.private.program.export import export
from jax_entropy.private.program.stage import lower
from jax_entropy.private.session.inference import CLIENT, SERVER, PrivateModel, generate, sampler
from tests.private.helpers import greedy, plain_logits, private_model
from tests.tiny_model import ARCHITECTURES, VARIED, initial, random_tokens, scattered, tiny

PROMPT = (0, 5, 3)
PRECISE = Setting(fraction_bits=22, exponent_iterations=7)
THREE = ("SM+LN+G", "EReg(SM(t)+ScFuFFN)", "SM+LR(layer)")


@pytest.fixture
def semi2k(engine):
    return engine(PRECISE)


def logits_of(engine, config, rewrites=Rewrites()):
    model = private_model(engine, config, rewrites=rewrites)
    model.put_tokens(np.asarray(random_tokens(1, 16)[0]).tolist())
    model.forward(16)
    return engine.get(["logits"], CLIENT)["logits"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_are_the_plain_models(semi2k, name):
    config = tiny(name)
    expected, found = plain_logits(config), logits_of(semi2k, config)
    assert np.abs(found - expected).max() < 0.01 * np.abs(expected).max()
    top_two = np.sort(expected, axis=-1)[:, -2:]
    clear = top_two[:, 1] - top_two[:, 0] > 0.02 * np.abs(expected).max()
    assert clear.sum() >= 8
    assert (found.argmax(-1) == expected.argmax(-1))[clear].all()


@pytest.mark.parametrize("name", VARIED)
def test_logits_of_a_plain_export_are_the_same(semi2k, name):
    config = tiny(name)
    expected = plain_logits(config)
    rewrites = dataclasses.replace(NO_REWRITES, one_hot=True)
    assert np.abs(logits_of(semi2k, config, rewrites) - expected).max() < 0.01 * np.abs(expected).max()


def test_a_secret_index_finds_the_same_row(semi2k):
    config = tiny("SM+ScFuFFN", vocab_size=13)
    tokens = [3, 12, 0, 7]
    model = private_model(semi2k, config, rewrites=dataclasses.replace(Rewrites(), one_hot=False))
    model.put_tokens(tokens)
    model.forward(4)
    found = semi2k.get(["logits"], CLIENT)["logits"]
    expected = Transformer(config).apply(scattered(config), np.asarray([tokens]))[0][0]
    assert np.abs(found - expected).max() < 0.01 * np.abs(expected).max()


@pytest.mark.parametrize("name", THREE)
@pytest.mark.parametrize("protocol", ["semi2k", "aby3"])
@pytest.mark.parametrize("reveal", ["logits", "token"])
def test_the_text_is_the_plain_models(engine, protocol, name, reveal):
    config = tiny(name)
    model = private_model(engine(Setting(protocol=protocol)), config)
    for _ in range(2):  # a second prompt after one set-up
        assert generate(model, PROMPT, 8, reveal=reveal) == greedy(config, PROMPT, 8)


@pytest.mark.long
@pytest.mark.parametrize("name", THREE)
def test_the_text_under_cheetah(engine, name):
    config = tiny(name)
    model = private_model(engine(Setting(protocol="cheetah")), config)
    assert generate(model, PROMPT, 3) == greedy(config, PROMPT, 3)


def test_cheetah_gives_a_token(engine):
    config = tiny("SM+ScFuFFN", num_layers=1, context_length=8)
    model = private_model(engine(Setting(protocol="cheetah")), config)
    assert generate(model, PROMPT, 2) == greedy(config, PROMPT, 2)


def test_few_step_programs_serve_all_lengths_and_keep_keys_and_values_as_shares(semi2k):
    config = tiny("SM+LN+G")
    model = private_model(semi2k, config)
    new = generate(model, PROMPT, 13)
    assert new == greedy(config, PROMPT, 13)
    names = [name for name, _ in model.accounts]
    assert names == ["open weights", "prefill 8"] + ["step 8"] * 5 + ["step 16"] * 7
    for program in ("step 8", "step 16"):
        inputs, outputs = model.programs[program]
        assert {"0.k", "0.v", "1.k", "1.v"} == {*inputs} & {*outputs}
        # whatever the position, a step sends the same
        assert len({account[1:] for name, account in model.accounts if name == program}) == 1
    first, last = (dict(model.accounts)[name] for name in ("step 8", "step 16"))
    assert first.bytes[0] < last.bytes[0] and first.rounds <= last.rounds


def test_weights_are_opened_once(engine):
    config = tiny("SM+ScFuFFN", model_dim=64)
    sent = {}
    for cached in (True, False):
        model = private_model(engine(Setting()), config, rewrites=Rewrites(cached=cached))
        generate(model, PROMPT, 3)
        sent[cached] = model.accounts[-1][1].bytes[0]
    weights = sum(value.size for name, value in export(config, scattered(config)).weights.items() if "kernel" in name)
    assert sent[False] - sent[True] > 0.9 * 8 * weights


@pytest.mark.long
def test_a_table_larger_than_what_the_engine_would_cut_is_opened_once(engine):
    """A prompt and a step take products of it with 8 rows and with one: 256 MiB of shares were cut by that number."""
    config = tiny("SM", num_layers=1, model_dim=128, vocab_size=264_000)
    model = private_model(engine(Setting()), config, initial(config))
    generate(model, PROMPT, 3)
    (first, second) = (account for name, account in model.accounts if name == "step 8")
    assert first.bytes == second.bytes and first.rounds == second.rounds


def test_an_engine_with_opened_weights_holds_one_model_until_it_is_reset(semi2k):
    for _ in range(3):
        private_model(semi2k, tiny("SM"))
        with pytest.raises(RuntimeError, match="holds one model"):
            private_model(semi2k, tiny("SM"))
        semi2k.reset(PRECISE)


def test_a_reset_engine_has_forgotten_everything(engine):
    def sent():
        model = private_model(engine(PRECISE), tiny("SM"))
        model.put_tokens(range(16))
        for _ in range(2):
            model.forward(16)
        return [account.bytes for _, account in model.accounts]

    first, started = sent(), engine(Setting(protocol="aby3"))
    with pytest.raises(UserError, match=r"failed \(run\)"):
        started.run("forward 16", ["tokens"], ["logits"])
    with pytest.raises(UserError, match=r"failed \(get\)"):
        started.get(["logits"], CLIENT)
    assert sent() == first


def test_what_is_drawn_among_revealed_logits_is_the_clients_choice(semi2k):
    config = tiny("SM+ScFuFFN")
    model = private_model(semi2k, config)
    rng = np.random.default_rng(0)
    new = generate(model, PROMPT, 5, choose=lambda logits: int(rng.integers(61)))
    assert new == np.random.default_rng(0).integers(61, size=5).tolist()


@pytest.mark.parametrize(("temperature", "top_k"), [(0, 0), (1.0, 0), (1.0, 60)])
def test_entries_without_a_token_are_never_drawn(temperature, top_k):
    tokenizer = train_tokenizer([], 257)
    choose = sampler(tokenizer, 20, temperature, top_k, seed=0)
    drawn = [choose(np.where(np.arange(300) < 257, 0.0, 50.0)) for _ in range(20)]
    assert max(drawn) < 257 and (len(set(drawn)) > 9) == (temperature > 0)


def test_it_ends_at_the_end_of_text(semi2k):
    config = tiny("EReg(SM(t)+ScFuFFN^1)")
    expected = greedy(config, PROMPT, 8)
    assert expected[2] not in expected[:2]
    assert generate(private_model(semi2k, config), PROMPT, 8, end_of_text=expected[2]) == expected[:2]


@pytest.mark.parametrize(("prompt", "options", "message"), [
    ((), {}, "the prompt is empty"),
    ((1,) * 16, {}, "16 tokens and 4 new ones do not fit into the context of 16; shorten"),
    ((1,) * 14, {}, "ask for at most num_tokens=2"),
    ((1,), dict(num_tokens=0), "num_tokens=0 must be at least 1"),
    ((1,), dict(reveal="all"), "reveal='all' is not known"),
])  # fmt: skip
def test_what_cannot_be_generated_is_said(semi2k, prompt, options, message):
    model = private_model(semi2k, tiny("SM+ScFuFFN"))
    with pytest.raises(UserError, match=message):
        generate(model, prompt, **dict(num_tokens=4) | options)


@pytest.mark.parametrize(("setting", "message"), [
    (dict(protocol="aby4"), "aby3"), (dict(exponent="pad"), "pade"), (dict(fraction_bits=40), "between 10 and 26"),
    (dict(exponent_iterations=1), "between 4 and 12"),
])  # fmt: skip
def test_settings_without_meaning_are_said(setting, message):
    with pytest.raises(UserError, match=message):
        Setting(**setting).check()


def test_two_rounds_of_a_product_are_two_rounds(semi2k):
    """The count is causal: a product opens both factors at once, and its truncation follows."""
    matrix = jax.ShapeDtypeStruct((8, 8), np.float32)
    semi2k.load("product", lower(lambda a, b: a @ b, [matrix, matrix]), ["secret"] * 2, {})
    semi2k.put(["a", "b"], CLIENT, dict(a=np.eye(8, dtype=np.float32), b=np.full((8, 8), 2, np.float32)))
    account = semi2k.run("product", ["a", "b"], ["c"])
    assert account.rounds == 2
    assert all(
        2 * 8 * 64 < count <= 3 * 8 * 64 for count in account.bytes
    )  # two factors and a truncation of 64 numbers
    np.testing.assert_allclose(semi2k.get(["c"], CLIENT)["c"], 2, atol=1e-4)


def test_a_server_that_uses_that_it_knows_its_weights_sends_less(engine):
    matrix, accounts = jax.ShapeDtypeStruct((64, 64), np.float32), {}
    for colocated in (True, False):
        started = engine(Setting(protocol="cheetah", colocated=colocated))
        started.load("product", lower(jax.numpy.matmul, [matrix, matrix]), ["secret"] * 2, {})
        started.put(["x"], CLIENT, dict(x=np.eye(64, dtype=np.float32)))
        started.put(["w"], SERVER, dict(w=np.eye(64, dtype=np.float32)), colocated=colocated)
        accounts[colocated] = [started.run("product", ["x", "w"], ["y"]) for _ in range(3)][-1]
    assert sum(accounts[True].bytes) < 0.6 * sum(accounts[False].bytes)


def test_what_goes_on_at_the_same_time_is_not_counted_one_after_the_other(engine):
    """CHEETAH's threads share 20,000 comparisons, each on a link of its own; 1,000 are done by one."""
    rounds, started = {}, engine(Setting(protocol="cheetah"))
    for count in (1000, 20_000):
        values = jax.ShapeDtypeStruct((count,), np.float32)
        started.load("relu", lower(lambda x: jax.numpy.maximum(x, 0), [values]), ["secret"], {})
        started.put(["x"], CLIENT, dict(x=np.linspace(-1, 1, count, dtype=np.float32)))
        runs = [started.run("relu", ["x"], ["y"]) for _ in range(4)]
        rounds[count] = min(run.rounds for run in runs)
    assert runs[-1].messages[0] > 1.5 * rounds[20_000]  # there were threads
    assert rounds[1000] <= rounds[20_000] <= rounds[1000] + 2


def test_protocols_have_their_parties():
    assert PROTOCOLS == {"semi2k": 2, "aby3": 3, "cheetah": 2}


@pytest.mark.parametrize("reveal", ["logits", "token"])
def test_a_table_that_is_given_away_is_looked_up_by_the_client(engine, reveal):
    """The text is the same, and neither the table nor the tied head is worked on in secret."""
    config, sent = tiny("SM+ScFuFFN"), {}
    for embedding in ("shared", "public"):
        started = engine(Setting())
        exported = export(config, scattered(config), Rewrites(), started.setting, embedding=embedding)
        model = PrivateModel.of(started, exported)
        assert generate(model, PROMPT, 4, reveal=reveal) == greedy(config, PROMPT, 4)
        sent[embedding] = sum(account.bytes[0] for _, account in model.accounts)
    assert exported.blueprint.given_away == ("embedding", "head.kernel", "head.bias")
    assert sent["public"] < sent["shared"]
