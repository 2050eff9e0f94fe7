"""Facts about the chips that runs are planned for: the one table of them."""

import dataclasses
import math

from rehyat_jax.benchmarks.tpu_bundles import generation_of
from rehyat_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device, as JAX counts them.

    Attributes:
      peak_flops: bfloat16 FLOP/s.
      flops_per_cycle: of all its matrix units together; with the peak, this is the clock.
      hbm_bytes: what the compiler lets a program use.
      hbm_bandwidth: bytes/s.
      ici_bandwidth: bytes/s that leave it over all its links together (as many arrive).
      devices_per_chip: 2 where the cores of a chip are devices of their own.
      topologies: sizes of slices, small to large, as tried for a run that does not fit.
    """

    peak_flops: float
    flops_per_cycle: int
    hbm_bytes: int
    hbm_bandwidth: float
    ici_bandwidth: float
    devices_per_chip: int
    topologies: tuple[str, ...]

    @property
    def clock(self) -> float:
        """Cycles a second."""
        return self.peak_flops / self.flops_per_cycle


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")

# Peaks, bandwidths and links: docs.cloud.google.com/tpu/docs/v5e, /v5p, /v6e and /tpu7x, read in November 2026; there
# the link bandwidth is of both directions together, 400, 1200, 800 and 1200 GB/s a chip.
# FLOP a cycle: 4 matrix units of 128 x 128 on v5e, twice 4 on v5p (two cores make a device), 2 of 256 x 256 on v6e and
# on each core of a tpu7x; tests/test_static_cycles.py holds the compiler's own listings to the same.
# HBM: what libtpu 0.0.42.1 answers to a program that is too large: "available HBM (15.75G)".
CHIPS = {
    "v5e": Chip(197e12, 131_072, int(15.75 * 2**30), 819e9, 200e9, 1, _FLAT),
    "v5p": Chip(459e12, 262_144, int(95.74 * 2**30), 2765e9, 600e9, 1, _CUBES),
    "v6e": Chip(918e12, 524_288, int(31.25 * 2**30), 1600e9, 400e9, 1, _FLAT),
    "tpu7x": Chip(2307e12 / 2, 524_288, int(94.75 * 2**30), 7380e9 / 2, 600e9 / 2, 2, _CUBES),
}


def chip_of(topology: str) -> Chip:
    """Raises InputError for a generation that is not in the table."""
    return CHIPS[generation_of(topology)]


def device_count(topology: str) -> int:
    """Devices of a topology such as "v5e:4x4"; raises InputError unless it reads so."""
    generation, _, size = topology.partition(":")
    chip = chip_of(topology)
    try:
        return math.prod(int(part) for part in size.split("x")) * chip.devices_per_chip
    except ValueError:
        raise InputError(
            f"--topology {topology}: expected GENERATION:SIZE, as {generation}:{chip.topologies[3]}"
        ) from None


def larger_topology(topology: str) -> str | None:
    """The next size of slice in the table; None beyond the largest."""
    generation = generation_of(topology)
    sizes = (f"{generation}:{size}" for size in CHIPS[generation].topologies)
    return next((size for size in sizes if device_count(size) > device_count(topology)), None)
