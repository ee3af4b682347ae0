"""What running a run's model privately costs: as `private profile` measured it, else as the cost model predicts it."""

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jax_entropy.architecture import ModelConfig
from jax_entropy.config import from_json, model_config
from jax_entropy.data import load_tokenizer
from jax_entropy.errors import UserError
from jax_entropy.private.cost.account import NETWORKS, add, on_network
from jax_entropy.private.cost.model import predict
from jax_entropy.private.engine.engine import Account, Setting
from jax_entropy.report.history import History

PRIVATE_TOKENS = 128  # the paper's context
PRICED_AS = ", priced as "  # between a kind of operation that was not measured and the one that stands for it


def private_cost(history: History) -> dict[str, Any] | None:
    """What is in a run's private.json, or its like, predicted; None where neither is known."""
    return history.private or _predicted(model_of(history), PRIVATE_TOKENS)


def compared_costs(histories: Sequence[History]) -> list[dict[str, Any] | None]:
    """What the models of runs cost, all on the same terms: as measured where these are the same, else as predicted."""
    costs = [private_cost(history) for history in histories]
    if len({terms(cost) + json.dumps(cost["setting"], sort_keys=True) for cost in costs if cost}) < 2:
        return costs
    models = [model_of(history) for history in histories]
    num_tokens = min([PRIVATE_TOKENS, *(model.context_length for model in models if model)])
    return [_predicted(model, num_tokens) for model in models]


def terms(cost: Mapping[str, Any], export: bool = True) -> str:
    """What a cost is of: tokens and protocol, and whatever makes it another one than that of all logits.

    Args:
      export: whether to say how the program was exported, where it was not optimised.
    """
    words = [f"{cost['num_tokens']} tokens", str(cost["setting"]["protocol"])]
    if cost.get("logits", "every") != "every":
        words.append("logits of one token")
    if export and (name := str(cost.get("export", "optimised"))) != "optimised":
        words.append("plain export" if name == "plain" else name)
    if (embedding := str(cost.get("embedding", "shared"))) != "shared":
        words.append(f"{embedding} embedding")
    return ", ".join(words)


def _predicted(model: ModelConfig | None, num_tokens: int) -> dict[str, Any] | None:
    try:
        return model and cost_of_model(model, num_tokens)
    except UserError:
        return None


@functools.lru_cache(64)  # a page asks at several places
def cost_of_model(model: ModelConfig, num_tokens: int = PRIVATE_TOKENS) -> dict[str, Any]:
    """What is predicted of a model on so many tokens, or on its context where that is shorter, as in private.json.

    Raises:
      UserError: an operation of it was not measured.
    """
    num_tokens = min(num_tokens, model.context_length)
    return predicted_cost(predict(model, num_tokens, Setting()), num_tokens)


def measured_kind(kind: str) -> str:
    """The kind of operation whose measured costs these are."""
    return kind.partition(PRICED_AS)[2] or kind


def predicted_cost(costs: Mapping[str, Account], num_tokens: int) -> dict[str, Any]:
    """Costs by kind in the form of private.json; times are of the network alone."""
    total = add(costs.values())
    return dict(
        costs={
            kind: dict(bytes=max(cost.bytes), rounds=cost.rounds, seconds=on_network(cost, NETWORKS["wan"]))
            for kind, cost in costs.items()
        },
        total=dict(warm=dict(bytes=total.bytes, rounds=total.rounds)),
        setting=dict(protocol=f"{Setting().protocol}, predicted", fraction_bits=Setting().fraction_bits),
        num_tokens=num_tokens,
        network="wan, computing left out",
    )


def model_of(history: History) -> ModelConfig | None:
    """A run's model; None where its configuration is not whole."""
    try:
        config = from_json(json.dumps(history.config))
        if not config.model.vocab_size:
            config.model.vocab_size = load_tokenizer(history.workdir.tokenizer).vocab_size
        return model_config(config, config.model.vocab_size)
    except UserError:
        return None
