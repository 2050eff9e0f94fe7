"""The device mesh: four named axes, and what fits them."""

import math
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import AxisType, Mesh

from rehyat_jax.errors import InputError
from rehyat_jax.models.wan.config import WanConfig

AXES = ("data", "fsdp", "context", "tensor")
"""data: copies of the model, each with its part of the batch. fsdp: the same, but parameters and optimizer state are
cut among them and gathered block by block. context: a video cut along time. tensor: heads and feed-forward columns."""

BATCH = ("data", "fsdp")
"""What the batch is cut along."""


def resolve_sizes(sizes: Mapping[str, int], devices: int) -> dict[str, int]:
    """Sizes of all axes; one of them may be -1, for all devices that the others leave.

    Raises:
      InputError: the product is not the number of devices; the message lists sizes that would be.
    """
    unknown = [axis for axis in AXES if sizes[axis] == -1]
    for axis in AXES:
        if sizes[axis] < 1 and sizes[axis] != -1:
            raise InputError(f"mesh.{axis} must be at least 1, or -1 for what is left, found {sizes[axis]}")
    if len(unknown) > 1:
        raise InputError(f"mesh: only one axis can be -1, found {unknown}")
    known = math.prod(size for size in sizes.values() if size != -1)
    if unknown and devices % known == 0:
        return {**sizes, unknown[0]: devices // known}
    if known != devices:
        shown = " x ".join(f"{axis} {sizes[axis]}" for axis in AXES)
        raise InputError(
            f"mesh: {shown} does not make {devices} devices; the other axes as they are, "
            f"{_one_axis_changed(sizes, devices)}"
        )
    return dict(sizes)


def _one_axis_changed(sizes: Mapping[str, int], devices: int) -> str:
    """The sizes of a single axis that would use all devices, in words."""
    fits = []
    for axis in AXES:
        others = math.prod(size for name, size in sizes.items() if name != axis and size != -1)
        if devices % others == 0 and -1 not in (size for name, size in sizes.items() if name != axis):
            fits.append(f"mesh.{axis}={devices // others}")
    return f"these would fit: {', '.join(fits)}" if fits else "no size of one axis would fit: change two"


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of all devices, or of those given, in the order of `AXES`.

    Raises:
      InputError: see `resolve_sizes`.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = resolve_sizes(sizes, len(devices))
    # Explicit axes would make every operation of the model name its output's sharding; XLA finds the same.
    return jax.make_mesh(
        tuple(shape[axis] for axis in AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
    )


def check_mesh(mesh: Mesh, model: WanConfig, batch_size: int) -> None:
    """Checks that a model's heads and `batch_size` examples at a time can be cut along the axes.

    Raises:
      InputError: naming the axis, and the sizes of it that would fit.
    """
    parts = math.prod(mesh.shape[axis] for axis in BATCH)
    if batch_size % parts:
        raise InputError(
            f"mesh: data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']} must divide the {batch_size} examples that "
            f"go through the model at once; data x fsdp of {_divisors(batch_size)} would fit, or a multiple of "
            f"{parts} examples"
        )
    if model.num_heads % mesh.shape["tensor"]:
        raise InputError(
            f"mesh.tensor must divide the model's {model.num_heads} heads, found {mesh.shape['tensor']}; "
            f"{_divisors(model.num_heads)} would fit"
        )


def part_of_process(mesh: Mesh) -> tuple[int, int]:
    """(part, parts): which of how many equal parts of every batch this process's devices hold.

    Processes whose devices differ along "context" or "tensor" alone hold the same part.

    Raises:
      InputError: the devices of a process are not neighbours along the batch.
    """
    rows = mesh.devices.reshape(-1, mesh.shape["context"] * mesh.shape["tensor"])
    mine = [n for n, row in enumerate(rows) if any(device.process_index == jax.process_index() for device in row)]
    count = len(mine)
    if mine != list(range(mine[0], mine[0] + count)) or mine[0] % count or len(rows) % count:
        raise InputError(
            f"mesh: process {jax.process_index()} would hold the parts {mine} of {len(rows)} of a batch, "
            f"expected neighbours; choose data x fsdp so that it divides, or is a multiple of, the processes"
        )
    return mine[0] // count, len(rows) // count


def _divisors(number: int) -> str:
    divisors = [n for n in range(1, number + 1) if number % n == 0]
    return ", ".join(map(str, divisors[:16]))


def axis_size(axis: str) -> int:
    """Devices along an axis of the mesh in use (`jax.set_mesh`); 1 if there is none."""
    return dict(jax.sharding.get_abstract_mesh().shape).get(axis, 1)
