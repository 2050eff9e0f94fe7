"""The device mesh: four named axes, and checks of sizes that must fit them."""

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from rehyat_jax.errors import InputError

AXES = ("data", "fsdp", "context", "tensor")
"""The axes, and what is sharded along them:

- data: the batch; each device has a copy of the model;
- fsdp: the batch, and parameters and optimizer state, which are gathered block by block;
- context: a video's frames, and parameters as along fsdp;
- tensor: heads and feed-forward columns.
"""

BATCH = ("data", "fsdp")
"""The axes that the batch is sharded along."""


def resolve_sizes(sizes: Mapping[str, int], devices: int) -> dict[str, int]:
    """Sizes of all axes; one of them may be -1, for all devices that the others leave.

    Raises:
      InputError: the product is not the number of devices; the message lists sizes that would fit.
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
    """The sizes of a single axis that would use all devices, in words; an axis of size -1 keeps it."""
    fits = []
    for axis in AXES:
        others = math.prod(size for name, size in sizes.items() if name != axis and size != -1)
        if -1 not in sizes.values():
            fits += [f"mesh.{axis}={devices // others}"] if devices % others == 0 else []
        elif sizes[axis] > 1 and devices % others == 0:
            fits += [f"mesh.{axis}={size}" for size in _divisors(devices // others)]
    return f"these would fit: {', '.join(fits)}" if fits else "no size of one axis would fit: change two"


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of all devices, or of those given, in the order of `AXES`.

    Devices that are close are neighbours along the inner axes. A process's devices are neighbours along the batch.
    Slices of TPUs divide "data", or else "fsdp".

    Raises:
      InputError: see `resolve_sizes`; or the slices divide neither axis.
    """
    devices = jax.devices() if devices is None else list(devices)
    shape = resolve_sizes(sizes, len(devices))
    slices: dict[int, list[jax.Device]] = {}
    for device in sorted(devices, key=lambda device: (device.process_index, device.id)):
        # Other platforms name each host a slice, and have no shape to fit into.
        slices.setdefault(getattr(device, "slice_index", 0) if device.platform == "tpu" else 0, []).append(device)
    axis = _axis_of_slices(shape, len(slices))
    part = tuple(shape[name] // (len(slices) if name == axis else 1) for name in AXES)
    parts = [_arranged(part, slices[index]) for index in sorted(slices)]
    # With explicit axes, operations of the model would have to name their output's sharding. XLA finds the same ones.
    return Mesh(np.concatenate(parts, axis=AXES.index(axis)), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _axis_of_slices(shape: Mapping[str, int], slices: int) -> str:
    if shape["data"] % slices == 0:
        return "data"
    if shape["data"] == 1 and shape["fsdp"] % slices == 0:
        return "fsdp"
    raise InputError(
        f"mesh: expected data to be a multiple of the {slices} slices, or 1 and fsdp one, found data {shape['data']} "
        f"and fsdp {shape['fsdp']}; mesh.data={slices} with the other axes dividing a slice would fit"
    )


def _arranged(shape: tuple[int, ...], devices: list[jax.Device]) -> np.ndarray:
    """The devices of one slice, in the order of its torus as far as the processes' parts of a batch allow."""
    if devices[0].platform != "tpu":
        return np.array(devices).reshape(shape)
    array = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    rows = array.reshape(shape[0] * shape[1], -1)
    first_process = [min(device.process_index for device in row) for row in rows]
    return rows[np.argsort(first_process, kind="stable")].reshape(shape)


def check_batch(mesh: Mesh, examples: int) -> None:
    """Raises InputError, with sizes that would fit, unless `examples` at a time can be sharded along the batch."""
    parts = math.prod(mesh.shape[axis] for axis in BATCH)
    if examples % parts:
        raise InputError(
            f"mesh: data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']} must divide the {examples} examples that go "
            f"through the model at once; data x fsdp of {_listed(_divisors(examples))} would fit, or a multiple of "
            f"{parts} examples"
        )


def check_heads(mesh: Mesh, num_heads: int) -> None:
    """Raises InputError, with sizes that would fit, unless a model's heads can be sharded along "tensor"."""
    if num_heads % mesh.shape["tensor"]:
        raise InputError(
            f"mesh.tensor must divide the model's {num_heads} heads, found {mesh.shape['tensor']}; "
            f"{_listed(_divisors(num_heads))} would fit"
        )


def part_of_process(mesh: Mesh, process: int | None = None) -> tuple[int, int]:
    """(part, parts): the index of the part of every batch that a process's devices hold, and the number of equal parts.

    The process is this one by default. Processes whose devices differ only along "context" or "tensor" hold the same
    part.

    Raises:
      InputError: the devices of a process are not neighbours along the batch.
    """
    process = jax.process_index() if process is None else process
    rows = mesh.devices.reshape(-1, mesh.shape["context"] * mesh.shape["tensor"])
    mine = [n for n, row in enumerate(rows) if any(device.process_index == process for device in row)]
    count = len(mine)
    if mine != list(range(mine[0], mine[0] + count)) or mine[0] % count or len(rows) % count:
        raise InputError(
            f"mesh: process {process} would hold the parts {mine} of {len(rows)} of a batch, "
            f"expected neighbours; choose data x fsdp so that it divides, or is a multiple of, the processes"
        )
    return mine[0] // count, len(rows) // count


def _divisors(number: int) -> list[int]:
    """The smallest sixteen divisors."""
    return [n for n in range(1, number + 1) if number % n == 0][:16]


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def is_cut() -> bool:
    """True if the mesh in use has more than one device."""
    return jax.sharding.get_abstract_mesh().size > 1


def axis_size(axis: str) -> int:
    """Devices along an axis of the mesh in use (`jax.set_mesh`); 1 if there is none."""
    return dict(jax.sharding.get_abstract_mesh().shape).get(axis, 1)
