"""What is done with a run: `jax-entropy status`, `evaluate`, `generate`, `report` and `convert`."""

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from jax_entropy.commands.console import console, output, say, warn, write_json
from jax_entropy.commands.parse import BEST, CONFIG, JSON, WORKDIR, Flag, Names, command
from jax_entropy.errors import UserError
from jax_entropy.paths import as_text, local_path, reading

PROMPT = Flag("prompt", "", "text to go on from")
PROMPT_FILE = Flag("prompt_file", None, "file that holds the prompt, as it is; - is standard input", kind=Path)


@command(WORKDIR, JSON, examples=["status runs/quickstart"])
def status(values: Namespace) -> None:
    """Where a run is, or all runs of a sweep, told from outside; also of one that died, and why."""
    from jax_entropy.runs.status import describe, runs_in
    from jax_entropy.runs.workdir import Workdir

    text = describe(values.workdir)
    if str(values.json) != "-":
        say(text)
    own = Workdir(values.workdir).read_status()
    write_json(values.json, own or {str(run.path): run.read_status() for run in runs_in(values.workdir)})


@command(
    WORKDIR,
    BEST,
    Flag("batch_size", 32, "sequences evaluated at once; does not change the numbers"),
    Flag("text", None, "file of text to evaluate on instead of the run's held-out text, all of it", kind=Path),
    CONFIG._replace(required=False, help="another config than the run's, to evaluate on what its data holds out"),
    JSON,
    examples=[
        "evaluate runs/quickstart",
        "evaluate runs/quickstart --best --json=-",
        "evaluate runs/gpt2 --text=book.txt",
        "evaluate runs/gpt2 --config.data.source=files --config.data.files=texts/",
    ],
)
def evaluate(values: Namespace) -> None:
    """Held-out perplexity, bits per byte and head entropies of a run's checkpoint, or on a text of one's choice."""
    if others := [name for name in values.fields if not name.startswith("data.")]:
        raise UserError(f"--config.{others[0]} changes nothing here: of a config only its data is used")
    if values.text and (values.fields or "config" in values.given):
        raise UserError("--text and --config exclude each other: each names a text")
    from jax_entropy.commands.summary import print_evaluation
    from jax_entropy.evaluate import evaluate as run

    section = values.config.data if values.fields or "config" in values.given else None
    evaluation = run(
        values.workdir, best=values.best, batch_size=values.batch_size, text=values.text, section=section, notify=warn
    )
    print_evaluation(evaluation, console(values.json))
    write_json(values.json, evaluation)


@command(
    WORKDIR,
    PROMPT,
    PROMPT_FILE,
    Flag("tokens", 64, "tokens to write at most"),
    Flag("temperature", 0.8, "of the sampling; 0 is greedy"),
    Flag("top_k", 0, "sample among the k likeliest tokens; 0: among all"),
    Flag("seed", 0, "of the sampling"),
    BEST,
    examples=[
        "generate runs/quickstart --prompt='def ' --tokens=60",
        "generate runs/quickstart --prompt_file=- --temperature=0 < beginning.py",
    ],
)
def generate(values: Namespace) -> None:
    """Text that a trained model writes after a prompt."""
    prompt = read_prompt(values.prompt, values.prompt_file)
    from jax_entropy.generate import generate as run

    text = run(
        values.workdir, prompt, num_tokens=values.tokens, temperature=values.temperature, top_k=values.top_k,
        seed=values.seed, best=values.best, notify=warn,
    )  # fmt: skip
    say(prompt + text)


@command(
    WORKDIR,
    Names("others", "folders of other runs, on the same page"),
    Flag(
        "against", None, "folder of another run, the same as a second word; may be repeated", kind=Path, repeated=True
    ),
    Flag("figures", "png", "kind of the figures", choices=("png", "svg", "pdf")),
    Flag(
        "page",
        None,
        "file for the page; else report.html in the folder of the first run",
        kind=Path,
        endings=(".html",),
    ),
    Flag("sweep", None, "folder of a sweep, whose frontier is on the page too", kind=Path),
    JSON,
    Flag("csv", None, "file for the numbers, one a line", kind=Path, endings=(".csv",)),
    examples=[
        "report runs/quickstart",
        "report runs/* --page=all.html",
        "report runs/quickstart --figures=pdf --json=numbers.json --csv=numbers.csv",
    ],
)
def report(values: Namespace) -> None:
    """Figures of a run and a page on which all of it moves; of several runs, what differs between them."""
    _leave_accelerators()
    from jax_entropy.report import numbers, read_history
    from jax_entropy.report import report as draw

    others = [*values.against, *(local_path(name, "workdir") for name in values.others)]
    written = draw(
        values.workdir, others, figures=values.figures, page_file=values.page, csv_file=values.csv, sweep=values.sweep
    )
    file = output(values.json)
    for name in ("page", "csv"):
        if path := written.pop(name, None):
            say(f"{name:11} {path}", file)
    say(f"figures     {len(written)} in {next(iter(written.values())).parent}", file)
    if values.json:
        write_json(values.json, numbers([read_history(path) for path in (values.workdir, *others)]))


@command(
    WORKDIR,
    Flag("port", 8008, "on 127.0.0.1; 0: any that is free"),
    examples=["watch runs/quickstart"],
)
def watch(values: Namespace) -> None:
    """The page of a run in a browser of this machine, while the run trains; Ctrl-C ends it."""
    _leave_accelerators()
    from jax_entropy.report import watch as serve

    serve(values.workdir, notify=say, port=values.port)


def _leave_accelerators() -> None:
    """Looking at a run must not take the accelerator that it trains on."""
    import jax

    jax.config.update("jax_platforms", "cpu")


_FOLDERS = ("huggingface", "safetensors", "transformer_lens")


@command(
    WORKDIR,
    Flag("to", None, "what to write", choices=("workdir", *_FOLDERS), required=True),
    Flag("huggingface", None, "folder of a GPT-2 for transformers: read with --to=workdir, else written", kind=Path),
    Flag("safetensors", None, "folder of any model of ours: read with --to=workdir, else written", kind=Path),
    Flag("transformer_lens", None, "folder for a model without normalisation, for HookedTransformer", kind=Path),
    BEST,
    examples=[
        "convert runs/gpt2 --to=workdir --huggingface=gpt2/",
        "convert runs/again --to=workdir --safetensors=exported/",
        "convert runs/baseline --to=huggingface --huggingface=exported/",
        "convert runs/quickstart --to=safetensors --safetensors=exported/ --best",
    ],
)
def convert(values: Namespace) -> None:
    """A run's model as a folder for other programs, with its card; or such a folder, also a GPT-2's, as a run."""
    names = ("huggingface", "safetensors") if values.to == "workdir" else (values.to,)
    named = [name for name in _FOLDERS if name in values.given]
    for other in named:
        if other not in names:
            raise UserError(f"--{other} does not go with --to={values.to}, whose folder is {_either(names)}")
    if len(named) != 1:
        raise UserError(
            f"{_either(named)}: each names a folder, and one is enough" if named else f"{_either(names)} is missing"
        )
    folder = getattr(values, named[0])
    if values.to == "workdir":
        if values.best:
            raise UserError("--best chooses among a run's checkpoints, and --to=workdir reads a folder")
        from jax_entropy.huggingface.convert import import_run

        import_run(folder, values.workdir, notify=warn)
        return say(f"wrote {values.workdir}")
    from jax_entropy.export import export_run

    export_run(values.workdir, folder, values.to, notify=warn, best=values.best)
    say(f"wrote {folder}")


def _either(names: Sequence[str]) -> str:
    return " or ".join(f"--{name}" for name in names)


def read_prompt(prompt: str, prompt_file: Path | None) -> str:
    """The text of --prompt, or of --prompt_file as it is.

    Raises:
      UserError: it cannot be read as UTF-8.
    """
    name, content = "--prompt", prompt.encode(errors="surrogateescape")
    if prompt_file is not None:
        if prompt:
            raise UserError("--prompt and --prompt_file exclude each other")
        name = f"--prompt_file={prompt_file}"
        with reading(prompt_file, "--prompt_file"):
            content = sys.stdin.buffer.read() if str(prompt_file) == "-" else prompt_file.read_bytes()
    return as_text(content, name)
