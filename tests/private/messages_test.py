"""Whatever a peer sends is a sound message or a sentence: never another error, never a value of another type."""

import copy
import dataclasses
import json
import socket
import threading

import jax
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jax_entropy.commands.parties import read_tokenizer
from jax_entropy.data.tokenizer import train_tokenizer
from jax_entropy.errors import UserError
from jax_entropy.private.engine.engine import Setting
from jax_entropy.private.program.blueprint import PLAIN, Blueprint, Rewrites
from jax_entropy.private.program.export import export
from jax_entropy.private.session.messages import (
    Agreement,
    Hello,
    More,
    Offer,
    Progress,
    Prompt,
    Queued,
    Ready,
    Refusal,
    Task,
    read,
    write,
)
from jax_entropy.private.session.parties import ask
from tests.tiny_model import VARIED, scattered, tiny

KINDS = (Hello, Refusal, Queued, Offer, Task, Ready, Agreement, More, Prompt, Progress)


def offer(name="EReg(SM(t)+ScFuFFN^1)", rewrites=Rewrites(), **overrides):
    config = tiny(name, **overrides)
    return Offer(export(config, scattered(config), rewrites).blueprint, Setting(), '{"a": "tokenizer"}', 9501)


EXAMPLES = (
    Hello("jax_entropy private 4", "0.10.2"), Refusal("another version"), Queued(2), offer(),
    Task(offer().blueprint, Setting(protocol="aby3"), 9501), Ready(9701), Agreement(True), More(False),
    Prompt(17, "logits"), Progress(True),
)  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_a_message_is_read_as_it_was_written(message):
    line = write(message)
    assert line.endswith(b"\n") and line.count(b"\n") == 1
    assert read(line, *KINDS) == message


@pytest.mark.parametrize("name", VARIED)
@pytest.mark.parametrize("rewrites", [Rewrites(), PLAIN], ids=str)
def test_every_export_can_be_offered(name, rewrites):
    made = offer(name, rewrites)
    assert read(write(made), Offer) == made


def parts(value, path=()):
    """The paths of everything in a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from parts(item, (*path, key))


def sound(value, hint):
    """Whether each field of a record is of the type that it says."""
    if dataclasses.is_dataclass(value):
        return all(sound(getattr(value, field.name), field.type) for field in dataclasses.fields(value))
    if hasattr(value, "_fields"):
        return all(sound(item, value.__annotations__[name]) for name, item in zip(value._fields, value, strict=True))
    if isinstance(value, dict):
        return all(isinstance(name, str) and all(type(n) is int for n in item) for name, item in value.items())
    if isinstance(value, tuple):
        return all(type(n) is int for n in value)
    return type(value) in getattr(hint, "__args__", (hint,))


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_a_message_with_something_else_in_it_is_sound_or_refused(message, data):
    fields = {"whole": json.loads(write(message))}
    *way, last = data.draw(st.sampled_from([path for path in parts(fields) if path]))
    place = fields = copy.deepcopy(fields)
    for key in way:
        place = place[key]
    if data.draw(st.booleans()):
        place[last] = data.draw(VALUES)
    else:
        del place[last]
    try:
        found = read(json.dumps(fields.get("whole")).encode(), *KINDS)
    except UserError as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) < 400
    else:
        assert sound(found, type(found))


@given(st.binary(max_size=200) | VALUES.map(lambda value: json.dumps(value).encode()))
@example(b"[" * 100_000)
@example(b'{"more":' * 100_000)
@example(b'{"more": NaN}')
@example(b'{"length": 1' + b"0" * 5000 + b', "reveal": "logits"}')
@example(b'{"error": "\\ud800"}')
@settings(max_examples=300, deadline=None)
def test_nonsense_is_refused(line):
    with pytest.raises(UserError, match="does not speak this protocol"):
        read(line, *KINDS)


def test_a_message_out_of_turn_is_refused():
    with pytest.raises(UserError, match="no Offer or Refusal"):
        read(write(Hello("a", "b")), Offer, Refusal)


@pytest.mark.parametrize(("change", "message"), [
    (dict(num_heads=7), "not divisible"), (dict(num_layers=4), "squarings of 3 layers, and the model has 4"),
    (dict(num_layers=3), "is missing, or nothing reads it"),
    (dict(num_layers=100_000), "100000 layers with so few weights"),
    (dict(activation="gelu2"), "did you mean 'gelu'"),
    (dict(model_dim=32), r"has the shape \(61, 32\), not \(61, 16\)"),
])  # fmt: skip
def test_an_offer_whose_parts_do_not_fit_is_refused(change, message):
    fields = json.loads(write(offer("SM+LN+R^1")))
    fields["blueprint"]["squarings"] = [6] * 3 if change.get("num_layers") == 4 else []
    fields["blueprint"]["config"] |= change
    with pytest.raises(UserError, match=message):
        read(json.dumps(fields).encode(), Offer)


@pytest.mark.parametrize(("name", "changes", "message"), [
    ("SM+RoPE", dict(context_length=1 << 22), "with 35,184,372,088,832 scores of a head in all layers"),
    ("SM+RoPE+Win(LS,4)", dict(window_pattern="LS" * (1 << 20)), r"letters of Win\(…\) in all layers"),
    ("SM+RoPE+Mem3", dict(num_slots=1 << 24), "scores of a head in all layers"),
])  # fmt: skip
def test_a_model_that_would_take_all_memory_is_refused(name, changes, message):
    fields = json.loads(write(offer(name, learned_positions=False)))["blueprint"]
    fields["config"] |= changes
    slots = {weight: [changes["num_slots"], 2, 8] for weight in fields["weights"] if "slots" in weight}
    fields["weights"] |= slots
    with pytest.raises(UserError, match=message):
        read(json.dumps(json.loads(write(offer())) | dict(blueprint=fields)).encode(), Offer)


def test_two_parties_need_no_assistant():
    with pytest.raises(UserError, match="protocol='semi2k' has nothing to assist in"):
        read(write(Task(offer().blueprint, Setting(), 9501)), Task)


@pytest.mark.parametrize(("name", "shape", "message"), [
    ("0.qkv.kernel", (16, 49), r"has the shape \(16, 48\), not \(16, 49\)"),
    ("5.qkv.kernel", (16, 48), "has no weight '5.qkv.kernel'"),
    ("00.qkv.kernel", (16, 48), "has no weight"), ("²", (), "has no weight"), ("secret", (1,), "has no weight"),
    ("9" * 5000 + ".alpha", (1,), "has no weight"),
])  # fmt: skip
def test_a_blueprint_knows_the_weights_of_its_model(name, shape, message):
    known = offer().blueprint
    with pytest.raises(UserError, match=message):
        Blueprint(known.config, known.rewrites, {**known.weights, name: shape})


def test_what_both_parties_know_holds_no_weight():
    def leaves(value):
        if isinstance(value, dict | list):
            return [leaf for item in (value.values() if isinstance(value, dict) else value) for leaf in leaves(item)]
        return [value]

    for leaf in leaves(json.loads(write(offer("SM+LN+G")))):
        assert not isinstance(leaf, np.ndarray | jax.Array), leaf


def lying_server(line):
    """The address of one that welcomes a client and then says this line, whatever it hears."""
    door = socket.create_server(("127.0.0.1", 0))

    def run():
        with door, door.accept()[0] as connection:
            connection.sendall(b"jax_entropy\n" + line + b"\n")
            connection.recv(1 << 16)

    threading.Thread(target=run, daemon=True).start()
    return door.getsockname()


def changed_offer(**fields):
    return json.dumps(json.loads(write(offer())) | fields).encode()


@pytest.mark.parametrize(("line", "message"), [
    (b"[" * 100_000, "does not speak this protocol"),
    (changed_offer(tokenizer=5), "5 where str belongs"),
    (changed_offer(port="9501"), "'9501' where int belongs"),
    (changed_offer(port=-1), "engine cannot be at port -1"),
    (changed_offer(setting="semi2k"), "no Setting"),
    (write(offer()._replace(setting=Setting(fraction_bits=60))), "fraction_bits=60 must lie between"),
    (write(offer()._replace(setting=Setting(protocol="aby3"))), "needs an assistant"),
    (write(Refusal("no\x1b[2Jway")), r"refuses: 'no\\x1b\[2Jway'"),
])  # fmt: skip
def test_a_lying_server_ends_a_client_in_a_sentence(line, message):
    asked = lambda tokenizer, config, setting: []  # noqa: E731
    with pytest.raises(UserError, match=message) as caught:
        ask(
            lying_server(line), None, None, 4, questions=asked, reveal="logits", timeout=5, patience=0, notify=print
        )  # fmt: skip
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("text", ["", "[]", "5", '{"model": []}', "[" * 100_000, '{"model": {"vocab": {"a": "b"}}}'])
def test_a_tokenizer_that_is_none_is_refused(text):
    with pytest.raises(UserError, match="the server's tokenizer cannot be used"):
        read_tokenizer(text, tiny("SM"))


def test_a_tokenizer_with_more_entries_than_the_model_is_refused(tmp_path):
    train_tokenizer(["a few words"], 300).save(tmp_path / "tokenizer.json")
    text = (tmp_path / "tokenizer.json").read_text()
    assert read_tokenizer(text, tiny("SM", vocab_size=400)).encode("few")
    with pytest.raises(UserError, match="entries, and its model 61; they do not belong together"):
        read_tokenizer(text, tiny("SM"))
