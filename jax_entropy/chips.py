"""The accelerators that a run can be planned for, and their published rates.

Rates: Google's pages on TPU v5e, v5p and v6e, NVIDIA's data sheets of the SXM versions of H100, H200 and A100 (80 GB);
of each chip, in one direction.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a chip can do at most: FLOP/s of bfloat16 products, bytes of memory, bytes/s of memory and of the network.

    `link` is what one collective can use: on a TPU the two links of one axis of the torus.
    """

    name: str
    flops: float
    memory: int
    bandwidth: float
    link: float
    kind: str  # as JAX names the device, or how that begins
    platform: str = "tpu"
    on_chip: int = 0  # bytes beside the cores where the compiler keeps whole arrays


# The memory of a TPU is what its compiler says is available; of a GPU, the 75 % that JAX takes unless told otherwise.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", 197e12, int(15.75 * 2**30), 819e9, 100e9, "TPU v5 lite", on_chip=128 * 2**20),
        Chip("v5p", 459e12, int(95.74 * 2**30), 2765e9, 200e9, "TPU v5", on_chip=128 * 2**20),
        Chip("v6e", 918e12, int(31.25 * 2**30), 1638e9, 200e9, "TPU v6 lite", on_chip=128 * 2**20),
        Chip("h100", 989e12, int(0.75 * 79.1 * 2**30), 3350e9, 450e9, "NVIDIA H100", "gpu"),
        Chip("h200", 989e12, int(0.75 * 139.8 * 2**30), 4800e9, 450e9, "NVIDIA H200", "gpu"),
        Chip("a100", 312e12, int(0.75 * 79.2 * 2**30), 2039e9, 300e9, "NVIDIA A100", "gpu"),
    )
}

# Two cores of a server, by what float32 products and copies reach there, for rules that weigh the one with the other.
HOST = Chip("cpu", 320e9, 8 * 2**30, 20e9, 0.0, "cpu", "cpu")


def chip_of(device_kind: str) -> Chip | None:
    """The chip that JAX names like this, None if it is not one of `CHIPS`."""
    return next((chip for chip in CHIPS.values() if device_kind.startswith(chip.kind)), None)


def peak_flops(device_kind: str) -> float | None:
    """FLOP/s of bfloat16 products of a device as JAX names it, None if it is not one of `CHIPS`."""
    chip = chip_of(device_kind)
    return chip and chip.flops
