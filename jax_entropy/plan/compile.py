"""What a run will need on a pod, before one is rented: the real training step, compiled without the hardware.

Memory is the compiler's; network and memory traffic are read off the compiled program; FLOPs are counted by `census`.
"""

import dataclasses
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jax_entropy.annealing import trained_model
from jax_entropy.architecture import CHOICES, ModelConfig
from jax_entropy.census import Census, census
from jax_entropy.chips import Chip
from jax_entropy.config import check
from jax_entropy.data.tokenizer import vocabulary
from jax_entropy.errors import UserError
from jax_entropy.model import Transformer
from jax_entropy.plan.hlo import Collective, Program
from jax_entropy.plan.topology import devices_of, kept_stderr
from jax_entropy.sharding import batch_sharding, config_mesh
from jax_entropy.state import abstract_state, jit_train_step

_REMATERIALIZED = "nvoluntary full rematerialization"


@dataclasses.dataclass(frozen=True)
class Plan:
    """One mesh on one topology; bytes, FLOPs and seconds are of one device and one step."""

    topology: str
    chip: Chip
    mesh: tuple[int, ...]  # data, fsdp, tensor
    remat: str  # as in config.model
    tokens: int  # in a step, over all devices
    num_steps: int
    flops: float  # of the model: forward once, backward twice
    executed_flops: float  # with what the backward pass computes again
    arguments: int  # parameters, optimiser state and the batch
    temporaries: int | None  # None: the compiler stopped before it knew
    peak: float  # what the compiler needs
    collectives: dict[str, Collective] = dataclasses.field(default_factory=dict)
    traffic: float = 0.0
    launches: int = 0  # kernels that a GPU starts
    compile_seconds: float = 0.0
    warnings: int = 0  # arrays that XLA says it gathers whole to lay them out anew
    xla_flags: str = ""  # XLA_FLAGS as it was compiled with

    @property
    def num_devices(self) -> int:
        """Chips in the topology."""
        return math.prod(self.mesh)

    @property
    def fits(self) -> bool:
        """Whether the peak is within the chip's memory."""
        return self.peak <= self.chip.memory

    @property
    def terms(self) -> dict[str, float]:
        """Seconds a step by what takes them, at published rates."""
        sent = sum(collective.sent for collective in self.collectives.values())
        return dict(
            compute=self.executed_flops / self.chip.flops,
            memory=self.traffic / self.chip.bandwidth,
            network=sent / self.chip.link,
        )

    def seconds(self, efficiency: float) -> float:
        """Time of a step: the largest term at a share of the published rates; the others are taken to overlap."""
        return max(self.terms.values()) / efficiency


def plan(config: ConfigDict, topology: str) -> Plan:
    """Compiles a config's training step for a topology ("v5e:16x16", "h100:8") and says what it takes.

    It leaves JAX on the CPU and sets variables for libtpu (`topology.devices_of`): a process plans or trains, not both.

    Raises:
      UserError: a topology, mesh, batch or parameter that cannot work, before anything is compiled.
    """
    check(config)
    chip, devices = devices_of(topology)
    mesh = config_mesh(config, devices)
    model = Transformer(trained_model(config, vocabulary(config)))
    state = abstract_state(config, model, mesh)
    state_sharding, tokens_sharding = jax.tree.map(lambda leaf: leaf.sharding, state), batch_sharding(mesh)
    sequences = config.train.batch_size * config.optimizer.accumulate
    tokens = jax.ShapeDtypeStruct((sequences, config.model.context_length + 1), jnp.int32)
    placed = jax.tree.leaves(((state, tokens), (state_sharding, tokens_sharding)))
    half = len(placed) // 2
    arguments = sum(
        math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, sharding in zip(placed[:half], placed[half:], strict=True)
    )
    counted = census(model.config)
    again = _computed_again(model.config, counted)
    passes = 4 if config.anneal.distillation else 3  # forward, backward as two; a teacher's forward
    common = dict(
        topology=topology, chip=chip, mesh=tuple(mesh.shape.values()), remat=config.model.remat,
        tokens=sequences * config.model.context_length, num_steps=config.train.num_steps,
        flops=3 * counted.forward_flops * sequences / len(devices), arguments=arguments,
        executed_flops=(passes * counted.forward_flops + again) * sequences / len(devices),
        xla_flags=os.environ.get("XLA_FLAGS", ""),
    )  # fmt: skip
    train_step = jit_train_step(config, model, mesh, state_sharding)
    begin = time.perf_counter()
    with jax.set_mesh(mesh):
        lowered = train_step.lower(state, tokens, True)  # a step that logs: the larger of the two
    try:
        with kept_stderr() as said:
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = re.search(r"RESOURCE_EXHAUSTED.*?\(([\d.]+)([KMG])\) exceeds available", str(error), re.S)
        if not needed:
            raise
        peak = float(needed[1]) * 2 ** {"K": 10, "M": 20, "G": 30}[needed[2]]
        return Plan(**common, temporaries=None, peak=peak, compile_seconds=time.perf_counter() - begin)
    memory, program = compiled.memory_analysis(), Program(compiled.as_text())
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Plan(
        **common | dict(arguments=memory.argument_size_in_bytes),
        temporaries=memory.temp_size_in_bytes,
        peak=kept + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes,
        collectives=program.collectives(),
        traffic=program.traffic(),
        launches=program.launches() if chip.platform == "gpu" else 0,
        compile_seconds=time.perf_counter() - begin,
        warnings=said().count(_REMATERIALIZED),
    )


def _computed_again(config: ModelConfig, counted: Census) -> int:
    """FLOPs of a forward pass that the backward pass repeats under `config.remat`."""
    T, D, L = config.context_length, config.model_dim, config.num_layers
    attention = 3 * T**2 * D * L  # as the census counts
    kept = {
        "none": counted.blocks_flops,
        "attention+ffn": attention + 2 * T * D**2 * (L - config.ffn_free_layers),
        "attention": attention,
        "full": 0,
    }
    return counted.blocks_flops - kept[config.remat]


def search(config: ConfigDict, topology: str, notify: Callable[[str], None]) -> list[Plan]:
    """Plans of all meshes that batch and heads allow, the fastest first; those that do not fit are left out.

    Where a mesh does not fit, more remat than config.model.remat is tried, the kind that computes least first.
    """
    check(config)
    _, devices = devices_of(topology)
    plans = []
    for mesh in _meshes(config, devices):
        for remat in CHOICES["remat"][CHOICES["remat"].index(config.model.remat) :]:
            trial = config.copy_and_resolve_references()
            trial.model.remat = remat
            trial.mesh.update(data=mesh[0], fsdp=mesh[1], tensor=mesh[2])
            tried = plan(trial, topology)
            terms = ", ".join(f"{name} {seconds * 1e3:.1f}" for name, seconds in tried.terms.items())
            verdict = f"{terms} ms at published rates" if tried.fits else "does not fit"
            kind = "" if remat == "none" else f", remat {remat}"
            notify(f"{'×'.join(map(str, mesh))}{kind}: {tried.peak / 2**30:.2f} GiB, {verdict}")
            if tried.fits:
                plans.append(tried)
                break
    if not plans:
        raise UserError(f"nothing fits on {topology}; lower config.train.batch_size or take more chips")
    return sorted(plans, key=lambda plan: max(plan.terms.values()))


def _meshes(config: ConfigDict, devices: Sequence[jax.Device]) -> Iterator[tuple[int, int, int]]:
    """Meshes that can work, without a compile: `tensor` up to 8, `fsdp` none, a quarter or all of the rest."""
    found, refused = [], None
    for tensor in (t for t in (1, 2, 4, 8) if len(devices) % t == 0):
        rest = len(devices) // tensor
        for fsdp in sorted({1, rest // 4, rest} - {0}):
            trial = config.copy_and_resolve_references()
            trial.mesh.update(data=-1, fsdp=fsdp, tensor=tensor)
            try:
                mesh = config_mesh(trial, devices)
                model = Transformer(trained_model(trial, vocabulary(trial)))
                abstract_state(trial, model, mesh)
                found.append(tuple(mesh.shape.values()))
            except UserError as error:
                refused = refused or error
    if not found:
        raise refused
    yield from found
