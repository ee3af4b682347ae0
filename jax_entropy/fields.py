"""The table of configuration fields: name, default, unit, meaning, bounds, and whether a run may go on with another.

`config` makes configurations of it, the command line reads it, and docs/configuration.md is its print-out.
"""

import ast
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from jax_entropy.architecture import CHOICES, ModelConfig
from jax_entropy.data.catalog import SOURCES
from jax_entropy.errors import UserError

AXES = ("data", "fsdp", "tensor")  # of the mesh
# Axes of a parameter without its leading layer axis; a name, a tuple of names, or None for "not split".
RULES = (
    (r"(token_embedding|value_embedding|head)$", ("tensor", "fsdp")),
    (r"position_embedding$", (None, "fsdp")),
    (r"attention/(query|key|value)/kernel$", ("fsdp", "tensor", None)),
    (r"attention/(query|key|value)/(bias|gain)$", ("tensor", None)),
    (r"attention/(query|key|value)_convolution/taps$", (None, "tensor", None)),
    (r"attention/out/kernel$", ("tensor", None, "fsdp")),
    (r"attention/temperature$", ("tensor", None)),
    (r"attention/(threshold|shift|qk_gain|log_scale)$", ("tensor",)),
    (r"attention/slot_(key|value)$", (None, "tensor", None)),
    (r"ffn/(up|gate)/kernel$", ("fsdp", "tensor")),
    (r"ffn/(up|gate)/(bias|gain)$", ("tensor",)),
    (r"ffn/down/kernel$", ("tensor", "fsdp")),
    (r"ffn/fused/kernel$", ("fsdp", "tensor")),
    (r"(attention/out|ffn/down|ffn/fused)/(bias|gain)$", (None,)),
    (r"(norm1|norm2|final_norm)/(scale|bias)$", (None,)),
    (r"(alpha|beta|gamma|negative_slope|value_mix|value_embedding_scale)$|annealing/", ()),
    (r"spectral/.*/singular_vectors/\d$", (None,)),
)


@dataclasses.dataclass(frozen=True)
class Bound:
    """What a value must keep to, and the words that say so."""

    holds: Callable[[Any], bool]
    words: str


_POSITIVE = Bound(lambda value: value >= 1, "must be at least 1")
_ABOVE_ZERO = Bound(lambda value: value > 0, "must be above 0")
_NOT_NEGATIVE = Bound(lambda value: value >= 0, "must not be negative")
_BELOW_ONE = Bound(lambda value: 0 <= value < 1, "must be at least 0 and below 1")
_SHARE = Bound(lambda value: 0 <= value <= 1, "must be a share, from 0 to 1")
_INSIDE = Bound(lambda value: 0 < value < 1, "must lie between 0 and 1")
_FACTOR = Bound(lambda value: 0 < value <= 1, "must be above 0 and at most 1")
SEED = Bound(lambda value: 0 <= value < 2**64, "must be a whole number from 0 to 2^64 − 1")
_VOCABULARY = Bound(lambda value: 257 <= value <= 2**20, "must lie between 257 (bytes, end of text) and 2^20")
_UNSET = {"ffn_dim": int, "vocab_size": int, "residual_init_std": float}
_MODEL = {field.name: field.default for field in dataclasses.fields(ModelConfig)}

# what a value of a type is called
KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    tuple: "a tuple of (pattern, axes) pairs",
}


class Field(NamedTuple):
    """A field of the configuration, as docs/configuration.md has it.

    `kind` is the type of a field that may be unset. `live` fields may change when a run goes on: none of them changes
    what is learned, but for those of the guard.
    """

    name: str
    default: Any
    unit: str
    help: str
    bound: Bound | tuple[str, ...] | None = None  # or its choices
    live: bool = False
    kind: type | None = None

    def read(self, text: str) -> Any:
        """The value that a command line gives as text.

        Raises:
          UserError: it is none of the field's type.
        """
        kind = self.kind or type(self.default)
        if kind is str and not (self.kind and text == "None"):
            return text
        if text == "None":
            return None
        try:
            if kind is bool:
                return {"true": True, "false": False}[text.lower()]
            value = ast.literal_eval(text) if kind is tuple else kind(text)
        except (KeyError, ValueError, SyntaxError):
            value = None
        if not isinstance(value, kind):
            raise UserError(f"config.{self.name}={text} must be {KINDS[kind]}")
        return value


def _model(name: str, unit: str, help: str, live: bool = False) -> Field:
    """A field of `ModelConfig`, which has its default and checks its value; `unit` "": its choices."""
    unit = unit or ", ".join(f"`{choice}`" for choice in CHOICES[name])
    return Field(f"model.{name}", None if name in _UNSET else _MODEL[name], unit, help, None, live, _UNSET.get(name))


# fmt: off
FIELDS = (
    Field("architecture", "from the file", "notation", "what the model is made of: [architectures](architectures.md)"),
    Field("seed", 1337, "whole number", "of initialisation, data order and dropout", SEED),
    _model("num_layers", "blocks", "$L$"),
    _model("num_heads", "heads", "$N$, heads of a layer; must divide `model_dim`"),
    _model("model_dim", "features", "$D$, width of the residual stream"),
    _model("ffn_dim", "features",
        "$F$, width inside the feed-forward; unset: 4 · `model_dim`, 1 · if it is fused, 2 · if it is bilinear"),
    _model("context_length", "tokens",
        "$T$, positions that the model can see; chunks of the corpus are one token longer"),
    _model("vocab_size", "tokens", "$V$; unset: the tokenizer's. A smaller value is refused, a larger table is padded"),
    Field("model.tanh_gelu", False, "yes or no",
        "the notation's `G` is GELU with a tanh in it, as in GPT-2, not the exact one"),
    _model("temperature_init", "divisor of the logits", "initial temperature of `SM(t)`"),
    _model("temperature_parameter", "", "what the optimiser moves: the temperature itself, or its logarithm"),
    _model("alpha_init", "factor", r"initial $\alpha$ of Eq. 8; the paper states none"),
    _model("beta_init", "factor", r"initial $\beta$ of Eq. 8; the paper states none"),
    _model("learned_positions", "yes or no",
        "a table of positions is added to the embeddings; with `RoPE` the model can do without"),
    _model("rotary_base", "tokens", "of `RoPE`: its longest wavelength is about 2π times this"),
    _model("value_residual_init", "share", "initial share of layer 0 in the values of `VRes`"),
    _model("log_scale_init", "factor", "initial $s$ of `SM(log)`, which multiplies scores by $s$ · log(visible keys)"),
    _model("value_embedding_init", "factor", "initial factor of the table of `VEmb`, one for each layer"),
    _model("value_embedding_layers", "", "which layers `VEmb` adds to: the last and every other before it, or all"),
    _model("final_norm", "", "normalisation before the head; the authors keep it in their normalisation-free models"),
    _model("bias", "",
        "which linear layers have a bias: none, queries and keys (the authors' code), all (GPT-2)"),
    _model("tied_head", "yes or no", "the output matrix is the embedding table"),
    _model("embedding_scale", "factor", "of the token embeddings; Languini uses √D"),
    _model("embedding_dropout", "share of elements", "of the embeddings, in training only"),
    _model("init_std", "standard deviation", "of initial weights and embeddings"),
    _model("residual_init_std", "standard deviation",
        "of the matrices that write to the residual stream; unset: `init_std`"),
    _model("norm_epsilon", "variance", "added under the root in LayerNorm and RMSNorm"),
    _model("attention", "name",
        "implementation of the attention operator, such as `dense` or `blockwise`; `auto` picks by a measured rule",
        live=True),
    _model("scan_unroll", "layers",
        "layers unrolled in one turn of the scan: faster steps, longer compilation; 0: on an "
        "accelerator without `fsdp` or `remat` all, if they are at most 12; otherwise one", live=True),
    _model("remat", "",
        "what a block recomputes in its backward pass: nothing; all but attention's results and the input of the "
        "feed-forward; all but attention's results; all. Keeping less takes less memory and more time",
        live=True),
    Field("data.source", "stdlib", "", "where text comes from", tuple(SOURCES)),
    Field("data.files", "", "path or glob", "folder, file or glob; for `codeparrot` and `languini` local shards"),
    Field("data.directory", "", "path",
        "where prepared corpora are kept; empty: `$XDG_CACHE_HOME/jax_entropy`, or `~/.cache/jax_entropy`", live=True),
    Field("data.tokenizer", "", "path",
        "an existing `tokenizer.json`; empty: a byte-level BPE trained on the training text, or the tokenizer of the "
        "model that the run started from, which lies in the workdir"),
    Field("data.vocab_size", 4096, "tokens",
        "largest vocabulary of the BPE that is trained, 257 to 2^20; without effect if `tokenizer` is set",
        _VOCABULARY),
    Field("data.join_documents", False, "yes or no",
        "chunks may continue in the next document, after an end-of-text token; no: they never do, "
        "and only full chunks are kept"),
    Field("data.validation_fraction", 0.05, "share of the text", "held out", _INSIDE),
    Field("data.max_documents", 0, "documents", "at most this many, chosen by a fixed shuffle; 0: all", _NOT_NEGATIVE),
    Field("data.num_threads", 2, "threads", "that read ahead", _POSITIVE, live=True),
    Field("data.prefetch", 16, "batches", "that are read ahead", _POSITIVE, live=True),
    Field("mesh.data", -1, "devices",
        "the batch is split over them, parameters are copied; -1: what `fsdp` and `tensor` leave", live=True),
    Field("mesh.fsdp", 1, "devices", "batch and parameters are split over them", live=True),
    Field("mesh.tensor", 1, "devices", "heads, feed-forward width and vocabulary are split over them", live=True),
    Field("mesh.rules", RULES, "(pattern, axes) pairs",
        "which dimension of a parameter is split over which axis; the first pattern that is found in its path wins",
        live=True),
    Field("train.num_steps", 1000, "optimiser steps", "length of the run, and of the learning rate's decay", _POSITIVE),
    Field("train.batch_size", 32, "sequences", "in one batch, over all devices and processes", _POSITIVE),
    Field("train.dtype", "float32", "",
        "of activations and matrix products; parameters, statistics and loss stay float32", CHOICES["dtype"]),
    Field("train.log_every", 10, "steps",
        "between two lines of metrics; the first and last step are always logged", _POSITIVE, live=True),
    Field("train.evaluate_every", 100, "steps",
        "between two evaluations on held-out text; the last step is always evaluated", _POSITIVE, live=True),
    Field("train.evaluate_chunks", 0, "chunks",
        "of held-out text used while training, evenly spaced; 0: all", _NOT_NEGATIVE, live=True),
    Field("train.checkpoint_every", 100, "steps",
        "between two checkpoints; the last step is always saved", _POSITIVE, live=True),
    Field("train.keep", 2, "checkpoints",
        "newest ones that are kept, beside the best by validation loss", _POSITIVE, live=True),
    Field("train.wandb", False, "yes or no", "also log to Weights & Biases (`pip install -e '.[wandb]'`)", live=True),
    Field("optimizer.learning_rate", 0.001, "per step", "at its peak, after the warm-up", _ABOVE_ZERO),
    Field("optimizer.end_learning_rate", 1e-07, "per step", "at the last step", _NOT_NEGATIVE),
    Field("optimizer.schedule", "linear", "",
        "how the rate falls from `learning_rate` to `end_learning_rate`", ("linear", "cosine", "constant")),
    Field("optimizer.warmup", 0.05, "share of steps below 1, steps from 1 on", "linear rise from 0", _NOT_NEGATIVE),
    Field("optimizer.beta1", 0.9, "decay per step", "of the mean of gradients", _BELOW_ONE),
    Field("optimizer.beta2", 0.999, "decay per step", "of the mean of squared gradients", _BELOW_ONE),
    Field("optimizer.epsilon", 1e-08, "gradient", "added to the root of the mean square", _NOT_NEGATIVE),
    Field("optimizer.weight_decay", 0.1, "per step, times the learning rate", "decoupled; 0: Adam", _NOT_NEGATIVE),
    Field("optimizer.clip_norm", 1.0, "norm of the whole gradient",
        "larger gradients are scaled down to it; 0: no clipping", _NOT_NEGATIVE),
    Field("optimizer.qk_clip", 0.0, "logit",
        "after the update, queries and keys of a head whose largest logit exceeds it are scaled back to it; 0: never",
        _NOT_NEGATIVE),
    Field("optimizer.moments", "float32", "",
        "type of the mean of gradients; that of their squares stays float32",
        ("float32", "bfloat16")),
    Field("optimizer.accumulate", 1, "batches", "averaged in one optimiser step", _POSITIVE),
    Field("anneal.activation", None, "`gelu`, `gelu_tanh`, `relu`",
        "activation that the run starts with and its architecture lacks; unset: that of the model it starts from",
        (None, "gelu", "gelu_tanh", "relu"), kind=str),
    Field("anneal.begin", 0.05, "share of steps", "after which nonlinearities begin to be taken out", _SHARE),
    Field("anneal.end", 0.5, "share of steps", "after which they are gone; 0: gone from the first step on", _SHARE),
    Field("anneal.order", "together", "", "all layers at once, or one after the other",
        ("together", "shallowest_first", "deepest_first")),
    Field("anneal.distillation", 0.0, "share of the loss",
        "weight of the KL divergence from the model that the run started from; the cross-entropy has the rest",
        _SHARE),
    Field("anneal.distillation_temperature", 1.0, "divisor of the logits", "of both models in it", _ABOVE_ZERO),
    Field("penalty.weight", 1e-05, "nats per nats²", r"$\lambda$", _NOT_NEGATIVE),
    Field("penalty.warmup", 0.0, "share of steps", r"in which $\lambda$ rises linearly from 0", _SHARE),
    Field("penalty.tolerance", 0.2, "fraction of maximum entropy",
        r"$\gamma$, half the width of the band without a penalty", _NOT_NEGATIVE),
    Field("penalty.reduction", "row_sum", "",
        r"the authors' code and the paper's $\lambda$; the same per row; Algorithm 1",
        ("row_sum", "row_mean", "head_mean")),
    Field("penalty.shape", "deadzone", "",
        "the paper's, with a jump at the edge of the band; continuous", ("deadzone", "hinge")),
    Field("penalty.threshold_init", 0.5, "fraction of maximum entropy", r"initial $\theta$; the paper states none"),
    Field("guard.limit", 3, "times",
        "that training is sent back before it stops; 0: it stops at once", _NOT_NEGATIVE, live=True),
    Field("guard.zscore", 20.0, "robust standard deviations",
        "above the median of the window; 0: only what is not finite counts", _NOT_NEGATIVE, live=True),
    Field("guard.window", 64, "steps", "that a spike is measured against", _POSITIVE, live=True),
    Field("guard.learning_rate_factor", 1.0, "factor",
        "that the learning rate is multiplied by each time", _FACTOR, live=True),
)
# fmt: on
