"""Watches every step's loss: one that is not finite, or a spike, sends training back to its last good checkpoint.

What it has seen is part of a checkpoint, so that a run that was killed and started again decides alike.
"""

import math
import statistics
from collections import deque
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jax_entropy.entropy import max_entropy

_SMALLEST_SPREAD = 0.01  # of the median loss: a loss that hardly moves must not make every step a spike
_OVERFLOW = 1e4  # a logit beyond it is read as overflow on the way
_COLLAPSE = 0.25  # of the most that causal attention can have: the bottom quarter


class Anomaly(Exception):
    """A step after which training must not simply go on."""

    def __init__(self, step: int, what: str, metrics: dict[str, Any]) -> None:
        super().__init__(what)
        self.step, self.what, self.metrics = step, what, metrics


class Guard:
    """Losses of the last `config.guard.window` steps, and how often training was sent back."""

    def __init__(self, options: ConfigDict) -> None:
        self.options = options
        self.attempts = 0
        self.losses: deque[float] = deque(maxlen=options.window)

    def check(self, step: int, metrics: dict[str, Any]) -> None:
        """Takes note of a step's `loss` in nats.

        A spike lies more than `config.guard.zscore` robust standard deviations (1.4826 times the median absolute
        deviation) above the median of the window, once a quarter of it is seen.

        Raises:
          Anomaly: it is a spike, or it or the gradient not finite.
        """
        loss, norm = float(metrics["loss"]), float(metrics["gradient_norm"])
        if not (math.isfinite(loss) and math.isfinite(norm)):
            what = "loss" if not math.isfinite(loss) else "gradient"
            raise Anomaly(step, f"the {what} is not finite at step {step}", metrics)
        if self.options.zscore and 4 * len(self.losses) >= self.options.window:
            median = statistics.median(self.losses)
            spread = 1.4826 * statistics.median(abs(x - median) for x in self.losses)
            zscore = (loss - median) / max(spread, _SMALLEST_SPREAD * median)
            if zscore > self.options.zscore:
                what = f"the loss jumped from {median:.3f} to {loss:.3f} nats at step {step} (z-score {zscore:.0f})"
                raise Anomaly(step, what, metrics)
        self.losses.append(loss)

    @property
    def learning_rate_scale(self) -> float:
        """What the learning rate is multiplied by after the attempts so far."""
        return self.options.learning_rate_factor**self.attempts

    def state(self) -> dict[str, Any]:
        """JSON for a checkpoint."""
        return dict(attempts=self.attempts, losses=list(self.losses))

    def restore(self, state: dict[str, Any] | None) -> None:
        """Inverse of `state`; None is the state before the first step."""
        state = state or dict(attempts=0, losses=[])
        self.attempts = state["attempts"]
        self.losses = deque(state["losses"], maxlen=self.options.window)


def diagnose(anomaly: Anomaly, watched: dict[str, Any] | None, context_length: int) -> str:
    """Where it happened and what preceded it, for a sentence.

    Args:
      watched: the metrics of the last step that logged: `layer_entropy`, `max_logit` [L], `head_entropy` [L, N], and,
        where slots or windows change it, `maximum_causal` [L].
    """
    layers = np.flatnonzero(anomaly.metrics["not_finite"])
    where = f"first in layer {layers[0]}" if layers.size else "with every layer's attention still finite"
    if watched is None:
        return where
    entropy, largest = np.asarray(watched["layer_entropy"]), np.asarray(watched["max_logit"])
    lowest = np.unravel_index(np.argmin(watched["head_entropy"]), np.shape(watched["head_entropy"]))
    most = watched.get("maximum_causal", max_entropy(context_length, "causal"))
    reason = _reason(entropy / np.asarray(most), largest)
    return (
        f"{where}; before it the mean entropies by layer were {' '.join(f'{x:.2f}' for x in entropy)} nats "
        f"(lowest in head {lowest[1]} of layer {lowest[0]}), the largest logits "
        f"{' '.join(f'{x:.3g}' for x in largest)} "
        f"and the gradient norm {float(watched['gradient_norm']):.3g}: {reason}"
    )


def _reason(relative_entropy_L: np.ndarray, max_logit_L: np.ndarray) -> str:
    collapsed = np.flatnonzero(relative_entropy_L < _COLLAPSE)
    overflowing = np.flatnonzero(~(max_logit_L < _OVERFLOW))
    reasons = [
        f"{name} in layers {', '.join(map(str, layers))}"
        for name, layers in (("entropy collapse", collapsed), ("overflow", overflowing))
        if layers.size
    ]
    return " and ".join(reasons) or "neither entropy collapse nor overflow"
