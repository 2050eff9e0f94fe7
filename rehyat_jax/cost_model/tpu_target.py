"""Slices of TPUs that libtpu compiles for, on any machine, and the processes in which it does so."""

import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rehyat_jax.errors import InputError
from rehyat_jax.extras import check_installed

NO_TPU = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    # Nothing is run, so compilations need not wait for one another's lock on the chip.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
"""Environment in which libtpu, when it is loaded, neither looks for a TPU nor asks a cloud machine for its type."""


def check_libtpu() -> None:
    """Raises InputError if the TPU compiler is missing."""
    check_installed("compiling for TPUs, which needs no TPU,", "libtpu")


def topology_devices(topology: str) -> list[jax.Device]:
    """The devices of a topology, in this process. Raises InputError if libtpu is missing or does not know it."""
    check_libtpu()
    os.environ.update(NO_TPU)
    try:
        return described_topology(topology)
    except Exception as error:  # jaxlib's own error, or one of libtpu's plugin
        raise unknown_topology(topology, str(error).splitlines()[0]) from error


def described_topology(topology: str) -> list[jax.Device]:
    """The devices of a topology, in an environment with NO_TPU."""
    # libtpu divides a slice into hosts of 2x2 chips unless it is told otherwise. A single chip is a host of its own.
    single = set(topology.partition(":")[2].split("x")) == {"1"}
    options = {"chips_per_host_bounds": (1, 1, 1)} if single else {}
    return topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices


def unknown_topology(topology: str, message: str) -> InputError:
    return InputError(
        f"--topology {topology}: expected a name that libtpu knows, for example v5e:2x2, v5p:2x2x1, v6e:2x2 or "
        f"tpu7x:2x2x1; found {message}"
    )


def on_one_chip(device: jax.Device, make_case: Callable, arguments: dict) -> jax.stages.Lowered:
    """The function that make_case(**arguments) returns, lowered for a device and the arguments that it returns too."""
    mesh = Mesh(np.array([device]), ("chip",))
    here = NamedSharding(mesh, PartitionSpec())
    # Without a mesh, Pallas and the choice of its blocks would ask the default device for the type of TPU.
    with jax.set_mesh(mesh):
        function, abstract = make_case(**arguments)
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), abstract)
        return (function if hasattr(function, "lower") else jax.jit(function)).lower(*abstract)


@contextmanager
def running(command: Sequence[str], log: Path, libtpu_options: str = "") -> Iterator[subprocess.Popen]:
    """A process that compiles for TPUs. It writes to `log`, and is killed if it still runs when the block ends.

    libtpu reads its options only once, when it is loaded: other options need another process.
    """
    environment = os.environ | NO_TPU | {"LIBTPU_INIT_ARGS": libtpu_options}
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
