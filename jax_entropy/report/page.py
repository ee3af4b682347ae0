"""One page of one or several runs, in a single file that needs nothing else and asks for nothing.

Words are written here, run by run, every one of them escaped: a name, a path or a value is shown, never obeyed.
Pictures are drawn by the files in `browser/` from the page's block of numbers.
"""

import json
import math
import string
import time
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jax_entropy.census import Census, census
from jax_entropy.entropy import head_bands
from jax_entropy.report.costs import model_of, private_cost, terms
from jax_entropy.report.history import BATCH, History, printable
from jax_entropy.report.payload import payload
from jax_entropy.report.verdict import Verdict, verdict

_BROWSER = Path(__file__).with_name("browser")
# In the order in which they use each other.
_SCRIPTS = ("block", "draw", "chart", "grid", "panels", "words", "runs", "frontier", "page")
_LEVELS = dict(good="✓ well", look="▲ look", trouble="■ trouble")


class Number(NamedTuple):
    """One of a run's key numbers, as text; `unit` also says of what."""

    label: str
    value: str
    unit: str = ""


def page(
    histories: Sequence[History],
    *,
    verdicts: Sequence[Verdict] | None = None,
    sweep: dict[str, Any] | None = None,
    follow: bool = False,
) -> str:
    """The page as text.

    Args:
      verdicts: on each of them, where they are not those of `verdict`.
      sweep: a sweep's points, of which the page shows the frontier.
      follow: ask the server that the page came from for news of the run; else the page may ask nobody for anything.
    """
    first, verdicts = histories[0], verdicts or [*map(verdict, histories)]
    title = f"{first.architecture} · {first.name}" + (f" and {len(histories) - 1} more" if len(histories) > 1 else "")
    return _frame(
        title=escape(title),
        follow="yes" if follow else "no",
        connect="'self'" if follow else "'none'",
        heads="\n".join(_head(i, *one) for i, one in enumerate(zip(histories, verdicts, strict=True))),
        abouts="\n".join(_about(i, history) for i, history in enumerate(histories)),
        data=payload(histories, sweep),
    )


def waiting(name: str, reason: str) -> str:
    """The page of a run that has logged nothing yet; it looks again by itself."""
    words = f"<header><h1>{escape(printable(name))}</h1><p>{escape(printable(reason))}</p></header>"
    return _frame(title=escape(printable(name)), follow="yes", connect="'self'", heads=words, abouts="", data="")


def _frame(**places: str) -> str:
    text = {name: (_BROWSER / name).read_text("utf-8") for name in ("page.html", "page.css")}
    script = "\n".join((_BROWSER / f"{name}.js").read_text("utf-8") for name in _SCRIPTS)
    return string.Template(text["page.html"]).substitute(places, style=text["page.css"], script=script)


def _head(index: int, history: History, found: Verdict) -> str:
    """What a run is, how it is and its key numbers; of several runs, the page shows one at a time."""
    advice = "".join(f"<li>{_sentence(line)}</li>" for line in found.advice)
    return f"""<article data-run="{index}"{" hidden" if index else ""}>
<header>
<p class="eyebrow">{escape(history.name)}</p>
<h1>{escape(history.architecture)}</h1>
<p class="sizes">{escape(" · ".join(_sizes(history)))}</p>
</header>
<section class="verdict {found.level}" aria-label="verdict">
<p><strong>{_LEVELS[found.level]}</strong> {" ".join(map(_sentence, found.seen))}</p>
{f"<ul>{advice}</ul>" if advice else ""}
</section>
<dl class="key">
{"".join(map(_number, _key_numbers(history)))}
</dl>
</article>"""


def _about(index: int, history: History) -> str:
    """What the guard did, samples, where and how the run was made, its census and its configuration."""
    model = model_of(history)
    counted = census(model) if model else None
    facts = "".join(f"<dt>{name}</dt><dd>{_fact(name, fact)}</dd>" for name, fact in _facts(history, counted))
    config = json.dumps(history.config, indent=2, ensure_ascii=False)
    what = "run" if history.read == BATCH else "model"
    return f"""<article class="about" data-run="{index}"{" hidden" if index else ""}>
{_incidents(history)}
<details open><summary>The {what}</summary><dl class="facts">{facts}</dl></details>
{_samples(history)}
{_census(counted)}
<details><summary>Configuration</summary><pre>{escape(printable(config, chr(10)))}</pre></details>
</article>"""


def _sentence(text: str) -> str:
    return escape(printable(text))


def _sizes(history: History) -> list[str]:
    model = history.config["model"]
    units = dict(num_layers="layers", num_heads="heads", model_dim="wide", context_length="tokens of context")
    return [history.dataset, *(f"{model[key]} {unit}" for key, unit in units.items() if key in model)]


def _facts(history: History, counted: Census | None) -> Iterator[tuple[str, str]]:
    """Where the run lies, how far it came, when, for how long, on what and with which versions."""
    yield "workdir" if history.read == BATCH else "folder", str(history.workdir.path)
    if counted:
        yield "parameters", f"{counted.parameters:,}"
    status = history.status
    if history.read != BATCH:
        return
    if status is None:
        yield "state", f"step {history.steps_E[-1]:,}"
        return
    state = f"{'died' if history.died else status.state} at step {status.step:,} of {status.num_steps:,}"
    yield "state", f"{state}: {status.reason}" if status.reason else state
    yield "date", time.strftime("%d %B %Y, %H:%M UTC", time.gmtime(status.time))
    if status.seconds:
        yield "duration", _duration(status.seconds)
    if status.devices:
        yield "devices", status.devices
    if status.command:
        yield "command", status.command
    if status.versions:
        yield "versions", ", ".join(f"{name} {version}" for name, version in status.versions.items())


def _fact(name: str, fact: str) -> str:
    if name != "command":
        return _sentence(fact)
    return f"<code>{' '.join(f'<span>{_sentence(word)}</span>' for word in fact.split(' '))}</code>"


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
    items = "".join(
        f"<li><b>step {incident['step']:,}, back to step {incident.get('back_to', 0):,}</b> "
        f"{_sentence(str(incident.get('what', 'no reason is noted')))}</li>"
        for incident in history.incidents
    )
    return (
        "<details open><summary>The guard sent training back</summary>"
        f"<p>Marked ▼ on every axis of steps; the data that led there is left out.</p><ol>{items}</ol></details>"
    )


def _samples(history: History) -> str:
    if not history.samples or not history.samples["texts"]:
        return ""
    prompt = escape(printable(history.samples["prompt"], "\n\t"))
    texts = "".join(
        f"<pre><b>{prompt}</b>{escape(printable(text, chr(10) + chr(9)))}</pre>" for text in history.samples["texts"]
    )
    return f"<details><summary>Samples at step {history.samples['step']:,}</summary>{texts}</details>"


def _census(counted: Census | None) -> str:
    if not counted:
        return ""
    rows = "".join(
        f"<tr><td>{escape(operation.name)}{' (final)' if operation in counted.final_operations else ''}</td>"
        f"<td>{escape(str(operation))}</td><td>{operation.elements:,}</td></tr>"
        for operation in (*counted.operations, *counted.final_operations)
    )
    return (
        "<details><summary>Census of a forward pass</summary>"
        f"<p>{counted.parameters:,} parameters; {counted.forward_flops:,} FLOPs over {counted.config.context_length:,} "
        "tokens; nonlinear operations, which are what costs under encryption:</p>"
        '<div class="scroll" tabindex="0" role="region" aria-label="nonlinear operations"><table>'
        "<thead><tr><th>operation</th><th>count × matrix</th><th>elements</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></div></details>"
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
    if history.read == BATCH:
        yield Number("training cross-entropy", _text(train["cross_entropy"][-1], ".3f"), "nats/token")
    else:
        yield Number("perplexity", _perplexity(train["cross_entropy"][-1]), history.read)
    yield from _entropies(history)
    if np.isfinite(train.get("tokens_per_second", np.nan)).any():  # the first line of a run has none
        yield Number("speed, median", _text(np.nanmedian(train["tokens_per_second"]), ",.0f"), "tokens/s")
    if cost := private_cost(history):
        warm = cost["total"]["warm"]
        megabytes = _text(max(warm["bytes"]) / 1e6, ",.1f")
        yield Number("private forward pass", megabytes, f"MB, {warm['rounds']:,} rounds, {terms(cost)}")
    lost = int(np.nansum(train["nan_count"]) + np.nansum(train["inf_count"]))
    yield Number("NaN and Inf in attention", f"{lost:,}" if lost else "none")


def _entropies(history: History) -> Iterator[Number]:
    """Mean entropy and quarter shares of the heads: on held-out text, and in the last training batch logged."""
    measured = []
    if "head_entropy" in history.evaluate:
        held_out_LxN = history.evaluate["head_entropy"][-1]
        measured.append(("held out", held_out_LxN, np.asarray(head_bands(held_out_LxN))))
    measured.append((history.read, history.train["head_entropy"][-1], history.train["bands_observed"][-1]))
    most = history.maxima()["context"] or math.nan
    for where, entropy_LxN, share_4 in measured:
        entropy = entropy_LxN.mean()
        share = f", {100 * entropy / most:.0f} % of log T" if math.isfinite(entropy / most) else ""
        yield Number(f"mean head entropy, {where}", _text(entropy, ".2f"), f"nats{share}")
        for quarter, share in (("bottom", share_4[0]), ("top", share_4[3])):
            text = _text(100 * share, "z.1f")
            yield Number(f"in the {quarter} quarter, {where}", text, "% of heads, by the largest head's entropy")


def _perplexity(loss: float) -> str:
    return _text(math.exp(min(loss, 700)), ".4g")


def _text(value: float, digits: str) -> str:
    return f"{value:{digits}}" if math.isfinite(value) else "not a number"
