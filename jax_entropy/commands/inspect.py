"""`jax-entropy inspect`: the entropy picture of a model that is not ours, in the terminal, as JSON, and as the page."""

import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax_entropy.commands.console import console, table, warn, write_json
from jax_entropy.commands.parse import JSON, MODEL, Flag, command
from jax_entropy.paths import as_text, reading, writing

if TYPE_CHECKING:
    from rich.console import Console

    from jax_entropy.inspection import Inspection


@command(
    MODEL,
    Flag("text", None, "file of text to read; - is standard input; else Python's language reference", kind=Path),
    Flag("tokens", 1024, "that are read at most"),
    Flag("context_length", 256, "tokens of a piece; no longer than the model's"),
    Flag("page", None, "file for the page", kind=Path, endings=(".html",)),
    JSON,
    examples=["inspect pythia-70m/", "inspect Qwen2.5-0.5B/ --text=book.txt --page=qwen.html --json=qwen.json"],
)
def inspect(values: Namespace) -> None:
    """Head entropies, sinks, logits and private cost of a GPT-2, GPT-Neo, Pythia, Llama, Mistral or Qwen2 on a text."""
    text = _read(values.text) if values.text else None
    from jax_entropy.inspection import findings, inspection_page
    from jax_entropy.inspection import inspect as run

    found = run(values.model, text, num_tokens=values.tokens, context_length=values.context_length)
    _print(found, list(findings(found)), console(values.json))
    if values.page:
        with writing(values.page, "--page"):
            values.page.write_text(inspection_page(found), encoding="utf-8", errors="backslashreplace")
        warn(f"wrote {values.page}")
    write_json(values.json, _numbers(found) | dict(findings=list(findings(found))))


def _read(path: Path) -> str:
    with reading(path, "--text"):
        content = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    return as_text(content, f"--text={path}")


def _print(found: "Inspection", sentences: list[str], console: "Console") -> None:
    from jax_entropy.inspection import architecture_words
    from jax_entropy.report import print_head_entropy

    (R, T), decoder = found.loss.shape, found.decoder
    console.print(
        f"{found.directory.resolve().name}: {architecture_words(decoder)}; {decoder.num_layers} layers, "
        f"{decoder.num_heads} heads, width {decoder.model_dim}; {R} × {T} tokens, perplexity {found.perplexity:.4g}\n"
    )
    print_head_entropy(found.head_entropy, float(found.maximum.max()), console)
    console.print()
    for sentence in sentences:
        console.print(f"• {sentence}")
    if found.private:
        rows = [(kind, f"{cost.bytes[0] / 1e6:,.1f}", f"{cost.rounds:,}") for kind, cost in found.private.items()]
        rows.sort(key=lambda row: -float(row[1].replace(",", "")))
        console.print()
        console.print(table([f"private, predicted, {found.private_tokens} tokens", "MB sent", "rounds"], rows))


def _numbers(found: "Inspection") -> dict[str, Any]:
    return dict(
        model=str(found.directory),
        decoder=found.decoder._asdict(),
        tokens=found.loss.size,
        loss=float(found.loss.mean()),
        perplexity=found.perplexity,
        head_entropy=found.head_entropy,
        maximum=found.maximum,
        bands=found.bands,
        overloaded=found.overloaded,
        collapsed=found.collapsed,
        sink=found.sink,
        max_logit=found.max_logit,
        entropy_by_position=found.entropy_by_position.mean(axis=1),
        private=dict(num_tokens=found.private_tokens, costs=found.private, unpriced=found.unpriced),
    )
