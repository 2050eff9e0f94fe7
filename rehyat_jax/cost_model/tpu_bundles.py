"""The listing of a compiled TPU kernel: its VLIW bundles, and how often each is issued."""

import dataclasses
import gzip
import itertools
import re
from pathlib import Path

import numpy as np

from rehyat_jax.errors import InputError

LISTINGS = ("packed-bundles-post-ra", "pre-delay_hlo-static-per-bundle-utilization")
"""libtpu's names for the listing of bundles and for the listing of slots in use."""

DELAY_SLOTS = {"v5e": 4, "v5p": 4, "v6e": 4, "tpu7x": 6}
"""Bundles after a branch that are issued whether it is taken or not, by generation of TPUs."""


def generation_of(topology: str) -> str:
    """The generation of a topology such as "v5e:2x2".

    Raises:
      InputError: the generation is unknown.
    """
    generation = topology.split(":")[0]
    if generation not in DELAY_SLOTS:
        raise InputError(f"--topology {topology}: expected one that begins with {', '.join(DELAY_SLOTS)}")
    return generation


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A compiled kernel.

    Attributes:
      bundles: the instructions of every bundle, as text.
      slot_names: kinds of instruction slots, the matrix units' first; the kinds depend on libtpu's version.
      slots: number of slots of each kind in use, int [bundles, slots].
      capacity: number of slots of each kind, int [slots].
      delay_slots: bundles after a branch that are issued whether it is taken or not.
    """

    bundles: list[str]
    slot_names: list[str]
    slots: np.ndarray
    capacity: np.ndarray
    delay_slots: int


@dataclasses.dataclass(frozen=True)
class Region:
    """Bundles [start, end), issued `times` times each; `busy` is the share of each kind of slots in use."""

    start: int
    end: int
    times: int
    busy: np.ndarray

    @property
    def cycles(self) -> int:
        return (self.end - self.start) * self.times


def listing_file(directory: Path, digest: str, label: str) -> Path:
    """The compressed file of one of the LISTINGS of the kernel with this digest (`tpu_kernels`)."""
    return directory / f"{digest}-{label}.txt.gz"


def read_kernel(directory: Path, digest: str, generation: str) -> Kernel:
    """A kernel on a generation of TPUs ("v5e", "v5p", "v6e", "tpu7x"), from libtpu's listings.

    They are made before idle cycles are folded into delays, so one row is one cycle.

    Raises:
      ValueError: the two listings do not describe the same bundles: libtpu's format has changed.
    """
    texts = (gzip.decompress(listing_file(directory, digest, label).read_bytes()).decode() for label in LISTINGS)
    bundles, slots = texts
    bundles = _read_bundles(bundles)
    # A title, the names, the capacities, another title, and a row for every bundle.
    _, names, capacity, _, *rows = slots.strip().splitlines()
    names = [name.strip().split(":")[-1] for name in names.split(",")]
    capacity, *slots = (np.array(row.split(), int) for row in (capacity, *rows))
    if len(slots) != len(bundles) or len(names) != len(capacity) or names[0] not in ("MATMUL", "MXU"):
        raise ValueError(
            f"{digest}: found {len(bundles)} bundles, {len(slots)} rows of slots in use and slots named {names}"
        )
    return Kernel(bundles, names, np.array(slots), capacity, DELAY_SLOTS[generation])


def regions(kernel: Kernel, times: np.ndarray) -> list[Region]:
    """Regions of neighbouring bundles that are issued equally often, in order, including those never issued."""
    cuts = [0, *(np.flatnonzero(np.diff(times)) + 1).tolist(), len(times)]
    return [
        Region(start, end, int(times[start]), kernel.slots[start:end].mean(axis=0) / kernel.capacity)
        for start, end in itertools.pairwise(cuts)
    ]


def _read_bundles(text: str) -> list[str]:
    # Only comments mark two things: a load of the core's number, and the results of a division.
    text = re.sub(r"= sld (\[smem:[^;}]*?)/\*[^*]*\bcore id\b[^*]*\*/", r"= core_id \1", text)
    text = re.sub(r"= sdivrem\.u32 ([^;}/]*)/\* k(\w+) \*/", r"= sdivrem.\2 \1", text)
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    found = re.findall(r"^\s*(0|0x[0-9a-f]+)\s*(?:[A-Z]{2})?\s*:\s*>*\s*\{(.*?)\}\s*$", text, re.MULTILINE | re.DOTALL)
    if [int(address, 16) for address, _ in found] != list(range(len(found))):
        raise ValueError("the bundles' addresses do not count from 0: libtpu's format has changed")
    return [instructions for _, instructions in found]
