"""Rates and shares of a run's steps."""

import math
import time

import jax
import pytest

from jax_entropy.bench.monitoring import bench_monitoring
from jax_entropy.chips import peak_flops
from jax_entropy.training import clock as clock_module
from jax_entropy.training.clock import StepClock, duration
from tests.tiny_config import get_config


def test_rates_leave_out_what_is_not_training():
    clock = StepClock(num_steps=100, tokens=1000, token_flops=1e6)
    for _ in range(4):
        with clock.spending("data_wait"):
            time.sleep(0.02)
        time.sleep(0.02)
        with clock.paused():
            time.sleep(0.2)
        clock.tick()
    reading = clock.read()
    seconds = 4000 / reading["tokens_per_second"]
    assert 0.16 <= seconds < 0.16 + 0.2  # a single pause in it would be too much
    performance = reading["performance"]
    assert 0.04 <= performance["step_seconds_median"] <= performance["step_seconds_p95"]
    assert performance["data_wait"] == pytest.approx(0.08 / seconds, rel=0.5)
    assert performance["monitoring"] == 0
    assert performance["memory_bytes"] > 1e8
    assert "mfu" not in performance  # no rate of this CPU is published here


def test_a_step_that_compiles_is_not_timed():
    clock = StepClock(num_steps=100, tokens=1000, token_flops=1e6)
    jax.jit(lambda x: x * 2.3451)(3.0)
    with clock.spending("data_wait"):
        time.sleep(0.02)
    clock.tick()
    line = dict(loss=2.0, perplexity=7.4, head_entropy=[1.0], collapse=0.0, overload=0.0)
    assert math.isnan(clock.read()["tokens_per_second"]) and clock.line(1, line).endswith("overload 0%")
    time.sleep(0.05)
    with clock.paused():
        jax.jit(lambda x: x * 3.2451)(3.0)  # an evaluation's
    clock.tick()
    reading = clock.read()
    assert 1000 / reading["tokens_per_second"] == pytest.approx(0.05, rel=0.5)
    assert reading["performance"]["data_wait"] == 0
    assert clock.line(2, line).endswith(f" tokens/s · {duration(98 * 1000 / clock.rate)} left")


def test_times_are_rounded_before_they_are_split():
    said = [duration(seconds) for seconds in (0, 59.4, 59.6, 125, 3599.6, 43325)]
    assert said == ["0:00", "0:59", "1:00", "2:05", "1:00:00", "12:02:05"]


def test_mfu_is_the_share_of_all_devices_rate(monkeypatch):
    monkeypatch.setattr(clock_module, "peak_flops", lambda kind: 2e9)
    clock = StepClock(num_steps=100, tokens=1000, token_flops=1e6)
    clock.tick()
    reading = clock.read()
    assert reading["performance"]["mfu"] == pytest.approx(
        reading["tokens_per_second"] * 1e6 / (2e9 * jax.device_count())
    )


@pytest.mark.parametrize(
    ("kind", "flops"),
    [("TPU v5 lite", 197e12), ("TPU v5p", 459e12), ("TPU v5", 459e12), ("TPU v6 lite", 918e12),
     ("NVIDIA H100 80GB HBM3", 989e12), ("cpu", None), ("TPU v99", None)],
)  # fmt: skip
def test_rates_are_known_by_the_name_that_jax_gives(kind, flops):
    assert peak_flops(kind) == flops


def test_compilations_are_counted():
    clock = StepClock(num_steps=100, tokens=1, token_flops=1)
    before = clock.read()["performance"]["compilations"]
    jax.jit(lambda x: x * 1.2345)(3.0)
    assert clock.read()["performance"]["compilations"] == before + 1


def test_the_benchmark_of_monitoring_adds_up(tmp_path):
    config = get_config()
    config.data.directory = str(tmp_path)
    row = bench_monitoring(config, rounds=3)
    assert 0 < row["host, share"] < 1 and row["step, ms"] > 0
    extra = (row["watched, ms"] - row["step, ms"]) / row["step, ms"] / config.train.log_every
    assert row["monitoring, share"] == pytest.approx(row["host, share"] + extra)
