"""One page a run: its key numbers, its figures and its configuration in a single file that needs nothing else.

`page.html` is its frame; every text that is put there is escaped: a name, a path or a value is shown, never obeyed.
"""

import base64
import json
import math
import string
import time
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jax_entropy.entropy import head_bands
from jax_entropy.report.figures import Item
from jax_entropy.report.history import History

_FRAME = string.Template(Path(__file__).with_name("page.html").read_text("utf-8"))


class Number(NamedTuple):
    """One of a run's key numbers, as text; `unit` also says of what."""

    label: str
    value: str
    unit: str = ""


def page(history: History, pictures: list[tuple[Item, bytes]]) -> str:
    """The page as text.

    Args:
      pictures: items of the report and their PNGs, in the order of the page.
    """
    return _FRAME.substitute(
        title=escape(f"{history.architecture} · {history.name}"),
        heading=escape(history.architecture),
        subtitle=escape(" · ".join(_sizes(history))),
        facts="\n".join(f"<dt>{name}</dt><dd>{escape(fact)}</dd>" for name, fact in _facts(history)),
        numbers="\n".join(map(_number, _key_numbers(history))),
        incidents=_incidents(history),
        figures="\n".join(_figure(item, png) for item, png in pictures),
        config=escape(json.dumps(history.config, indent=2, ensure_ascii=False)),
    )


def _sizes(history: History) -> list[str]:
    model = history.config["model"]
    units = dict(num_layers="layers", num_heads="heads", model_dim="wide", context_length="tokens of context")
    return [history.dataset, *(f"{model[key]} {unit}" for key, unit in units.items() if key in model)]


def _facts(history: History) -> Iterator[tuple[str, str]]:
    """Where the run lies, how far it came, when, for how long, on what and with which versions."""
    yield "workdir", str(history.workdir.path)
    status = history.status
    if status is None:
        yield "state", f"step {history.steps_E[-1]:,}"
        return
    state = f"{status.state} at step {status.step:,} of {status.num_steps:,}"
    yield "state", f"{state}: {status.reason}" if status.reason else state
    yield "date", time.strftime("%d %B %Y, %H:%M UTC", time.gmtime(status.time))
    if status.seconds:
        yield "duration", _duration(status.seconds)
    if status.devices:
        yield "devices", status.devices
    if status.versions:
        yield "versions", ", ".join(f"{name} {version}" for name, version in status.versions.items())


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def _number(number: Number) -> str:
    unit = f" <small>{escape(number.unit)}</small>" if number.unit else ""
    return f"<div><dt>{escape(number.label)}</dt><dd>{escape(number.value)}{unit}</dd></div>"


def _incidents(history: History) -> str:
    if not history.incidents:
        return ""
    items = "\n".join(
        f"<li>step {incident['step']:,}, back to step {incident.get('back_to', 0):,}: "
        f"{escape(str(incident.get('what', 'no reason is noted')))}</li>"
        for incident in history.incidents
    )
    return (
        '<section class="incidents">\n<h2>The guard sent training back</h2>\n'
        "<p>Marked ▼ in the figures; the data that led there is left out.</p>\n"
        f"<ol>\n{items}\n</ol>\n</section>"
    )


def _figure(item: Item, png: bytes) -> str:
    # CSS pixels that give the letters of all figures one size, the widest figure filling the page
    width = round(0.66 * int.from_bytes(png[16:20], "big"))
    return (
        f'<figure><div tabindex="0"><img alt="{item.name.replace("_", " ")}" width="{width}" '
        f'src="data:image/png;base64,{base64.b64encode(png).decode()}"></div>'
        f"<figcaption>{escape(item.caption)}</figcaption></figure>"
    )


def _key_numbers(history: History) -> Iterator[Number]:
    """What one looks for first; at the last step unless it says otherwise."""
    train, evaluate = history.train, history.evaluate
    if "validation_loss" in evaluate:
        loss_E = evaluate["validation_loss"]
        yield Number("validation perplexity", _perplexity(loss_E[-1]))
        yield Number("validation loss", _text(loss_E[-1], ".3f"), "nats/token")
        if np.isfinite(loss_E).any() and np.nanmin(loss_E) < loss_E[-1]:
            best = int(np.nanargmin(loss_E))
            step = f"at step {int(evaluate['step'][best]):,}"
            yield Number("best validation perplexity", _perplexity(loss_E[best]), step)
    if "bits_per_byte" in evaluate:
        yield Number("bits per byte", _text(evaluate["bits_per_byte"][-1], ".3f"), "held out")
    yield Number("training cross-entropy", _text(train["cross_entropy"][-1], ".3f"), "nats/token")
    yield from _entropies(history)
    if "tokens_per_second" in train:
        yield Number("speed, median", _text(np.nanmedian(train["tokens_per_second"]), ",.0f"), "tokens/s")
    if history.private:
        warm, setting = history.private["total"]["warm"], history.private["setting"]
        megabytes = _text(max(warm["bytes"]) / 1e6, ",.1f")
        facts = f"MB, {warm['rounds']:,} rounds, {history.private['num_tokens']} tokens, {setting['protocol']}"
        yield Number("private forward pass", megabytes, facts)
    lost = int(np.nansum(train["nan_count"]) + np.nansum(train["inf_count"]))
    yield Number("NaN and Inf in attention", f"{lost:,}" if lost else "none")


def _entropies(history: History) -> Iterator[Number]:
    """Mean entropy and quarter shares of the heads: on held-out text, and in the last training batch logged."""
    measured = []
    if "head_entropy" in history.evaluate:
        held_out_LxN = history.evaluate["head_entropy"][-1]
        measured.append(("held out", held_out_LxN, np.asarray(head_bands(held_out_LxN))))
    measured.append(("training batch", history.train["head_entropy"][-1], history.train["bands_observed"][-1]))
    most = history.maxima()["context"] or math.nan
    for where, entropy_LxN, share_4 in measured:
        entropy = entropy_LxN.mean()
        share = f", {100 * entropy / most:.0f} % of log T" if math.isfinite(entropy / most) else ""
        yield Number(f"mean head entropy, {where}", _text(entropy, ".2f"), f"nats{share}")
        yield Number(f"collapse, {where}", _text(100 * share_4[0], "z.1f"), "% of heads in the bottom quarter")
        yield Number(f"overload, {where}", _text(100 * share_4[3], "z.1f"), "% of heads in the top quarter")


def _perplexity(loss: float) -> str:
    return _text(math.exp(min(loss, 700)), ".4g")


def _text(value: float, digits: str) -> str:
    return f"{value:{digits}}" if math.isfinite(value) else "not a number"
