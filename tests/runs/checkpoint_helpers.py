import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_entropy.runs.checkpoint import Checkpointer


def layout(num_devices):
    mesh = jax.make_mesh((num_devices,), ("data",), (AxisType.Auto,), devices=jax.devices()[:num_devices])

    def sharding(leaf):
        divides = leaf.ndim > 0 and leaf.shape[0] % 8 == 0
        return NamedSharding(mesh, PartitionSpec("data") if divides else PartitionSpec())

    return sharding


def abstract(state, num_devices=1):
    sharding_of = layout(num_devices)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding_of(leaf)), state)


def make_state(seed=0, num_devices=1, width=16):
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "blocks": {"kernel": jax.random.normal(keys[0], (width, 6))},
        "embedding": jax.random.normal(keys[1], (width, 3), jnp.bfloat16),
        "temperature": jnp.float32(np.pi),
    }
    state = {
        "params": params,
        "optimizer": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init(params),
        "step": jnp.int32(seed),
        "random": {"raw": jax.random.key_data(keys[2]), "typed": keys[2]},
    }
    sharding_of = layout(num_devices)
    return jax.tree.map(lambda leaf: jax.device_put(leaf, sharding_of(leaf)), state)


def bits(state):
    def raw(x):
        return jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x

    return [(x.dtype, x.shape, np.asarray(raw(x)).tobytes()) for x in jax.tree.leaves(state)]


def saved(directory, steps, keep=2, **losses):
    with Checkpointer(directory, keep=keep) as checkpointer:
        for step in steps:
            checkpointer.save(step, make_state(step), None, {"step": step}, losses.get(f"loss_{step}"))
    return directory


def folders(directory):
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())


def batches():
    dataset = grain.MapDataset.range(1000).shuffle(seed=1).batch(4).repeat()
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)))
