"""Ahead-of-time compilation for TPUs, on any machine, with the compiler's own listings.

libtpu compiles on any machine. It reads its options for listings (the VLIW bundles of every kernel) only once, when it
is loaded, so a process of its own compiles every program:

  python -m rehyat_jax.cost_model.tpu_compile MODULE:FUNCTION ARGUMENTS TOPOLOGY DIRECTORY MESH
"""

import argparse
import dataclasses
import importlib
import json
import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rehyat_jax.cost_model.tpu_bundles import LISTINGS, generation_of
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


class DoesNotFitError(Exception):
    """The compiler found that the program needs more memory (HBM, or VMEM for a kernel) than the chip has."""


@dataclasses.dataclass(frozen=True)
class CompiledProgram:
    """The compiler's results: `hlo` is the optimised module's text; sizes are bytes of HBM on one device.

    `result_bytes` counts all results, `output_bytes` those that do not take the place of arguments. `peak_bytes` is
    the most memory in use at a time, without the program itself. `host_bytes` is the host's memory that one device
    uses while the program runs. `directory` has the compiler's listings.
    """

    generation: str
    hlo: str
    temporary_bytes: int
    argument_bytes: int
    output_bytes: int
    result_bytes: int
    peak_bytes: int
    code_bytes: int
    host_bytes: int
    directory: Path | None

    @property
    def total_bytes(self) -> int:
        return self.temporary_bytes + self.argument_bytes + self.output_bytes


def check_libtpu() -> None:
    """Raises InputError if the TPU compiler is missing."""
    check_installed("compiling for TPUs, which needs no TPU,", "libtpu")


def topology_devices(topology: str) -> list[jax.Device]:
    """The devices of a topology, in this process. Raises InputError if libtpu is missing or does not know it."""
    check_libtpu()
    os.environ.update(NO_TPU)
    try:
        return _described(topology)
    except Exception as error:  # jaxlib's own error, or one of libtpu's plugin
        raise _unknown_topology(topology, str(error).splitlines()[0]) from error


def _described(topology: str) -> list[jax.Device]:
    """The devices of a topology, from libtpu."""
    # libtpu divides a slice into hosts of 2x2 chips unless it is told otherwise. A single chip is a host of its own.
    single = set(topology.partition(":")[2].split("x")) == {"1"}
    options = {"chips_per_host_bounds": (1, 1, 1)} if single else {}
    return topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices


@contextmanager
def compiled_for_tpu(
    case: str, arguments: dict, topology: str, *, for_all_devices: bool = False
) -> Iterator[CompiledProgram]:
    """Compiles one case for a topology; its listings last as long as the context.

    Args:
      case: "module:function". The function takes `arguments` as keywords, and returns a function, jitted or not, and a
        tuple of its arguments, trees of `jax.ShapeDtypeStruct`: for one chip.
      arguments: JSON-ready.
      topology: as in `jax.experimental.topologies`: "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1" or
        larger, or a single chip: "v5e:1x1", "v5p:1x1x1".
      for_all_devices: True if the case is a program for all devices of the topology: the function takes them first,
        and returns a `jax.stages.Lowered`.

    Raises:
      InputError: libtpu is missing, or the topology is unknown to it or to this package.
      DoesNotFitError: the program needs more memory than the chip has.
      RuntimeError: any other error of the compiler.
    """
    check_libtpu()
    generation = generation_of(topology)
    with tempfile.TemporaryDirectory(prefix="tpu_compile_") as directory:
        mesh = "all" if for_all_devices else "one"
        command = [sys.executable, "-m", __spec__.name, case, json.dumps(arguments), topology, directory, mesh]
        environment = (
            os.environ
            | NO_TPU
            | {
                # The listings of all seventy passes of a large kernel would be half a gigabyte.
                "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={directory} --xla_jf_dump_llo_text=true "
                f"--xla_jf_dump_llo_pass_label_regex={'|'.join(LISTINGS)}",
            }
        )
        child = subprocess.run(command, env=environment, capture_output=True, text=True)
        if child.returncode:
            _raise(child.stderr, textwrap.shorten(f"{case} {arguments}", 200), topology)
        result = Path(directory, "result.json").read_text()
        yield CompiledProgram(generation, **json.loads(result), directory=Path(directory))


def _raise(stderr: str, case: str, topology: str):
    lines = [line for line in stderr.splitlines() if line.strip()]
    message = next((line for line in reversed(lines) if "Error" in line or "exceeded" in line), "".join(lines[-1:]))
    if "RESOURCE_EXHAUSTED" in stderr:
        raise DoesNotFitError(message)
    if "get_topology_desc" in stderr:
        raise _unknown_topology(topology, message)
    raise RuntimeError(f"{case}: cannot be compiled for {topology}: {message}")


def _unknown_topology(topology: str, message: str) -> InputError:
    return InputError(
        f"--topology {topology}: expected a name that libtpu knows, for example v5e:2x2, v5p:2x2x1, v6e:2x2 or "
        f"tpu7x:2x2x1; found {message}"
    )


def _compile(case: str, arguments: dict, topology: str, directory: Path, *, for_all_devices: bool) -> None:
    """Compiles in the child process, and writes result.json next to the listings."""
    module, function = case.split(":")
    devices = _described(topology)
    make_case = getattr(importlib.import_module(module), function)
    compiled = (
        make_case(devices, **arguments) if for_all_devices else _for_one(devices[0], make_case, arguments)
    ).compile()
    result = dataclasses.asdict(compiled_program(compiled, topology))
    del result["directory"], result["generation"]
    directory.joinpath("result.json").write_text(json.dumps(result))


def compiled_program(compiled: jax.stages.Compiled, topology: str) -> CompiledProgram:
    """The text and the sizes of a compiled program, without listings."""
    memory = compiled.memory_analysis()
    output = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return CompiledProgram(
        generation=topology.split(":")[0],
        hlo=compiled.as_text(),
        temporary_bytes=memory.temp_size_in_bytes,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=output,
        result_bytes=memory.output_size_in_bytes,
        # XLA's GPU compiler counts no peak.
        peak_bytes=memory.peak_memory_in_bytes or memory.argument_size_in_bytes + memory.temp_size_in_bytes + output,
        code_bytes=memory.generated_code_size_in_bytes,
        host_bytes=memory.host_temp_size_in_bytes,
        directory=None,
    )


def _for_one(device: jax.Device, make_case: Callable, arguments: dict) -> jax.stages.Lowered:
    mesh = Mesh(np.array([device]), ("chip",))
    here = NamedSharding(mesh, PartitionSpec())
    # Without a mesh, Pallas and the choice of its blocks would ask the default device for the type of TPU.
    with jax.set_mesh(mesh):
        function, abstract = make_case(**arguments)
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), abstract)
        return (function if hasattr(function, "lower") else jax.jit(function)).lower(*abstract)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog=f"python -m {__spec__.name}",
        description=__doc__,
        epilog=f"example:\n  python -m {__spec__.name} my_cases:layer '{{\"frames\": 21}}' v5e:2x2 listings one",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("case", metavar="MODULE:FUNCTION", help="function that returns another one and its arguments")
    parser.add_argument("keywords", metavar="ARGUMENTS", type=json.loads, help="of FUNCTION, as a JSON object")
    parser.add_argument("topology", metavar="TOPOLOGY", help="a slice of TPUs, v5e:2x2")
    parser.add_argument("directory", metavar="DIRECTORY", type=Path, help="for the listings and result.json")
    parser.add_argument("mesh", metavar="MESH", choices=("all", "one"), help="all or one: devices of the program")
    given = parser.parse_args()
    _compile(given.case, given.keywords, given.topology, given.directory, for_all_devices=given.mesh == "all")
