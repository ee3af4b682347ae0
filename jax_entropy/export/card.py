"""The card of a model that leaves the house: what it is, what it read, how good it is, what running it privately costs.

Words of other people, as names of folders, only ever stand in it as text.
"""

import math
import re
from collections.abc import Iterator

import numpy as np
from ml_collections import ConfigDict

from jax_entropy.architecture import ModelConfig
from jax_entropy.census import census
from jax_entropy.entropy import extreme_heads, head_bands, max_entropy
from jax_entropy.errors import UserError
from jax_entropy.report.costs import cost_of_model, terms
from jax_entropy.report.history import History, printable, read_history
from jax_entropy.runs.workdir import Workdir

HUGGINGFACE, SAFETENSORS, TRANSFORMER_LENS = "huggingface", "safetensors", "transformer_lens"

_LIBRARY = {HUGGINGFACE: "transformers", SAFETENSORS: "jax_entropy", TRANSFORMER_LENS: "transformer_lens"}
_LOADING = {
    HUGGINGFACE: """With transformers, which computes the same function:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("this-folder")
tokenizer = AutoTokenizer.from_pretrained("this-folder")
print(tokenizer.decode(model.generate(**tokenizer("def ", return_tensors="pt"), max_new_tokens=32)[0]))
```

With jax_entropy, entropies included:

```python
import jax_entropy as je

config, variables = je.from_huggingface("this-folder")
logits, aux = je.Transformer(config).apply(variables, tokens)  # tokens [B, T]; aux.stats.entropy [L, B, N, T], nats
```""",
    SAFETENSORS: """With jax_entropy, entropies included:

```python
import jax_entropy as je

config, variables = je.from_safetensors("this-folder")
logits, aux = je.Transformer(config).apply(variables, tokens)  # tokens [B, T]; aux.stats.entropy [L, B, N, T], nats
```

The arrays alone, without jax_entropy:

```python
from flax.traverse_util import unflatten_dict
from safetensors.numpy import load_file

variables = unflatten_dict(load_file("this-folder/model.safetensors"), sep="/")  # {"params": …}, as Flax has them
```

Parameters of layers are stacked: their first axis is the layer. config.json has the fields of `je.ModelConfig`.""",
    TRANSFORMER_LENS: """With TransformerLens below version 4, which has no HookedTransformer any more:

```python
import json

from safetensors.torch import load_file
from transformer_lens import HookedTransformer, HookedTransformerConfig

with open("this-folder/config.json") as file:
    model = HookedTransformer(HookedTransformerConfig.from_dict(json.load(file)))
model.load_state_dict(load_file("this-folder/model.safetensors"))
logits = model(tokens)  # tokens [B, T]
```

TransformerLens has neither linear feed-forwards nor scales on the stream. A linear map is written as
relu(x) − relu(−x), in two halves of the hidden width, and scales have gone into the matrices: the function is the same,
while hidden units and the stream at a layer differ by these factors.""",
}
_TOKENIZER = """
Text becomes tokens, by byte-level BPE, with `tokenizers.Tokenizer.from_file("this-folder/tokenizer.json")`.
"""


_RUN = """
As a run, to evaluate, to write text, to train on, and to execute privately:

```
jax-entropy convert runs/it --to=workdir --{to}=this-folder
jax-entropy generate runs/it --prompt="def "
```
"""


def card(workdir: Workdir, config: ConfigDict, model: ModelConfig, step: int, to: str) -> str:
    """README.md of the model of a run's checkpoint of `step`, in the format `to`."""
    try:
        history, unmeasured = read_history(workdir.path), ""
    except UserError as error:
        history, unmeasured = None, f"Nothing is known of its training: {_text(str(error))}."
    sections = [
        _FRONT.format(library=_LIBRARY[to]),
        f"# {model}, {_millions(census(model).parameters)} parameters",
        "A decoder-only language model, trained and exported with jax_entropy, around *Entropy-Guided Attention for "
        "Private LLMs* ([arXiv 2501.03489](https://arxiv.org/abs/2501.03489)): attention entropy is watched in every "
        "head, and the fewer nonlinearities a model has, the less it costs under secure computation.",
        "## Architecture",
        _table(("", ""), _architecture(model)),
        "## Data and training",
        _table(("", ""), _training(history, config, model, step)) if history else unmeasured,
    ]
    if history and "validation_loss" in history.evaluate:
        e = _evaluated(history, step)
        sections += ["## Held-out text", _table(("", ""), _quality(history, e))]
        sections += ["## Attention entropy", *_entropies(history.evaluate["head_entropy"][e], model)]
    sections += ["## Private execution", _private(history, model)]
    loading = _LOADING[to] + ("" if to == TRANSFORMER_LENS else "\n" + _RUN.format(to=to))
    if to != HUGGINGFACE and workdir.tokenizer.exists():
        loading += "\n" + _TOKENIZER
    return "\n\n".join([*sections, "## How to load it", loading.strip()]) + "\n"


_FRONT = """---
library_name: {library}
pipeline_tag: text-generation
tags:
- entropy-guided-attention
- private-inference
- jax
---"""


def _architecture(model: ModelConfig) -> Iterator[tuple[str, str]]:
    counted = census(model)
    yield "notation", f"`{model}`"
    yield "layers, heads", f"{model.num_layers}, {model.num_heads}"
    yield "width, of the feed-forward", f"{model.model_dim}, {model.hidden_dim}"
    yield "context", f"{model.context_length:,} tokens"
    yield "vocabulary", f"{model.vocab_size:,} tokens"
    yield "parameters", f"{counted.parameters:,}"
    operations = [*counted.operations, *counted.final_operations]
    yield (
        "nonlinear operations",
        ", ".join(f"{one.name} {one.count} × ({one.rows} × {one.columns})" for one in operations),
    )


def _training(history: History, config: ConfigDict, model: ModelConfig, step: int) -> Iterator[tuple[str, str]]:
    of_step = config.train.batch_size * config.optimizer.accumulate * model.context_length
    yield "data", _text(history.dataset)
    yield "steps", f"{step:,}"
    yield "tokens", f"{step * of_step:,} ({of_step:,} a step)"
    yield "seed", str(config.seed)
    yield "learning rate", f"{config.optimizer.learning_rate:g}"
    if history.incidents:
        yield "sent back by the guard", f"{len(history.incidents)} ×"
    if status := history.status:
        for name in ("devices", "command"):
            if value := getattr(status, name):
                yield name, _text(value)
        if status.versions:
            yield "versions", _text(", ".join(f"{name} {version}" for name, version in status.versions.items()))


def _evaluated(history: History, step: int) -> int:
    """The last evaluation up to a step, else the first of all."""
    return max(0, int(np.searchsorted(history.evaluate["step"], step, side="right")) - 1)


def _quality(history: History, e: int) -> Iterator[tuple[str, str]]:
    loss = float(history.evaluate["validation_loss"][e])
    yield "evaluated at step", f"{int(history.evaluate['step'][e]):,}"
    yield "perplexity", f"{math.exp(min(loss, 700)):.4g}"
    yield "loss", f"{loss:.4f} nats/token"
    if "bits_per_byte" in history.evaluate:
        yield "bits per byte", f"{history.evaluate['bits_per_byte'][e]:.4f}"


def _entropies(entropy_LxN: np.ndarray, model: ModelConfig) -> Iterator[str]:
    """In held-out text, over all heads and by layer."""
    T, S = model.context_length, model.context_length + model.num_slots
    most_L = np.array([max_entropy(T, "causal", num_keys=S, window=window) for window in model.windows])
    most = most_L.mean()
    overloaded, collapsed = (int(heads_LxN.sum()) for heads_LxN in extreme_heads(entropy_LxN, most_L[:, None]))
    shares = " / ".join(f"{100 * float(share):.0f}" for share in head_bands(entropy_LxN))
    yield (
        f"Mean head entropy {entropy_LxN.mean():.3f} nats, {100 * entropy_LxN.mean() / most:.0f} % of what causal "
        f"attention over {model.context_length} tokens can have ({most:.3f} nats). {overloaded} of {entropy_LxN.size} "
        f"heads are overloaded, above three quarters of it, and {collapsed} collapsed, below one quarter. By quarter "
        f"of the largest head entropy: {shares} %, from collapse to overload."
    )
    rows = [
        (str(layer), *(f"{value:.3f}" for value in (entropy_N.mean(), entropy_N.min(), entropy_N.max())))
        for layer, entropy_N in enumerate(entropy_LxN)
    ]
    yield _table(("layer", "mean [nats]", "lowest head", "highest head"), rows)


def _private(history: History | None, model: ModelConfig) -> str:
    """What was measured of the run, else what the cost model predicts, by kind of operation."""
    cost = history and history.private
    if not cost or "costs" not in cost:
        try:
            cost = cost_of_model(model)
        except UserError as error:
            return f"Its cost is not predicted: {_text(str(error))}."
    kinds = sorted(cost["costs"].items(), key=lambda item: -item[1]["bytes"])
    sent, rounds = (sum(of_kind[name] for _, of_kind in kinds) for name in ("bytes", "rounds"))
    rows = [(_text(kind), f"{of_kind['bytes'] / 1e6:,.1f}", f"{of_kind['rounds']:,}") for kind, of_kind in kinds]
    words = (
        f"A forward pass under secure computation ({_text(terms(cost))}): the busiest party sends "
        f"{sent / 1e6:,.1f} MB, in {rounds:,} rounds."
    )
    return "\n\n".join([words, _table(("kind of operation", "MB", "rounds"), rows)])


def _table(head: tuple[str, ...], rows: Iterator[tuple[str, ...]] | list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _text(text: str) -> str:
    """As Markdown shows it letter by letter."""
    return re.sub(r"([\\`*_\[\]<>|#$~&])", r"\\\1", printable(text))


def _millions(count: int) -> str:
    return f"{count / 1e6:.3g} M" if count < 1e9 else f"{count / 1e9:.3g} B"
