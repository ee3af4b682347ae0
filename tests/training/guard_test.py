"""The guard: what it takes for a spike, what it says, and runs that it sends back."""

import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from jax_entropy.data import prepare, train_iterator
from jax_entropy.errors import UserError
from jax_entropy.runs.status import describe
from jax_entropy.state import make_train_step
from jax_entropy.training.guard import Anomaly, Guard, diagnose
from jax_entropy.training.train import train
from tests.run_helpers import lines

OPTIONS = ConfigDict(dict(limit=3, zscore=20.0, window=64, learning_rate_factor=0.5))


def metrics(loss, norm=1.0, not_finite=(0, 0)):
    return dict(loss=loss, gradient_norm=norm, not_finite=np.array(not_finite))


def seen(losses, options=OPTIONS):
    guard = Guard(options)
    for step, loss in enumerate(losses, 1):
        guard.check(step, metrics(loss))
    return guard


@pytest.mark.parametrize("bad", [metrics(np.nan), metrics(np.inf), metrics(1.0, norm=np.nan)])
def test_what_is_not_finite_is_an_anomaly_from_the_first_step(bad):
    with pytest.raises(Anomaly, match="not finite at step 1"):
        Guard(OPTIONS).check(1, bad)


def test_a_falling_noisy_loss_is_no_spike_and_a_jump_is():
    rng = np.random.default_rng(0)
    losses = 3 + 6 * np.exp(-np.arange(500) / 60) + 0.15 * rng.standard_normal(500)
    guard = seen(losses)
    guard.check(501, metrics(3.9))
    with pytest.raises(Anomaly, match=r"the loss jumped from 3\.0\d\d to 8\.000 nats at step 502"):
        guard.check(502, metrics(8.0))
    guard.check(502, metrics(3.0))  # the spike is no part of the window


def test_spikes_need_a_history_and_can_be_left_alone():
    seen([1.0] * 15 + [100.0])
    with pytest.raises(Anomaly):
        seen([1.0] * 16 + [100.0])
    seen([1.0] * 64 + [100.0], ConfigDict(OPTIONS.to_dict() | dict(zscore=0.0)))
    seen([1.0] * 64 + [1.1])  # the spread of a constant loss is not 0


def test_state_goes_through_json_and_decides_alike():
    guard = seen(np.random.default_rng(1).uniform(2, 3, 100))
    guard.attempts = 2
    other = Guard(OPTIONS)
    other.restore(json.loads(json.dumps(guard.state())))
    assert other.losses == guard.losses and other.learning_rate_scale == 0.25
    other.restore(None)
    assert not other.losses and other.attempts == 0


@pytest.mark.parametrize(
    "entropy, logits, reason",
    [
        ([3.0, 0.1, 0.05], [5.0, 9.0, 80.0], "entropy collapse in layers 1, 2"),
        ([3.0, 2.0, 2.5], [5.0, 9.0, 1e7], "overflow in layers 2"),
        ([3.0, 0.1, 2.5], [np.inf, 9.0, 1.0], "entropy collapse in layers 1 and overflow in layers 0"),
        ([3.0, 2.0, 2.5], [5.0, 9.0, 8.0], "neither entropy collapse nor overflow"),
    ],
)
def test_the_diagnosis_names_layers_heads_and_the_reason(entropy, logits, reason):
    watched = dict(
        layer_entropy=np.array(entropy), max_logit=np.array(logits), gradient_norm=7.25,
        head_entropy=np.array([[3.0, 2.0], [1.0, 0.02], [1.5, 2.0]]),
    )  # fmt: skip
    said = diagnose(Anomaly(5, "", metrics(np.nan, not_finite=(0, 3, 1))), watched, 128)
    assert "first in layer 1" in said and "lowest in head 1 of layer 1" in said and "7.25" in said
    assert said.endswith(reason)
    # a layer is judged by what its rows see
    windowed = watched | dict(maximum_causal=[3.9, 0.02, 1.3])
    assert "collapse in layers 1" not in diagnose(Anomaly(5, "", metrics(np.nan, not_finite=(0, 3, 1))), windowed, 128)


def poisoned(batches):
    """`make_train_step` with a loss and gradients that are not finite on some batches, known by their content."""

    def make(config, model):
        real = make_train_step(config, model)

        def train_step(state, tokens, watch):
            bad = jnp.any(jnp.all(tokens[None] == jnp.asarray(batches), axis=(1, 2)))
            new, metrics = real(state, tokens, watch)
            params, loss = jax.tree.map(lambda x: jnp.where(bad, jnp.nan, x), (new.params, metrics["loss"]))
            return new._replace(params=params), metrics | {"loss": loss}

        return train_step

    return make


@pytest.fixture
def batches(tiny):
    """The first batches that the tiny run reads."""
    config = tiny("EReg(SM(t)+ScFuFFN)")
    corpus = prepare(config.data, config.model.context_length)
    iterator = train_iterator(
        corpus, batch_size=config.train.batch_size, seed=config.seed, process_index=0, process_count=1, num_threads=1,
        prefetch=1,
    )  # fmt: skip
    return [next(iterator)["tokens"] for _ in range(40)]


def test_the_guard_goes_back_and_leaves_the_bad_data_out(tiny, tmp_path, monkeypatch, batches):
    config = tiny("EReg(SM(t)+ScFuFFN)")
    made, make = [], poisoned([batches[8], batches[22]])
    monkeypatch.setattr("jax_entropy.state.make_train_step", lambda *of: made.append(of) or make(*of))
    said = []
    result = train(config, str(tmp_path / "run"), notify=said.append)
    assert result.step == 24 and all(np.isfinite(x).all() for x in jax.tree.leaves(result.variables))
    incidents = [json.loads(line) for line in (tmp_path / "run" / "guard.jsonl").read_text().splitlines()]
    # batch 8 (from 0) is that of step 9; back to step 6, and one batch more was read before the loss was seen
    assert [(i["step"], i["back_to"], i["attempt"]) for i in incidents] == [(9, 6, 1), (19, 18, 2)]
    assert np.shape(incidents[0]["before"]["head_entropy"]) == (2, 2)
    assert incidents[0]["before"]["gradient_norms"] and incidents[0]["before"]["max_logit"]
    assert any("back to step 6, without the data of steps 7 to 10" in line for line in said)
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 4, 8, 12, 16, 20, 24]
    assert len(made) == 1  # at one learning rate, what is compiled serves again


def test_the_guard_stops_at_its_limit_and_says_why(tiny, tmp_path, monkeypatch, batches):
    config = tiny("EReg(SM(t)+ScFuFFN)", **{"guard.limit": 1})
    monkeypatch.setattr("jax_entropy.state.make_train_step", poisoned(batches[8:14]))
    with pytest.raises(UserError, match="sent back 1 times; the checkpoint of step 6 is kept"):
        train(config, str(tmp_path / "run"), notify=lambda line: None)
    assert "diverged at step 8 of 24" in describe(tmp_path / "run") and "sent back" in describe(tmp_path / "run")


@pytest.mark.slow
def test_a_guarded_run_that_is_stopped_goes_on_alike(tiny, tmp_path, monkeypatch, batches):
    config = tiny("EReg(SM(t)+ScFuFFN)", **{"guard.learning_rate_factor": 0.5})
    monkeypatch.setattr("jax_entropy.state.make_train_step", poisoned([batches[8]]))
    unbroken = train(config, str(tmp_path / "unbroken"), notify=lambda line: None)

    def stop_at_16(line):
        if line.startswith("step 16/24"):
            os.kill(os.getpid(), signal.SIGTERM)

    assert train(config, str(tmp_path / "run"), notify=stop_at_16).step < 24
    again = train(config, str(tmp_path / "run"), notify=lambda line: None)
    assert again.start > 9 and again.step == 24
    jax.tree.map(np.testing.assert_array_equal, again.variables, unbroken.variables)
