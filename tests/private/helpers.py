"""A tiny model in the engine and in a workdir, and the parties as processes of their own."""

import functools
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jax_entropy.data.tokenizer import load_tokenizer, train_tokenizer
from jax_entropy.model import Transformer
from jax_entropy.private.engine.engine import Engine
from jax_entropy.private.program.blueprint import Rewrites
from jax_entropy.private.program.export import export
from jax_entropy.private.session.inference import PrivateModel
from jax_entropy.runs.checkpoint import Checkpointer
from jax_entropy.runs.workdir import OWN_TOKENIZER, Workdir
from jax_entropy.state import init_state
from tests import REPOSITORY
from tests.tiny_model import random_tokens, run_config, scattered


def private_model(engine: Engine, config, variables=None, rewrites: Rewrites = Rewrites()) -> PrivateModel:
    """A tiny model with its weights shared."""
    return PrivateModel.of(
        engine, export(config, scattered(config) if variables is None else variables, rewrites, engine.setting)
    )


@functools.cache
def plain_logits(config, num_tokens: int = 16) -> np.ndarray:
    """What the plain model, compiled once, says of `random_tokens`."""
    return np.asarray(jax.jit(Transformer(config).apply)(scattered(config), random_tokens(1, num_tokens))[0][0])


@functools.cache
def greedy(config, prompt: tuple[int, ...], num_tokens: int) -> list[int]:
    """What the plain model writes, the argmax of whole forward passes."""
    forward, ids = jax.jit(Transformer(config).apply), list(prompt)
    for _ in range(num_tokens):
        padded = jnp.asarray([ids + [0] * (config.context_length - len(ids))])
        ids.append(int(np.argmax(forward(scattered(config), padded)[0][0, len(ids) - 1])))
    return ids[len(prompt) :]


def make_workdir(path: Path, architecture: str = "EReg(SM(t)+ScFuFFN)", **fields) -> Path:
    """A run of two layers that was never trained, but whose weights are all at random."""
    config = run_config(architecture, **{"data.vocab_size": 300, **fields})
    tokenizer = train_tokenizer(["def f(x):\n    return x\n", "the private prompt of a test"], 300)
    workdir = Workdir(path)
    path.mkdir(parents=True)
    config.data.tokenizer = OWN_TOKENIZER
    workdir.claim(config, tokenizer)
    from jax_entropy.config import model_config

    model = model_config(config, load_tokenizer(workdir.tokenizer).vocab_size)
    state = jax.jit(functools.partial(init_state, config, Transformer(model)))()
    with Checkpointer(workdir.checkpoints, notify=print) as checkpointer:
        checkpointer.save(
            0, state._replace(params=scattered(model)["params"]), None, dict(config=config.to_dict(), corpus=None)
        )
    return path


def start(*arguments: str, cwd: Path, before: tuple[str, ...] = (), **variables: str) -> subprocess.Popen:
    """`jax-entropy private …` as a process of its own in a folder of its own, or what a command before it runs."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"} | variables
    cwd.mkdir(exist_ok=True)
    return subprocess.Popen(
        [*before, sys.executable, "-m", "jax_entropy", "private", *arguments], cwd=cwd, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, each with the one after it."""
    found = []
    while len(found) < count:
        with socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", 0))
            try:
                two.bind(("127.0.0.1", one.getsockname()[1] + 1))
            except OSError:
                continue
            found.append(one.getsockname()[1])
    return found


def wait_for_line(process: subprocess.Popen, text: str, seconds: float = 60) -> str:
    """The first line of the process's output that holds the text."""
    deadline = time.monotonic() + seconds
    for line in process.stdout:
        if text in line:
            return line
        assert time.monotonic() < deadline
    raise AssertionError(f"{text!r} never came; {process.stderr.read()}")
