"""Held-out text as a run read it is kept for each part of a run, whole or not at all."""

import numpy as np
import pytest

from jax_entropy.runs.reading import Reading, read_text


def reading(step, temperature=True):
    rng = np.random.default_rng(step)
    t_LxNxT = rng.random((3, 2, 5), np.float32) if temperature else None
    return Reading(
        rng.integers(0, 99, (2, 6)), rng.random((2, 5), np.float32), rng.random((3, 2, 2, 5), np.float32), t_LxNxT, step
    )


@pytest.mark.parametrize("temperature", [True, False])
def test_what_is_kept_comes_back(tmp_path, temperature):
    reading(70, temperature).save(tmp_path / "text", 100)
    (back,) = read_text(tmp_path / "text")
    assert back.step == 70 and (back.temperature is not None) == temperature
    for kept, saved in zip(back[:3], reading(70, temperature)[:3], strict=True):
        np.testing.assert_array_equal(kept, saved)


def test_the_newest_of_each_eighth_of_a_run_and_that_of_the_last_step_are_kept(tmp_path):
    for step in range(10, 401, 10):
        reading(step).save(tmp_path, 400)
    assert [kept.step for kept in read_text(tmp_path)] == [40, 90, 140, 190, 240, 290, 340, 390, 400]


def test_a_file_that_is_not_whole_is_left_out(tmp_path):
    reading(40).save(tmp_path, 100)
    reading(100).save(tmp_path, 100)
    whole = (tmp_path / "3.npz").read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"text"):
        (tmp_path / "3.npz").write_bytes(damaged)
        assert [kept.step for kept in read_text(tmp_path)] == [100]
    assert read_text(tmp_path / "nowhere") == []
