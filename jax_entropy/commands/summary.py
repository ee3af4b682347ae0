"""What a person sees when training ends: held-out quality, entropies of every head, samples, and where things are."""

import os
from typing import Any

import jax
from ml_collections import ConfigDict
from rich.console import Console

from jax_entropy.generate import generate
from jax_entropy.report import print_head_entropy, report
from jax_entropy.runs.load import Run
from jax_entropy.runs.workdir import Workdir
from jax_entropy.training.train import Result

_SAMPLES = 3
_SAMPLE_TOKENS = 48


def print_evaluation(evaluation: dict[str, Any], console: Console) -> None:
    """Held-out perplexity and the entropies of every head, as `evaluate` returns them."""
    console.print(
        f"\nstep {evaluation['step']}, {evaluation.get('text', 'held out')}: "
        f"perplexity {evaluation['validation_perplexity']:.3f}, "
        f"{evaluation['bits_per_byte']:.4f} bits per byte, {evaluation['tokens']:,} tokens\n"
    )
    print_head_entropy(evaluation["head_entropy"], float(evaluation["maximum_causal"].max()), console)


def samples(run: Run, prompt: str) -> list[str]:
    """What the model writes after a prompt; nothing where its context has no room behind it."""
    context = run.model.config.context_length
    tokens = min(_SAMPLE_TOKENS, context // 2, context - len(run.tokenizer.encode(prompt)))
    seeds = range(_SAMPLES) if tokens > 0 else ()
    return [generate(run, prompt, num_tokens=tokens, top_k=40, seed=seed) for seed in seeds]


def conclude(config: ConfigDict, path: str | os.PathLike, result: Result, command: str, console: Console) -> None:
    """Prints the end of a run and writes its report; `command` is what goes on with a stopped one."""
    workdir = Workdir(path)
    if not result.complete:
        console.print(f"stopped and saved at step {result.step} of {config.train.num_steps}; to go on:\n  {command}")
        return
    if result.start == result.step and not result.evaluation:
        console.print(f"the run in {workdir.path} is complete ({result.step} steps); nothing to train")
    if result.evaluation:
        print_evaluation(result.evaluation, console)
    prompt = "def __init__(self" if config.data.source in ("stdlib", "codeparrot") else "The"
    variables = jax.device_get(result.variables)
    run = Run(workdir, config, result.model, variables, result.corpus.tokenizer, result.step, result.corpus.fingerprint)
    texts = samples(run, prompt)
    workdir.write_samples(result.step, prompt, texts)
    for seed, text in enumerate(texts):
        console.rule(f"sample {seed + 1}", style="dim")
        console.print(prompt + text, markup=False, highlight=False)
    console.rule(style="dim")
    report(workdir.path)
    console.print(
        f"figures     {workdir.figures}\nreport      {workdir.report}\nmetrics     {workdir.metrics}\n"
        f"checkpoint  {workdir.checkpoints / str(result.step)}",
        highlight=False,
    )
