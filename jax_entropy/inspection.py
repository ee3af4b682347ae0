"""A doctor for other people's models: what the heads of a Hugging Face decoder do on a text, and its private cost.

`inspect` returns arrays; `findings` says them in sentences, and `inspection_page` puts them on the page of a run.
"""

import dataclasses
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tokenizers

from jax_entropy.architecture import ModelConfig
from jax_entropy.census import ACTIVATION, ACTIVATIONS, KINDS, NORM, PRODUCT, SOFTMAX
from jax_entropy.data.tokenizer import read_backend
from jax_entropy.entropy import extreme_heads, head_bands, max_entropy
from jax_entropy.errors import UserError, check_number, spelled
from jax_entropy.huggingface.decoder import Decoder, read_decoder
from jax_entropy.huggingface.decoders import FAMILIES
from jax_entropy.huggingface.forward import losses
from jax_entropy.huggingface.tokenizer import tokenizer_text
from jax_entropy.paths import local_path
from jax_entropy.private.cost.account import add
from jax_entropy.private.cost.model import predict
from jax_entropy.private.engine.engine import Account, Setting
from jax_entropy.report.costs import PRICED_AS, PRIVATE_TOKENS, measured_kind, predicted_cost
from jax_entropy.report.history import History
from jax_entropy.report.page import page
from jax_entropy.report.verdict import GOOD, LARGE_LOGIT, LOOK, MANY, TROUBLE, Verdict, these
from jax_entropy.runs.reading import Reading
from jax_entropy.runs.workdir import Workdir

_SHOWN_TOKENS = 1024  # of the text on the page
_NONLINEAR = {kind.name for kind in KINDS if kind.group in (SOFTMAX, NORM, ACTIVATION, PRODUCT) and not kind.linear}


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What a model's heads did on R pieces of T tokens.

    Attributes:
      decoder: its sizes and functions.
      tokens: what was read and, one later, predicted, [R, T+1].
      loss: nats, [R, T].
      entropy: of every row of attention, nats, [L, N, R, T].
      sink: weight on the first token, a mean over the queries behind it, [L, N].
      max_logit: the largest, [L, N].
      maximum: the most entropy that a head of the layer can have, nats, [L].
      private: predicted cost of a forward pass over `private_tokens` by kind of operation; empty where `unpriced` says
        why.
    """

    directory: Path
    decoder: Decoder
    tokens: np.ndarray
    loss: np.ndarray
    entropy: np.ndarray
    sink: np.ndarray
    max_logit: np.ndarray
    maximum: np.ndarray
    private: dict[str, Account]
    private_tokens: int
    unpriced: str = ""

    @property
    def head_entropy(self) -> np.ndarray:
        """A mean over pieces and positions, nats, [L, N]."""
        return self.entropy.mean(axis=(2, 3))

    @property
    def entropy_by_position(self) -> np.ndarray:
        """A mean over pieces, nats, [L, N, T]."""
        return self.entropy.mean(axis=2)

    @property
    def bands(self) -> np.ndarray:
        """Shares of heads by quarter of the largest head entropy, from collapse to overload, [4]."""
        return np.asarray(head_bands(self.head_entropy))

    @property
    def overloaded(self) -> np.ndarray:
        """Heads above three quarters of what causal attention can have, [L, N]."""
        return extreme_heads(self.head_entropy, self.maximum[:, None])[0]

    @property
    def collapsed(self) -> np.ndarray:
        """Heads below one quarter of it, [L, N]."""
        return extreme_heads(self.head_entropy, self.maximum[:, None])[1]

    @property
    def sinks(self) -> np.ndarray:
        """Heads with more than half of their weight on the first token, [L, N]."""
        return self.sink > 0.5

    @property
    def perplexity(self) -> float:
        return math.exp(min(float(self.loss.mean()), 700))


def inspect(
    directory: str | os.PathLike,
    text: str | Sequence[int] | np.ndarray | None = None,
    *,
    num_tokens: int = 1024,
    context_length: int = 256,
) -> Inspection:
    """Reads a text with a model of GPT-2's, GPT-NeoX's, Llama's or Qwen2's kind, and watches its heads.

    Args:
      directory: local folder with config.json, safetensors, whole or in shards, and a tokenizer for a text.
      text: the text, or its token ids; None: from Python's language reference.
      num_tokens: that are read at most.
      context_length: of a piece; no longer than the model's.
    Raises:
      UserError: what cannot be read, in a sentence.
    """
    directory = local_path(directory, "directory")
    for name, value in (("num_tokens", num_tokens), ("context_length", context_length)):
        check_number(name, value, 2)  # a first token has nothing to look at but itself
    decoder, weights = read_decoder(directory, FAMILIES)
    tokens = _tokens(directory, decoder, _reference() if text is None else text, num_tokens)
    T = min(context_length, decoder.context_length, num_tokens, len(tokens) - 1)
    rows = max(1, min(num_tokens // T, (len(tokens) - 1) // T))
    tokens_RxT1 = np.stack([tokens[i * T : i * T + T + 1] for i in range(rows)])
    loss, heads = losses(decoder, weights, tokens_RxT1)
    private_tokens = min(PRIVATE_TOKENS, T)
    private, unpriced = _private(decoder, private_tokens)
    return Inspection(
        directory=directory,
        decoder=decoder,
        tokens=tokens_RxT1,
        loss=loss,
        entropy=np.moveaxis(heads.entropy, 1, 2),
        sink=heads.sink[..., 1:].mean(axis=(1, 3)),
        max_logit=heads.max_logit.max(axis=(1, 3)),
        maximum=np.array([max_entropy(T, "causal", window=window) for window in decoder.windows]),
        private=private,
        private_tokens=private_tokens,
        unpriced=unpriced,
    )


def findings(inspection: Inspection) -> Iterator[str]:
    """What was found, most important first, a sentence each."""
    entropy_LxN = inspection.head_entropy
    if not np.isfinite(entropy_LxN).all():
        yield f"Attention is not finite in {_layers(~np.isfinite(entropy_LxN))}."
    for found_LxN, what in (
        (inspection.overloaded, "overloaded, above ¾ of the entropy that causal attention can have"),
        (inspection.collapsed, "collapsed, below ¼ of it"),
        (inspection.sinks, "sinks, more than half of their weight on the first token"),
    ):
        count = int(found_LxN.sum())
        where = f": {_layers(found_LxN)}" if count else ""
        yield f"{count} of {found_LxN.size} heads are {what}{where}."
    if np.isfinite(inspection.max_logit).any():
        layer, head = np.unravel_index(np.nanargmax(inspection.max_logit), inspection.max_logit.shape)
        largest = inspection.max_logit[layer, head]
        risky = f", beyond {LARGE_LOGIT:g}, where training becomes unstable" if largest > LARGE_LOGIT else ""
        yield f"The largest attention logit is {largest:,.4g}, in layer {layer}, head {head}{risky}."
    if inspection.unpriced:
        yield f"Private execution is not predicted: {inspection.unpriced}."
        return
    total = add(inspection.private.values())
    nonlinear = {kind: cost for kind, cost in inspection.private.items() if measured_kind(kind) in _NONLINEAR}
    share = add(nonlinear.values()).bytes[0] / total.bytes[0]
    most = max(nonlinear, key=lambda kind: nonlinear[kind].bytes[0])
    yield (
        f"A private forward pass over {inspection.private_tokens} tokens would send {total.bytes[0] / 1e6:,.0f} MB in "
        f"{total.rounds:,} rounds ({Setting().protocol}, predicted), {100 * share:.0f} % of it for nonlinearities and "
        f"{100 * nonlinear[most].bytes[0] / total.bytes[0]:.0f} % for {most} alone."
    )


def inspection_page(inspection: Inspection) -> str:
    """The page of a run, of one step."""
    total, extreme = inspection.overloaded.size, inspection.overloaded.sum() + inspection.collapsed.sum()
    level = LOOK if extreme > MANY * total or inspection.max_logit.max() > LARGE_LOGIT else GOOD
    level = level if np.isfinite(inspection.head_entropy).all() else TROUBLE
    return page([_history(inspection)], verdicts=[Verdict(level, [*findings(inspection)], [])])


def _history(inspection: Inspection) -> History:
    decoder, entropy_LxN = inspection.decoder, inspection.head_entropy
    T, step = inspection.loss.shape[1], np.zeros(1)
    R, context_L = max(1, _SHOWN_TOKENS // T), np.array([max_entropy(T, window=w) for w in decoder.windows])
    finite_L = np.isfinite(entropy_LxN).all(axis=1)
    train = dict(
        step=step,
        head_entropy=entropy_LxN[None],
        layer_entropy=entropy_LxN.mean(axis=1)[None],
        head_max_logit=inspection.max_logit[None],
        max_logit=inspection.max_logit.max(axis=1)[None],
        head_sink=inspection.sink[None],
        bands_observed=inspection.bands[None],
        bands_context=np.asarray(head_bands(entropy_LxN, context_L[:, None]))[None],
        bands_causal=np.asarray(head_bands(entropy_LxN, inspection.maximum[:, None]))[None],
        maximum_context=context_L[None],
        maximum_causal=inspection.maximum[None],
        nan_count=(~finite_L)[None].astype(float),
        inf_count=np.zeros((1, decoder.num_layers)),
        cross_entropy=inspection.loss.mean(keepdims=True)[0],
    )
    sizes = ("num_layers", "num_heads", "model_dim", "vocab_size")
    return History(
        workdir=Workdir(inspection.directory),
        config=dict(
            architecture=architecture_words(decoder),
            data=dict(source="a text"),
            model={name: getattr(decoder, name) for name in sizes} | dict(context_length=T),
        ),
        train=train,
        evaluate={},
        private=None if inspection.unpriced else predicted_cost(inspection.private, inspection.private_tokens),
        text=[Reading(inspection.tokens[:R], inspection.loss[:R], inspection.entropy[:, :, :R], step=0)],
        read="this text",
        windows=decoder.windows,
        pieces=[_pieces(inspection.directory, tokens_T) for tokens_T in inspection.tokens[:R]],
    )


def architecture_words(decoder: Decoder) -> str:
    """What a decoder is made of, in words."""
    norm = {"layer": "LayerNorm", "rms": "RMSNorm"}[decoder.norm]
    activation = {"silu": "SiLU"}.get(decoder.activation) or ACTIVATIONS[decoder.activation]
    grouped = f", {decoder.num_groups} heads of keys" if decoder.num_groups != decoder.num_heads else ""
    positions = "rotary positions" if decoder.frequencies else "learned positions"
    return f"softmax, {norm}, {'gated ' if decoder.gated else ''}{activation}, {positions}{grouped}"


def _pieces(directory: Path, tokens_T: np.ndarray) -> list[str]:
    """The text that each token adds, of whatever kind the tokenizer is; ids where there is none."""
    tokenizer, ids = _tokenizer(directory), [*map(int, tokens_T)]
    if tokenizer is None:
        return [f"{token} " for token in ids]
    pieces, start, before = [], 0, ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[start:end], skip_special_tokens=False)
        whole = not text.endswith("\ufffd")  # a character of several tokens belongs to the one that completes it
        pieces.append(text.removeprefix(before) if whole else "")
        if whole:  # what follows is read from the last token on: a first one is decoded otherwise than the next
            start, before = end - 1, tokenizer.decode(ids[end - 1 : end], skip_special_tokens=False)
    return pieces


def _layers(found_LxN: np.ndarray) -> str:
    return these("layer", np.flatnonzero(found_LxN.any(axis=1)).tolist())


def _reference() -> str:
    """English prose that every Python has."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))[: 1 << 16]


def _tokenizer(directory: Path) -> tokenizers.Tokenizer | None:
    if (stored := tokenizer_text(directory)) is None:
        return None
    try:
        return read_backend(stored)
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"the tokenizer of {directory} cannot be used: {error}") from None


def _first_tokens(tokenizer: tokenizers.Tokenizer, text: str, count: int) -> list[int]:
    """More than `count` tokens from the beginning of a text, or all: a book need not be cut up for a page of it."""
    length = 16 * count
    while len(ids := tokenizer.encode(text[:length]).ids) <= 2 * count and length < len(text):
        length *= 4
    return ids


def _tokens(directory: Path, decoder: Decoder, text: str | Sequence[int] | np.ndarray, num_tokens: int) -> np.ndarray:
    if isinstance(text, str):
        if (tokenizer := _tokenizer(directory)) is None:
            raise UserError(f"{directory} has no tokenizer.json, nor vocab.json and merges.txt; put them there")
        text = _first_tokens(tokenizer, text, num_tokens)
    if not isinstance(text, Sequence | np.ndarray):
        raise UserError(f"text={spelled(text)} must be text, or its token ids")
    tokens = np.asarray(text)
    if tokens.ndim != 1 or len(tokens) < 3 or not np.issubdtype(tokens.dtype, np.integer):
        raise UserError(f"text must be at least three tokens long, not {tokens.size}")
    if not 0 <= tokens.min() <= tokens.max() < decoder.vocab_size:
        raise UserError(
            f"text has the token {tokens.max() if tokens.min() >= 0 else tokens.min()}, and the model of {directory} "
            f"has vocab_size={decoder.vocab_size}"
        )
    return tokens.astype(np.int32)


def _private(decoder: Decoder, num_tokens: int) -> tuple[dict[str, Account], str]:
    """Costs by kind, of the model of ours that computes the same kinds of operation; or why there are none.

    SiLU is priced as GELU, which takes as many products; heads that share keys, as if each had its own; those of
    another width than D/N, as if they had that; windows, as if they saw everything.
    """
    norm, activation = decoder.norm, {"silu": "gelu_tanh"}.get(decoder.activation, decoder.activation)
    try:
        config = ModelConfig(
            num_layers=decoder.num_layers, num_heads=decoder.num_heads, model_dim=decoder.model_dim,
            ffn_dim=decoder.hidden_dim, context_length=num_tokens, vocab_size=decoder.vocab_size, norm=norm,
            final_norm=norm, bias="all", rotary=bool(decoder.frequencies), learned_positions=not decoder.frequencies,
            activation="identity" if decoder.gated else activation, ffn="bilinear" if decoder.gated else "full",
        )  # fmt: skip
        costs = predict(config, num_tokens, Setting())
        if decoder.gated:
            ungated = dataclasses.replace(config, ffn="full", activation=activation)
            costs[ACTIVATIONS[activation]] = predict(ungated, num_tokens, Setting())[ACTIVATIONS[activation]]
        if decoder.activation == "silu":
            costs = {
                f"SiLU{PRICED_AS}{kind}" if kind == ACTIVATIONS[activation] else kind: costs[kind] for kind in costs
            }
        return costs, ""
    except UserError as error:
        return {}, str(error)
