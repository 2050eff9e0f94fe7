"""The table of chips that runs are planned for."""

import dataclasses
import math

import jax

from rehyat_jax.cost_model.gpu_target import gpu_devices
from rehyat_jax.cost_model.tpu_target import topology_devices
from rehyat_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device, as JAX counts them.

    Attributes:
      peak_flops: bfloat16 FLOP/s.
      flops_per_cycle: FLOP a cycle of all its matrix units together; with the peak, it gives the clock. None for GPUs.
      hbm_bytes: memory that the compiler lets a program use; for a GPU, memory that JAX takes unless
        XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
      hbm_bandwidth: bytes/s.
      ici_bandwidth: bytes/s that leave it over all its links together (as many arrive).
      devices_per_chip: 2 where the cores of a chip are separate devices.
      topologies: sizes of slices, small to large, in the order tried for a run that does not fit.
    """

    peak_flops: float
    flops_per_cycle: int | None
    hbm_bytes: int
    hbm_bandwidth: float
    ici_bandwidth: float
    devices_per_chip: int
    topologies: tuple[str, ...]

    @property
    def is_gpu(self) -> bool:
        return self.flops_per_cycle is None

    @property
    def clock(self) -> float:
        """Cycles a second."""
        return self.peak_flops / self.flops_per_cycle


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_COUNTS = ("1", "2", "4", "8")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")

# Peaks, bandwidths and links: docs.cloud.google.com/tpu/docs/v5e, /v5p, /v6e and /tpu7x, read in November 2026; there
# the link bandwidth is of both directions together, 400, 1200, 800 and 1200 GB/s a chip.
# FLOP a cycle: 4 matrix units of 128 x 128 on v5e, twice 4 on v5p (two cores make a device), 2 of 256 x 256 on v6e and
# on each core of a tpu7x; tests/test_static_cycles.py checks the compiler's own listings against these.
# HBM: libtpu 0.0.42.1's answer to a program that is too large, such as "available HBM (15.75G)".
CHIPS = {
    "v5e": Chip(197e12, 131_072, int(15.75 * 2**30), 819e9, 200e9, 1, _FLAT),
    "v5p": Chip(459e12, 262_144, int(95.74 * 2**30), 2765e9, 600e9, 1, _CUBES),
    "v6e": Chip(918e12, 524_288, int(31.25 * 2**30), 1600e9, 400e9, 1, _FLAT),
    "tpu7x": Chip(2307e12 / 2, 524_288, int(94.75 * 2**30), 7380e9 / 2, 600e9 / 2, 2, _CUBES),
    # SXM boards of one host; NVIDIA's data sheets, dense bfloat16 and NVLink in one direction. JAX takes 75% of memory.
    "h100": Chip(989e12, None, int(0.75 * 84_978_434_048), 3350e9, 450e9, 1, _COUNTS),
    "h200": Chip(989e12, None, int(0.75 * 150_754_820_096), 4800e9, 450e9, 1, _COUNTS),
}


def chip_of(topology: str) -> Chip:
    """The chip of a topology. Raises InputError for one that is not in the table."""
    return CHIPS[_name(topology)]


def devices_of(topology: str) -> list[jax.Device]:
    """Devices to compile for. Raises InputError if the compiler is missing or does not know the topology."""
    if chip_of(topology).is_gpu:
        return gpu_devices(_name(topology), device_count(topology))
    return topology_devices(topology)


def _name(topology: str) -> str:
    name = topology.split(":")[0]
    if name not in CHIPS:
        raise InputError(f"--topology {topology}: expected one that begins with {', '.join(CHIPS)}")
    return name


def device_count(topology: str) -> int:
    """The number of devices of a topology such as "v5e:4x4" or "h100:8". Raises InputError for another format."""
    generation, _, size = topology.partition(":")
    chip = chip_of(topology)
    try:
        return math.prod(int(part) for part in size.split("x")) * chip.devices_per_chip
    except ValueError:
        raise InputError(f"--topology {topology}: expected NAME:SIZE, as {generation}:{chip.topologies[3]}") from None


def larger_topology(topology: str) -> str | None:
    """The next size of slice in the table; None beyond the largest."""
    sizes = (f"{_name(topology)}:{size}" for size in chip_of(topology).topologies)
    return next((size for size in sizes if device_count(size) > device_count(topology)), None)
