"""The command line: `jax-entropy COMMAND --flag=value …` parses, then calls one function.

Exit codes: 0 done or cleanly stopped, 2 a mistake of the user's, said in one sentence on stderr, 1 anything else.
"""

import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from jax_entropy.commands.console import console
from jax_entropy.commands.parse import Parse
from jax_entropy.errors import UserError, nearest

# glibc reads it when a process starts, and from nowhere else
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def train(parse: Parse) -> None:
    """Trains the run of a config in a workdir, or goes on with it; there --config may be left out."""
    values = parse.flags(
        config=True,
        workdir=True,
        distributed=(False, "one of several processes of one run"),
        profile=(0, "steps to trace into the workdir's folder `profile`"),
    )
    import jax

    from jax_entropy.commands.summary import conclude
    from jax_entropy.training.train import train as run

    if values.distributed:
        # jax would take SIGTERM for itself; the loop saves and stops on it
        jax.config.update("jax_enable_preemption_service", False)
        count, index = (os.environ.get(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
        jax.distributed.initialize(num_processes=count and int(count), process_id=index and int(index))
    out = console()
    result = run(
        values.config, values.workdir, notify=lambda line: out.print(line, markup=False), profile=values.profile
    )
    if jax.process_index() == 0:
        conclude(values.config, values.workdir, result, shlex.join(["jax-entropy", "train", *parse.arguments]), out)


def status(parse: Parse) -> None:
    """Where a run is, told from outside: `status WORKDIR`."""
    parse.arguments = [a if a.startswith("-") else f"--workdir={a}" for a in parse.arguments]
    workdir = parse.flags(workdir=True).workdir
    from jax_entropy.runs.status import describe

    print(describe(workdir))


def evaluate(parse: Parse) -> None:
    """Held-out perplexity, bits per byte and head entropies of a run's checkpoint."""
    values = parse.flags(
        workdir=True,
        best=(False, "the best checkpoint by validation loss instead of the newest"),
        batch_size=(32, "sequences evaluated at once; does not change the numbers"),
    )
    from jax_entropy.commands.summary import print_evaluation
    from jax_entropy.evaluate import evaluate_run

    evaluation = evaluate_run(values.workdir, best=values.best, batch_size=values.batch_size, notify=_warn)
    print_evaluation(evaluation, console())


def generate(parse: Parse) -> None:
    """Text that a trained model writes after a prompt."""
    values = parse.flags(
        workdir=True,
        prompt=("", "text to go on from"),
        prompt_file=("", "file that holds the prompt; '-' is stdin"),
        tokens=(64, "tokens to write at most"),
        temperature=(0.8, "of the sampling; 0 is greedy"),
        top_k=(0, "sample among the k likeliest tokens; 0: among all"),
        seed=(0, "of the sampling"),
        best=(False, "the best checkpoint by validation loss instead of the newest"),
    )
    prompt = _read_prompt(values.prompt, values.prompt_file)
    from jax_entropy.generate import generate as run
    from jax_entropy.runs.load import load_run

    loaded = load_run(values.workdir, _warn, best=values.best)
    text = run(
        loaded.model, loaded.variables, loaded.tokenizer, prompt, num_tokens=values.tokens,
        temperature=values.temperature, top_k=values.top_k, seed=values.seed,
    )  # fmt: skip
    print(prompt + text)


def report(parse: Parse) -> None:
    """Figures and an HTML page of a run, and of two runs side by side."""
    values = parse.flags(workdir=True, against=("", "folder of another run, drawn beside this one in comparison.png"))
    from jax_entropy.report import report as draw

    written = draw(values.workdir, values.against or ())
    page = written.pop("page")
    print(f"{len(written)} figures are in {page.parent / 'figures'}, those of this run on one page in {page}")
    if values.against:
        print(f"comparison  {written['comparison']}")


def convert(parse: Parse) -> None:
    """A Hugging Face GPT-2 folder as a workdir, or a workdir as such a folder."""
    values = parse.flags(
        workdir=True,
        huggingface=("", "folder with config.json, model.safetensors and tokenizer.json"),
        to=("", "what to write: workdir | huggingface"),
        best=(False, "into a folder, the best checkpoint by validation loss instead of the newest"),
    )
    if values.to not in ("workdir", "huggingface"):
        raise UserError(f"--to={values.to!r} is not known{nearest(values.to, ('workdir', 'huggingface'))}")
    if not values.huggingface:
        raise UserError("--huggingface is missing")
    from jax_entropy.huggingface.convert import export_run, import_run

    if values.to == "workdir":
        import_run(values.huggingface, values.workdir, notify=_warn)
    else:
        export_run(values.workdir, values.huggingface, notify=_warn, best=values.best)
    print(f"wrote {values.workdir if values.to == 'workdir' else values.huggingface}")


def census(parse: Parse) -> None:
    """FLOPs, nonlinear operations and private cost of a model: of --config=…, or of --architecture=…."""
    from_config = any(argument.startswith("--config") for argument in parse.arguments)
    size = dict(
        num_layers=(12, "blocks"), num_heads=(12, "heads in a block"), model_dim=(768, "width"),
        context_length=(128, "tokens"), vocab_size=(50257, "entries of the tokenizer"),
    )  # fmt: skip
    notation = ("", "in the paper's notation, like SM+LN+G")
    values = parse.flags(config=True) if from_config else parse.flags(architecture=notation, **size)
    from jax_entropy.architecture import architecture
    from jax_entropy.census import census as count
    from jax_entropy.commands.census import print_census
    from jax_entropy.config import check, model_config
    from jax_entropy.private.cost.measure import print_costs

    if from_config:
        check(values.config)
        model = model_config(values.config, values.config.model.vocab_size or values.config.data.vocab_size)
    elif values.architecture:
        model = architecture(values.architecture, **{name: values[name].value for name in size})
    else:
        raise UserError("--architecture is missing; give one like --architecture=SM+LN+G, or --config=file.py")
    out = console()
    print_census(count(model), out)
    print_costs(model, out)


def plan(parse: Parse) -> None:
    """What a config's run needs on a TPU slice or on GPUs, without having any: memory, time, chip-hours."""
    values = parse.flags(
        config=True,
        topology=("", "v5e:16x16, v5p:4x4x4, v6e:16x16, h100:8, …"),
        mesh=("", "DATA,FSDP,TENSOR instead of the config's; one may be -1, the rest"),
        search=(False, "try the meshes that batch and heads allow, with remat where needed, and rank those that fit"),
        efficiency=(0.5, "share of the chips' published rates that a run is taken to reach"),
    )
    if not values.topology:
        raise UserError("--topology is missing; an example is --topology=v5e:16x16")
    if not 0 < values.efficiency <= 1:
        raise UserError(f"--efficiency={values.efficiency} must lie above 0 and be at most 1")
    from jax_entropy.plan import compile as planning

    if values.mesh:
        planning.set_mesh(values.config, values.mesh)
    if values.search:
        planning.print_search(
            planning.search(values.config, values.topology, notify=_warn), values.efficiency, console()
        )
    else:
        planning.print_plan(planning.plan(values.config, values.topology), values.efficiency, console())


def private(parse: Parse) -> None:
    """A trained model under secure computation: `private setup`, `generate`, `profile`, `compare`, `serve`, `ask`, …"""
    from jax_entropy.commands.private import private as run

    run(parse)


def bench(parse: Parse) -> None:
    """Speed and memory: `bench attention`, `bench step` (beside PyTorch's), `bench data` or `bench monitoring`."""
    what = parse.word(dict(
        attention="Attention, blockwise beside dense.", step="A step of training, beside PyTorch's.",
        data="The loader, beside a step of training.", monitoring="What watching costs a step.",
    ))  # fmt: skip
    if what == "attention":
        from jax_entropy.bench.attention import bench_attention

        values = parse.flags(rounds=(10, "calls of each implementation"))
        _check_rounds(values.rounds)
        rows = bench_attention(rounds=values.rounds)
    elif what == "step":
        from jax_entropy.bench.step import bench_step

        values = parse.flags(
            rounds=(10, "steps of each contender, in turn"),
            peer_python=("", "a Python with torch and transformers; unset: this one, if it has them"),
        )
        _check_rounds(values.rounds)
        rows = bench_step(rounds=values.rounds, peer_python=values.peer_python, notify=_warn)
    elif what == "data":
        from jax_entropy.bench.data import bench_feeding

        rows = [bench_feeding(parse.flags(config=True).config)]
    else:
        from jax_entropy.bench.monitoring import bench_monitoring

        rows = [bench_monitoring(parse.flags(config=True).config)]
    from jax_entropy.bench import print_rows

    print_rows(rows, console())


COMMANDS = {
    function.__name__: function
    for function in (train, status, evaluate, generate, report, convert, census, plan, private, bench)
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code."""
    code = 1
    try:
        code = _run(argv)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads, `head` for instance, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception:
        traceback.print_exc()
    if code and "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized():
        # a failed process must not wait for its peers, which wait for it
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _run(argv: Sequence[str] | None) -> int:
    name, *arguments = [*(sys.argv[1:] if argv is None else argv), ""][:-1] or ["help"]
    if name in ("help", "--help", "-h"):
        print("jax-entropy COMMAND --flag=value …\n")
        for command, function in COMMANDS.items():
            print(f"  {command:10}{function.__doc__.splitlines()[0]}")
        print("\njax-entropy COMMAND --help lists a command's flags.")
        return 0
    if argv is None and name in ("train", "bench"):
        _use_huge_pages()
    try:
        if name not in COMMANDS:
            raise UserError(f"there is no command {name!r}{nearest(name, COMMANDS)}")
        COMMANDS[name](Parse(name, COMMANDS[name].__doc__, arguments))
    except UserError as error:
        print(f"jax-entropy: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("jax-entropy: interrupted; the same command starts again", file=sys.stderr)
        return 1
    return 0


def _use_huge_pages() -> None:
    """Starts this program again with large buffers in huge pages: page faults are a sixth of a step on CPU."""
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.execve(sys.executable, sys.orig_argv, os.environ | HUGE_PAGES)


def _check_rounds(rounds: int) -> None:
    if rounds < 1:
        raise UserError(f"--rounds={rounds} must be at least 1")


def _warn(line: str) -> None:
    print(line, file=sys.stderr)


def _read_prompt(prompt: str, prompt_file: str) -> str:
    if not prompt_file:
        return prompt
    try:
        return sys.stdin.read() if prompt_file == "-" else Path(prompt_file).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompt_file={prompt_file} cannot be read: {error}") from None
