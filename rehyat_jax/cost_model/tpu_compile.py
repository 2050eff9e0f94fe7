"""Ahead-of-time compilation for TPUs, on any machine, with the compiler's listings of the kernels.

libtpu compiles on any machine. A process of its own compiles every program, without listings. Others list the kernels
of the compiled program (`tpu_kernels`). This is the first one's command:

  python -m rehyat_jax.cost_model.tpu_compile MODULE:FUNCTION ARGUMENTS TOPOLOGY DIRECTORY MESH
"""

import argparse
import dataclasses
import importlib
import json
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from rehyat_jax.cost_model.tpu_bundles import generation_of
from rehyat_jax.cost_model.tpu_kernels import list_kernels
from rehyat_jax.cost_model.tpu_target import check_libtpu, described_topology, on_one_chip, running, unknown_topology

_RESULT = "result.json"


class DoesNotFitError(Exception):
    """The compiler found that the program needs more memory (HBM, or VMEM for a kernel) than the chip has."""


@dataclasses.dataclass(frozen=True)
class CompiledProgram:
    """The compiler's results: `hlo` is the optimised module's text; sizes are bytes of HBM on one device.

    `result_bytes` counts all results, `output_bytes` those that do not take the place of arguments. `peak_bytes` is
    the most memory in use at a time, without the program itself. `host_bytes` is the host's memory that one device
    uses while the program runs. `directory` has the listings of its kernels.
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


@contextmanager
def compiled_for_tpu(
    case: str,
    arguments: dict,
    topology: str,
    *,
    for_all_devices: bool = False,
    on_compiled: Callable[[CompiledProgram], None] | None = None,
) -> Iterator[CompiledProgram]:
    """Compiles one case for a topology; the listings of its kernels last as long as the context.

    Args:
      case: "module:function". The function takes `arguments` as keywords, and returns a function, jitted or not, and a
        tuple of its arguments, trees of `jax.ShapeDtypeStruct`: for one chip.
      arguments: JSON-ready.
      topology: as in `jax.experimental.topologies`: "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1" or
        larger, or a single chip: "v5e:1x1", "v5p:1x1x1".
      for_all_devices: True if the case is a program for all devices of the topology: the function takes them first,
        and returns a `jax.stages.Lowered`.
      on_compiled: called with the program before its kernels are listed.

    Raises:
      InputError: libtpu is missing, or the topology is unknown to it or to this package.
      DoesNotFitError: the program needs more memory than the chip has.
      RuntimeError: any other error of the compiler.
    """
    check_libtpu()
    generation = generation_of(topology)
    with tempfile.TemporaryDirectory(prefix="tpu_compile_") as folder:
        directory, mesh = Path(folder), "all" if for_all_devices else "one"
        log = directory / "log.txt"
        command = [sys.executable, "-m", __spec__.name, case, json.dumps(arguments), topology, folder, mesh]
        with running(command, log) as process:
            if process.wait():
                _raise(log.read_text(), textwrap.shorten(f"{case} {arguments}", 200), topology)
        result = json.loads((directory / _RESULT).read_text())
        program = CompiledProgram(generation, **result, directory=directory)
        if on_compiled is not None:
            on_compiled(program)
        list_kernels(program.hlo, topology, directory)
        yield program


def _raise(stderr: str, case: str, topology: str):
    lines = [line for line in stderr.splitlines() if line.strip()]
    message = next((line for line in reversed(lines) if "Error" in line or "exceeded" in line), "".join(lines[-1:]))
    if "RESOURCE_EXHAUSTED" in stderr:
        raise DoesNotFitError(message)
    if "get_topology_desc" in stderr:
        raise unknown_topology(topology, message)
    raise RuntimeError(f"{case}: cannot be compiled for {topology}: {message}")


def _compile(case: str, arguments: dict, topology: str, directory: Path, *, for_all_devices: bool) -> None:
    """Compiles in the child process, and writes the result."""
    module, function = case.split(":")
    devices = described_topology(topology)
    make_case = getattr(importlib.import_module(module), function)
    lowered = make_case(devices, **arguments) if for_all_devices else on_one_chip(devices[0], make_case, arguments)
    result = dataclasses.asdict(compiled_program(lowered.compile(), topology))
    del result["directory"], result["generation"]
    directory.joinpath(_RESULT).write_text(json.dumps(result))


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
    parser.add_argument("directory", metavar="DIRECTORY", type=Path, help="for result.json")
    parser.add_argument("mesh", metavar="MESH", choices=("all", "one"), help="all or one: devices of the program")
    given = parser.parse_args()
    _compile(given.case, given.keywords, given.topology, given.directory, for_all_devices=given.mesh == "all")
