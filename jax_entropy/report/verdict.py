"""A run's verdict in words: what its heads, its losses and the guard say, and what to try."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from jax_entropy.entropy import extreme_heads
from jax_entropy.report.history import History
from jax_entropy.runs.workdir import RUNNING

GOOD, LOOK, TROUBLE = "good", "look", "trouble"
LARGE_LOGIT = 100.0  # Kimi K2's limit for QK-clip: no loss spike was seen below it
MANY = 0.1  # the paper's well-behaved models have about 90 % of their heads in the middle quarters


class Verdict(NamedTuple):
    """How a run is: good, worth a look, or in trouble; sentences of what was seen, and of what to try."""

    level: str
    seen: list[str]
    advice: list[str]


class _Finding(NamedTuple):
    level: str
    seen: str
    advice: str = ""


def verdict(history: History) -> Verdict:
    """Judges the newest entropies, of held-out text where there was an evaluation, against the causal maximum."""
    findings = [*_state(history), *_finite(history), *_heads(history), *_incidents(history), *_logits(history),
                *_losses(history)]  # fmt: skip
    level = max((finding.level for finding in findings), key=(GOOD, LOOK, TROUBLE).index)
    advice = dict.fromkeys(finding.advice for finding in findings if finding.advice)
    return Verdict(level, [finding.seen for finding in findings], list(advice))


def newest_entropy(history: History) -> tuple[np.ndarray, str]:
    """Head entropies [L, N] of the last evaluation, else of the last training batch that was logged; and of which."""
    if "head_entropy" in history.evaluate:
        return history.evaluate["head_entropy"][-1], "held-out text"
    return history.train["head_entropy"][-1], "a training batch"


def _state(history: History) -> Iterator[_Finding]:
    status = history.status
    if status and status.state == "failed":
        yield _Finding(TROUBLE, f"The run failed at step {status.step:,}: {status.reason}.".replace("..", "."))
    elif history.died:
        yield _Finding(
            LOOK, f"The run died at step {status.step:,} of {status.num_steps:,}, or trains on another machine.",
            "The same train command goes on with it.",
        )  # fmt: skip
    elif status and status.state in RUNNING:
        yield _Finding(GOOD, f"The run has reached step {history.steps_E[-1]:,} of {status.num_steps:,}.")
    elif status and status.state == "stopped":
        yield _Finding(
            LOOK, f"The run was stopped at step {status.step:,} of {status.num_steps:,}.",
            "The same train command goes on with it.",
        )  # fmt: skip


def _finite(history: History) -> Iterator[_Finding]:
    lost_ExL = history.train["nan_count"] + history.train["inf_count"]
    lost = np.argwhere(np.nan_to_num(lost_ExL, nan=1) > 0)
    if lost.size:
        layers = these("layer", sorted({int(layer) for _, layer in lost}))
        rate = (history.config.get("optimizer") or {}).get("learning_rate")
        lower = f"a learning rate below {rate:g}" if isinstance(rate, float) else "a lower learning rate"
        yield _Finding(
            TROUBLE, f"Attention stopped being finite in {layers}, first at step {history.steps_E[lost[0, 0]]:,}.",
            f"Try {lower}, or a normalisation (+LN in the architecture).",
        )  # fmt: skip


def _nats(of_layers_L: np.ndarray) -> str:
    ends = dict.fromkeys(f"{end:.2f}" for end in (of_layers_L.min(), of_layers_L.max()))
    return f"{' to '.join(ends)} nats{' by layer' if len(ends) > 1 else ''}"


def _heads(history: History) -> Iterator[_Finding]:
    entropy_LxN, where = newest_entropy(history)
    total, most_L = entropy_LxN.size, history.layer_maxima("causal")
    overloaded_LxN, collapsed_LxN = extreme_heads(entropy_LxN, most_L[:, None])
    regular = history.architecture.startswith("EReg")
    weight = (history.config.get("penalty") or {}).get("weight")
    for found_LxN, what, bound, advice in (
        (
            overloaded_LxN,
            "overloaded",
            f"above ¾ of the causal maximum, {_nats(0.75 * most_L)},",
            _against_overload(regular, weight),
        ),
        (
            collapsed_LxN,
            "collapsed",
            f"below ¼ of the causal maximum, {_nats(0.25 * most_L)},",
            _against_collapse(regular),
        ),
    ):
        if count := int(found_LxN.sum()):
            layers = these("layer", np.flatnonzero(found_LxN.any(axis=1)).tolist())
            level = LOOK if count > MANY * total else GOOD
            seen = f"{count} of {total} heads {'is' if count == 1 else 'are'} {what} ({bound} on {where}), {layers}."
            yield _Finding(level, seen, advice if level == LOOK else "")
    if not (overloaded_LxN.any() or collapsed_LxN.any()) and np.isfinite(entropy_LxN).all():
        yield _Finding(GOOD, f"None of {total} heads is overloaded or collapsed on {where}.")


def _against_overload(regular: bool, weight: float | None) -> str:
    if not regular:
        return "Try the penalty against overload: EReg(…) around the architecture."
    more = f" than {weight:g}" if isinstance(weight, float) else ""
    return f"Against overload try a larger config.penalty.weight{more}, or a longer run: heads specialise late."


def _against_collapse(regular: bool) -> str:
    if not regular:
        return "Against collapse try EReg(…) around the architecture, or a lower learning rate."
    return "Against collapse try a lower learning rate, or a larger config.penalty.threshold_init."


def _incidents(history: History) -> Iterator[_Finding]:
    if history.incidents:
        steps = [incident["step"] for incident in history.incidents]
        times = {1: "once", 2: "twice"}.get(len(steps), f"{len(steps)} times")
        at = these("step", steps)
        yield _Finding(
            LOOK, f"The guard sent training back {times}, at {at}.",
            "Before it happened is where to look: entropies that sink, logits that grow.",
        )  # fmt: skip


def _logits(history: History) -> Iterator[_Finding]:
    largest_ExL = history.train.get("max_logit")
    if largest_ExL is None or not np.isfinite(largest_ExL[-1]).any():
        return
    layer = int(np.nanargmax(largest_ExL[-1]))
    if largest_ExL[-1, layer] > LARGE_LOGIT:
        yield _Finding(
            LOOK, f"The largest attention logit is {largest_ExL[-1, layer]:,.4g}, in layer {layer}.",
            f"Logits beyond {LARGE_LOGIT:g} come before spikes: try config.optimizer.qk_clip={LARGE_LOGIT:g}.",
        )  # fmt: skip


def _losses(history: History) -> Iterator[_Finding]:
    loss_E = history.evaluate.get("validation_loss")
    if loss_E is None or not np.isfinite(loss_E).any():
        return
    best = int(np.nanargmin(loss_E))
    if loss_E[-1] <= loss_E[best] + 0.01:
        yield _Finding(GOOD, f"Held-out perplexity is {math.exp(min(loss_E[-1], 700)):.4g}.")
        return
    step = int(history.evaluate["step"][best])
    yield _Finding(
        LOOK, f"Held-out text was predicted best at step {step:,} and has become worse since.",
        "Evaluate and generate with --best; stop earlier, or train on more text.",
    )  # fmt: skip


def these(name: str, numbers: list[int], most: int = 6) -> str:
    """ "layer 3", "layers 0 and 1", "steps 5, 9 and 12", "layers 0, 1, …, 11"."""
    texts = [f"{number:,}" for number in numbers]
    if len(texts) == 1:
        return f"{name} {texts[0]}"
    if numbers == list(range(numbers[0], numbers[-1] + 1)) and len(numbers) > 2:
        return f"{name}s {texts[0]} to {texts[-1]}"
    if len(texts) > most:
        texts = [*texts[: most - 2], "…", texts[-1]]
        return f"{name}s {', '.join(texts)}"
    return f"{name}s {', '.join(texts[:-1])} and {texts[-1]}"
