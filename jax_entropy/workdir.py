"""The folder of a run: where its parts lie, whose it is, and the trained model in it."""

import contextlib
import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from jax_entropy.checkpoint import Checkpointer
from jax_entropy.config import flatten, from_json, model_config, to_json
from jax_entropy.data import Tokenizer, load_tokenizer
from jax_entropy.errors import UserError
from jax_entropy.model import Transformer
from jax_entropy.state import init_state


class Workdir:
    """Paths in a run's folder."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.tokenizer = self.path / "tokenizer.json"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.figures = self.path / "figures"

    def check(self, config: ConfigDict) -> None:
        """Raises UserError if the folder holds another config's run, or cannot be written."""
        if self.config.exists():
            stored, mine = flatten(json.loads(self.read_config_text())), flatten(json.loads(to_json(config)))
            differing = [name for name in sorted(stored | mine) if stored.get(name) != mine.get(name)]
            if differing:
                name = differing[0]
                raise UserError(
                    f"{self.path} holds a run of another config: {name} is {stored.get(name)!r} there and "
                    f"{mine.get(name)!r} here"
                    + (f" (and {len(differing) - 1} more fields differ)" if len(differing) > 1 else "")
                    + "; choose another --workdir"
                )
        with self._written():
            self.path.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.path).close()

    def claim(self, config: ConfigDict, tokenizer: Tokenizer) -> None:
        """Makes the folder this config's run; from now on no other config may train here."""
        with self._written():
            partial = self.path / "partial"  # files appear whole or not at all
            if not self.tokenizer.exists():
                tokenizer.save(partial)
                partial.replace(self.tokenizer)
            partial.write_text(to_json(config))
            partial.replace(self.config)

    @contextlib.contextmanager
    def _written(self):
        try:
            yield
        except OSError as error:
            raise UserError(f"--workdir={self.path} cannot be written: {error.strerror}; choose another") from error

    def read_config_text(self) -> str:
        """config.json. Raises UserError if there is no run here or the file is damaged."""
        try:
            text = self.config.read_text()
            json.loads(text)["architecture"]
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{self.path} holds no run: {self.config} is missing; train one with --workdir") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.config} is damaged ({error}); restore it or choose another --workdir") from None
        return text


class Run(NamedTuple):
    """A trained run, loaded."""

    config: ConfigDict
    model: Transformer
    variables: Any
    tokenizer: Tokenizer
    step: int


def load_run(path: str | Path, notify: Callable[[str], None], *, best: bool = False) -> Run:
    """The model of a workdir's newest good checkpoint, or of the best by validation loss.

    Raises UserError if there is no run, no checkpoint, or none that is undamaged.
    """
    workdir = Workdir(path)
    config = from_json(workdir.read_config_text())
    if not workdir.tokenizer.exists():
        raise UserError(f"{workdir.path} has no tokenizer.json; the run stopped before it trained")
    tokenizer = load_tokenizer(workdir.tokenizer)
    model = Transformer(model_config(config, tokenizer.vocab_size))
    abstract = jax.eval_shape(functools.partial(init_state, config, model))
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), abstract)
    if not workdir.checkpoints.is_dir():
        raise UserError(f"{workdir.path} has no checkpoint yet; train it first")
    with Checkpointer(workdir.checkpoints, notify=notify) as checkpointer:
        step = checkpointer.best_step() if best else checkpointer.latest_step()
        if step is None:
            raise UserError(f"{workdir.path} has no checkpoint yet; train it first")
        state, _ = checkpointer.restore(step, abstract, None)
    return Run(config, model, state.variables, tokenizer, step)
