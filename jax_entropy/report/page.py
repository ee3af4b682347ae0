"""One page a run: its key numbers, its figures and its configuration in a single file that needs nothing else."""

import base64
import html
import json
import math

import numpy as np

from jax_entropy.report.history import Run

_CAPTIONS = dict(
    loss="Training and validation cross-entropy. The right axis reads the same curves as perplexities.",
    head_entropy="Near zero a head looks at one token (collapse); near the maximum it looks at all alike (overload).",
    layer_entropy="Deep layers that sink to zero foretell an unstable run; layers that stay at the causal maximum have "
    "heads that did not specialise.",
    entropy_bands="A well-behaved model has about 90 % of its heads in the middle quarters of the observed maximum.",
    thresholds="The entropy that each head is held to, learned with the weights, as a fraction of log T.",
    temperature="Above 1 attention is spread out, below 1 it is sharpened, and the gradients of queries and keys grow.",
    stability="A gradient norm or a largest logit that keeps growing precedes NaN.",
    private="A forward pass under secure computation: what the busiest party sends, how often messages wait for "
    "others, and the time of both on a network.",
)

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --ink: #1a1a1a; --soft: #5c5c5c; --page: #fafaf8; --card: #fff; --line: #e2e2de; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #ececec; --soft: #a6a6a6; --page: #161616; --card: #1f1f1f; --line: #363636; }}
}}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 62rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }}
h1 {{ margin: 0; font-size: 1.7rem; overflow-wrap: anywhere; }}
header p, figcaption, dt {{ margin: 0; color: var(--soft); }}
dl {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(10.5rem, 1fr)); gap: .75rem;
  margin: 1.5rem 0 2.5rem; }}
dl div {{ padding: .7rem .9rem; background: var(--card); border: 1px solid var(--line); border-radius: .5rem; }}
dt {{ font-size: .85rem; }}
dd {{ margin: 0; font-size: 1.35rem; font-variant-numeric: tabular-nums; }}
dd small {{ display: block; font-size: .85rem; line-height: 1.3; color: var(--soft); }}
figure {{ margin: 0 0 2rem; }}
figure div {{ overflow-x: auto; background: #fff; border: 1px solid var(--line); border-radius: .5rem; }}
figure img {{ display: block; margin: auto; height: auto; }}
figcaption {{ padding: .4rem .2rem 0; font-size: .95rem; }}
pre {{ overflow-x: auto; padding: 1rem; background: var(--card); border: 1px solid var(--line); border-radius: .5rem; }}
summary {{ cursor: pointer; }}
</style>
<header>
<h1>{title}</h1>
<p>{subtitle}</p>
</header>
<dl>
{numbers}
</dl>
{figures}
<details>
<summary>Configuration</summary>
<pre>{config}</pre>
</details>
</html>
"""


def page(run: Run, pictures: dict[str, bytes]) -> str:
    """The page as text; `pictures` maps the name of a figure to its PNG, in the order of the page."""
    model = run.config["model"]
    sizes = (
        ("num_layers", "layers"),
        ("num_heads", "heads"),
        ("model_dim", "wide"),
        ("context_length", "tokens of context"),
    )
    facts = [f"{model[key]} {unit}" for key, unit in sizes if key in model]
    figures = [
        f'<figure><div tabindex="0"><img alt="{name.replace("_", " ")}" width="{_width(png)}" '
        f'src="data:image/png;base64,{base64.b64encode(png).decode()}"></div>'
        f"<figcaption>{html.escape(_CAPTIONS[name])}</figcaption></figure>"
        for name, png in pictures.items()
    ]
    numbers = [f"<div><dt>{label}</dt><dd>{value}</dd></div>" for label, value in _key_numbers(run).items()]
    return _PAGE.format(
        title=html.escape(run.architecture),
        subtitle=html.escape(" · ".join([run.dataset, *facts, f"step {run.steps_E[-1]:,}"])),
        numbers="\n".join(numbers),
        figures="\n".join(figures),
        config=html.escape(json.dumps(run.config, indent=2, ensure_ascii=False)),
    )


def _width(png: bytes) -> int:
    """CSS pixels that give the letters of all figures one size, the widest figure filling the page."""
    return round(0.66 * int.from_bytes(png[16:20], "big"))


def _key_numbers(run: Run) -> dict[str, str]:
    """Label to value, as HTML, of what one looks for first; at the last step unless it says otherwise."""
    train, evaluate = run.train, run.evaluate
    numbers = {}
    if "validation_loss" in evaluate:
        loss_E = evaluate["validation_loss"]
        numbers["validation perplexity"] = _number(math.exp(min(loss_E[-1], 700)), ".4g")
        numbers["validation loss"] = _number(loss_E[-1], ".3f", "nats/token")
        if np.isfinite(loss_E).any() and np.nanmin(loss_E) < loss_E[-1]:
            best = int(np.nanargmin(loss_E))
            numbers["best validation perplexity"] = _number(
                math.exp(min(loss_E[best], 700)), ".4g", f"at step {int(evaluate['step'][best]):,}"
            )
    if "bits_per_byte" in evaluate:
        numbers["bits per byte"] = _number(evaluate["bits_per_byte"][-1], ".3f")
    entropy = train["head_entropy"][-1].mean()
    share = 100 * entropy / run.maxima()["context"] if run.context_length > 1 else math.nan
    numbers["training cross-entropy"] = _number(train["cross_entropy"][-1], ".3f", "nats/token")
    numbers["mean head entropy"] = _number(entropy, ".2f", f"nats, {share:.0f} % of log T")
    numbers["collapse"] = _number(100 * train["bands_observed"][-1, 0], "z.1f", "% of heads in the bottom quarter")
    numbers["overload"] = _number(100 * train["bands_observed"][-1, 3], "z.1f", "% of heads in the top quarter")
    if "tokens_per_second" in train:
        numbers["speed, median"] = _number(np.median(train["tokens_per_second"]), ",.0f", "tokens/s")
    if run.private:
        warm, setting = run.private["total"]["warm"], run.private["setting"]
        numbers["private forward pass"] = _number(
            max(warm["bytes"]) / 1e6, ",.1f", f"MB, {warm['rounds']:,} rounds, {run.private['num_tokens']} tokens, "
            f"{setting['protocol']}",
        )  # fmt: skip
    lost = int(np.nansum(train["nan_count"]) + np.nansum(train["inf_count"]))
    numbers["NaN and Inf in attention"] = f"{lost:,}" if lost else "none"
    return numbers


def _number(value: float, digits: str, unit: str = "") -> str:
    if not math.isfinite(value):
        return "not a number"
    return f"{value:{digits}} <small>{unit}</small>" if unit else f"{value:{digits}}"
