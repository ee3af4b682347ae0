"""Every configuration field with its unit and default, and the checks that run before anything expensive.

A file in `configs/` starts from `default_config(architecture)` and changes what its experiment needs.
"""

import json
import math
from typing import Any

from ml_collections import ConfigDict, config_dict

from jax_entropy.architecture import ModelConfig, architecture
from jax_entropy.errors import UserError, nearest
from jax_entropy.sharding import RULES

_POSITIVE = (
    "train.num_steps", "train.batch_size", "train.log_every", "train.evaluate_every", "train.checkpoint_every",
    "train.keep", "optimizer.accumulate", "data.num_threads", "data.prefetch", "guard.window",
)  # fmt: skip
_NOT_NEGATIVE = (
    "seed", "train.evaluate_chunks", "optimizer.learning_rate", "optimizer.end_learning_rate", "optimizer.warmup",
    "optimizer.weight_decay", "optimizer.clip_norm", "penalty.weight", "penalty.tolerance", "penalty.warmup",
    "data.max_documents", "guard.limit", "guard.zscore",
)  # fmt: skip
# what a run may go on with another value of: nothing of it changes what is learned, but for the guard's judgement
_MAY_CHANGE = (
    "train.log_every", "train.evaluate_every", "train.evaluate_chunks", "train.checkpoint_every", "train.keep",
    "train.wandb", "data.directory", "data.num_threads", "data.prefetch", "mesh.data", "mesh.fsdp", "mesh.tensor",
    "mesh.rules", "model.attention", "model.scan_unroll", "model.remat", "guard.limit", "guard.zscore", "guard.window",
    "guard.learning_rate_factor",
)  # fmt: skip
# what an imported model, not trained yet, was made with
_IMPORTED = ("architecture", "model.", "data.tokenizer")
_BELOW_ONE = ("optimizer.beta1", "optimizer.beta2")
_CHOICES = {
    "train.dtype": ("float32", "bfloat16"),
    "optimizer.schedule": ("linear", "cosine", "constant"),
    "penalty.reduction": ("row_sum", "row_mean", "head_mean"),
    "penalty.shape": ("deadzone", "hinge"),
    "data.source": ("stdlib", "files", "codeparrot", "languini"),
}


def default_config(architecture_name: str) -> ConfigDict:
    """The fields that every command knows; documented in docs/configuration.md."""
    return ConfigDict(
        dict(
            architecture=architecture_name,  # the paper's notation
            seed=1337,  # of initialisation, data order and dropout
            model=dict(
                num_layers=12,
                num_heads=12,
                model_dim=768,
                ffn_dim=config_dict.placeholder(int),  # unset: 4·model_dim, or model_dim where fused
                context_length=128,  # tokens
                vocab_size=config_dict.placeholder(int),  # unset: the tokenizer's; anything else must agree with it
                activation=config_dict.placeholder(str),  # unset: the notation's; gelu_tanh is Hugging Face's GPT-2
                temperature_init=1e-2,  # divisor of the scaled logits
                temperature_parameter="direct",  # direct | log
                alpha_init=1.0,
                beta_init=1.0,
                final_norm="layer",  # none | layer | rms
                bias="qk",  # none | qk | all
                tied_head=True,
                embedding_scale=1.0,
                embedding_dropout=0.0,  # share of embedding elements dropped in training
                init_std=0.02,
                residual_init_std=config_dict.placeholder(float),  # unset: init_std
                norm_epsilon=1e-5,
                attention="auto",  # auto | dense | blockwise
                scan_unroll=1,  # layers
                remat=False,
            ),
            data=dict(
                source="stdlib",  # stdlib | files | codeparrot | languini
                files="",  # folder, file or glob; for codeparrot and languini: local Parquet or JSON-lines shards
                directory="",  # where prepared corpora live; "": $XDG_CACHE_HOME/jax_entropy or ~/.cache/jax_entropy
                tokenizer="",  # an existing tokenizer.json; "": a byte-level BPE trained on the corpus
                vocab_size=4096,  # of the BPE trained on the corpus
                join_documents=False,  # False: chunks never cross files, only full ones are kept
                validation_fraction=0.05,  # share of the text
                max_documents=0,  # 0: all
                num_threads=2,
                prefetch=16,  # batches
            ),
            mesh=dict(data=-1, fsdp=1, tensor=1, rules=RULES),  # devices along each axis, -1: what is left
            train=dict(
                num_steps=1000,  # optimiser steps
                batch_size=32,  # sequences in a batch, over all devices; a step takes optimizer.accumulate batches
                dtype="float32",  # float32 | bfloat16: activations and matrix products
                log_every=10,  # steps
                evaluate_every=100,  # steps
                evaluate_chunks=0,  # validation chunks used while training, 0: all
                checkpoint_every=100,  # steps
                keep=2,  # newest checkpoints kept, beside the best by validation loss
                wandb=False,
            ),
            optimizer=dict(
                learning_rate=1e-3,
                end_learning_rate=1e-7,
                schedule="linear",  # linear | cosine | constant
                warmup=0.05,  # below 1 a share of num_steps, from 1 on steps
                beta1=0.9,
                beta2=0.999,
                epsilon=1e-8,
                weight_decay=0.1,
                clip_norm=1.0,  # 0: no clipping
                accumulate=1,  # batches a step
            ),
            penalty=dict(
                weight=1e-5,  # λ; used by EReg(…) only
                warmup=0.0,  # share of num_steps in which λ rises linearly from 0
                tolerance=0.2,  # γ, fraction of maximum entropy
                reduction="row_sum",  # row_sum (the authors' code and λ) | row_mean | head_mean (Algorithm 1)
                shape="deadzone",  # deadzone | hinge
                threshold_init=0.5,  # θ₀, fraction of maximum entropy
            ),
            guard=dict(
                limit=3,  # times that training is sent back to its last good checkpoint; 0: it stops at once
                zscore=20.0,  # robust z-score of a loss that is a spike; 0: none is, only what is not finite
                window=64,  # steps that a spike is measured against
                learning_rate_factor=1.0,  # of the learning rate each time
            ),
        )
    )


def model_config(config: ConfigDict, vocab_size: int) -> ModelConfig:
    """The model that a config describes, on a tokenizer of `vocab_size` entries.

    Raises UserError where notation, fields and tokenizer do not fit together.
    """
    fields = dict(config.model)
    if fields["vocab_size"] not in (None, vocab_size):
        raise UserError(
            f"config.model.vocab_size={fields['vocab_size']} differs from the tokenizer's {vocab_size} entries; "
            "leave it unset to take the tokenizer's"
        )
    fields["vocab_size"] = vocab_size
    if fields["activation"] is None:
        del fields["activation"]
    return architecture(
        config.architecture, **fields, dtype=config.train.dtype, threshold_init=config.penalty.threshold_init
    )


def check(config: ConfigDict) -> None:
    """Raises UserError for values that cannot work, before data is prepared or anything is compiled."""
    flat, known = flatten(config), flatten(default_config("SM"))
    for name in flat:
        if name not in known:
            raise UserError(f"config.{name} is not a field{nearest(name, known)}")
    for name, default in known.items():
        if name not in flat:
            raise UserError(f"config.{name} is missing; start from jax_entropy.config.default_config(…)")
        if flat[name] is None and default is not None:
            raise UserError(f"config.{name}=None must have a value; its default is {default!r}")
    for name, value in flat.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"config.{name}={value} must be a finite number")
    for name in _POSITIVE:
        if flat[name] < 1:
            raise UserError(f"config.{name}={flat[name]} must be at least 1")
    for name in _NOT_NEGATIVE:
        if not flat[name] >= 0:
            raise UserError(f"config.{name}={flat[name]} must not be negative")
    for name in _BELOW_ONE:
        if not 0 <= flat[name] < 1:
            raise UserError(f"config.{name}={flat[name]} must be at least 0 and below 1")
    for name, choices in _CHOICES.items():
        if flat[name] not in choices:
            raise UserError(f"config.{name}={flat[name]!r} is not known{nearest(flat[name], choices)}")
    if not 0 < config.data.validation_fraction < 1:
        raise UserError(f"config.data.validation_fraction={config.data.validation_fraction} must lie between 0 and 1")
    if config.penalty.warmup > 1:
        raise UserError(f"config.penalty.warmup={config.penalty.warmup} is a share of the steps, at most 1")
    if not 0 < config.guard.learning_rate_factor <= 1:
        raise UserError(
            f"config.guard.learning_rate_factor={config.guard.learning_rate_factor} must be above 0 and at most 1"
        )
    if not config.optimizer.learning_rate > 0:
        raise UserError(f"config.optimizer.learning_rate={config.optimizer.learning_rate} must be above 0")
    model_config(config, config.model.vocab_size or 1)


def changes(stored: ConfigDict, config: ConfigDict, *, imported: bool = False) -> list[str]:
    """What differs between a run's config and the one it shall go on with, as "field=new (was old)".

    Args:
      imported: the run holds another program's model and no step of ours; it must keep that model, and nothing else.
    Raises UserError if a field differs that a run must keep.
    """
    old, new = (flatten(json.loads(to_json(c))) for c in (stored, config))
    differing = [name for name in sorted(old | new) if old.get(name) != new.get(name)]
    kept = [name for name in differing if name.startswith(_IMPORTED)] if imported else differing
    fixed = [name for name in kept if name not in _MAY_CHANGE]
    if fixed:
        name = fixed[0]
        more = f" (and {len(fixed) - 1} more fields differ)" if len(fixed) > 1 else ""
        raise UserError(f"{name} is {old.get(name)!r} there and {new.get(name)!r} here{more}")
    return [f"{name}={new[name]!r} (was {old[name]!r})" for name in differing]


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """{"train.batch_size": 32, …}"""
    flat = {}
    for name, value in config.items():
        flat |= flatten(value, f"{prefix}{name}.") if hasattr(value, "items") else {prefix + name: value}
    return flat


def to_json(config: ConfigDict) -> str:
    """The text of a workdir's config.json."""
    return json.dumps(config.to_dict(), indent=2) + "\n"


def from_json(text: str) -> ConfigDict:
    """Inverse of `to_json`, on top of the defaults, so that types and unset fields are known again.

    Raises UserError if the text is not such a config's.
    """
    try:
        stored = json.loads(text)
        config = default_config(stored["architecture"])
        stored["mesh"]["rules"] = tuple((pattern, _tuples(axes)) for pattern, axes in stored["mesh"]["rules"])
        config.update(stored)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"config.json is damaged ({error!r}); restore it") from None
    return config


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
