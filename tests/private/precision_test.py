"""What fraction bits and the form of the exponential leave of a run's logits, on its held-out text."""

import json

import numpy as np
import pytest
from rich.console import Console

from jax_entropy.commands.main import main
from jax_entropy.commands.private_tables import print_precision
from jax_entropy.private.cost import precision
from jax_entropy.private.cost.precision import (
    Precision,
    cheapest,
    held_out_tokens,
    measure_by_layer,
    measure_precision,
)
from jax_entropy.private.engine.engine import Account, Setting
from jax_entropy.private.program.export import export
from jax_entropy.private.program.fixed_point import lowest_exponents
from jax_entropy.runs.load import load_run
from tests.tiny_model import changed, scattered, tiny


def row(sent: int, error: float, agreement: float = 1.0) -> Precision:
    return Precision(Setting(), Account(1.0, (sent, sent), (1, 1), 1), error, error, agreement, "")


def test_the_cheapest_is_the_smallest_of_those_that_are_good_enough():
    rows = [row(10, 0.5), row(20, 0.004), row(15, 0.004, agreement=0.9), row(30, 0.001)]
    assert cheapest(rows, 0.01, largest_logit=1.0) is rows[1]
    assert cheapest(rows, 0.002, largest_logit=1.0) is rows[3]
    assert cheapest(rows, 0.0045, largest_logit=1.0) is rows[3]  # another run may be worse by a tenth
    assert cheapest(rows, 0.0001, largest_logit=1.0) is None


def test_closer_exponentials_are_dearer_but_for_the_default(engine):
    """Scores of some units, so that the exponential's error is what shows."""
    config = tiny("SM+ScFuFFN", vocab_size=13)
    sharp = changed(scattered(config), "params/blocks/attention/query/kernel", lambda x: x * 8)
    rows, largest = measure_precision(
        engine(Setting()), export(config, sharp), [3, 12, 0, 7, 1, 1, 8, 2], lambda line: None
    )
    by_name = {(r.setting.fraction_bits, r.setting.exponent, r.setting.squarings): r for r in rows}
    few, many, pade = by_name[18, "taylor", 8], by_name[22, "taylor", 10], rows[-1]
    assert few.mean_error > many.mean_error > pade.mean_error > 0
    assert few.account.bytes[0] < many.account.bytes[0] < pade.account.bytes[0]
    default = by_name[18, "quadratic", 6]
    assert default.setting == Setting(exponent_iterations=6)
    assert default.mean_error < by_name[18, "taylor", 10].mean_error
    assert default.account.bytes[0] < many.account.bytes[0] and default.account.rounds < few.account.rounds
    assert pade.largest_error < 0.001 * largest


def test_squarings_are_chosen_layer_by_layer(engine):
    """The first layer's scores are sharp: it keeps the squarings that the second does without."""
    config, tokens = tiny("SM+ScFuFFN", vocab_size=13), [3, 12, 0, 7, 1, 1, 8, 2]
    lowest = lowest_exponents(export(config, scattered(config)), tokens)
    scale = np.array([30 / -lowest[0], 0.1])[:, None, None, None]
    sharp = changed(scattered(config), "params/blocks/attention/query/kernel", lambda x: x * scale)
    rows, largest = measure_by_layer(engine(Setting()), export(config, sharp), tokens, 0.02, lambda line: None)
    default, best = rows[0], cheapest(rows, 0.02, largest)
    first, second = best.setting.layer_iterations
    assert default.setting == Setting(exponent_iterations=6) and first > second
    assert best.account.bytes[0] < default.account.bytes[0] and best.account.rounds < default.account.rounds
    assert best.largest_error <= 0.02 * largest


def test_what_leaves_the_range_is_a_row_that_says_so(engine, capsys):
    config = tiny("SM+ScFuFFN", vocab_size=13)
    large = changed(scattered(config), "params/token_embedding", lambda x: x * 3e5)
    rows, largest = measure_precision(engine(Setting()), export(config, large), [3, 12, 0, 7], lambda line: None)
    assert {r.setting.fraction_bits for r in rows if r.refused} >= {22}
    print_precision(rows, largest, 0.01, Console())
    assert "refused: " in capsys.readouterr().out


def test_a_run_is_read_on_its_own_held_out_text(installed, workdir, tmp_path, capsys, monkeypatch):
    few = ((18, "quadratic", 6), (18, "pade", 0))
    monkeypatch.setattr(precision, "SETTINGS", few)
    loaded = load_run(workdir, print)
    tokens = held_out_tokens(loaded, 16, print)
    assert len(tokens) == 16 and np.unique(tokens).size > 2
    assert main(["private", "precision", f"--workdir={workdir}", "--context_length=8", "--tolerance=0.5",
                 f"--json={tmp_path / 'rows.json'}"]) == 0  # fmt: skip
    table = capsys.readouterr().out
    assert "cheapest with the same tokens" in table and "pade" in table
    assert len(json.loads((tmp_path / "rows.json").read_text())["rows"]) == len(few)


@pytest.mark.parametrize(("arguments", "message"), [
    (["--tolerance=0"], "--tolerance=0.0 must be positive"), (["--protocol=semi"], "did you mean 'semi2k'?"),
    (["--json=/nowhere/x"], "there is no folder /nowhere"),
])  # fmt: skip
def test_mistakes_are_said(installed, arguments, message, capsys):
    assert main(["private", "precision", "--workdir=nowhere", *arguments]) == 2
    assert message in capsys.readouterr().err
