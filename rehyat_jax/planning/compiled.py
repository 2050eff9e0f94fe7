"""The compiled program of a plan: memory and cost, read from an earlier plan of the same program if there was one."""

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import importlib.metadata
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import rehyat_jax
from rehyat_jax.cost_model.chips import Chip, chip_of, devices_of
from rehyat_jax.cost_model.tpu_compile import CompiledProgram, DoesNotFitError, compiled_for_tpu, compiled_program
from rehyat_jax.errors import InputError
from rehyat_jax.files.caches import cache_folder
from rehyat_jax.files.json_files import read_json_object
from rehyat_jax.files.write import written_whole
from rehyat_jax.models.wan.config import WanConfig
from rehyat_jax.planning.estimate import Cost, GpuCost, TpuCost, bytes_asked_for, memory_by_kind, step_cost

Report = Callable[[str], None]
"""Takes a message about work that has been done."""


def no_report(message: str) -> None:
    del message


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The compiler's verdict on a program, for one device.

    Attributes:
      memory: bytes by kind; empty if the compiler could not fit the program.
      peak: bytes that the program needs; None if it does not fit and the compiler does not say.
      cost: cost of one execution; None if the program does not fit.
      compile_seconds: wall-clock time of compilation, next to the machine's other work.
      is_earlier: whether an earlier plan compiled it.
    """

    memory: dict[str, int]
    peak: int | None
    cost: Cost | None
    compile_seconds: float
    is_earlier: bool = False

    def to_json(self) -> dict[str, Any]:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        cost = self.cost and {
            field.name: getattr(self.cost, field.name)
            for field in dataclasses.fields(self.cost)
            if field.name != "chip"
        }
        return fields | {"cost": cost}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any], chip: Chip) -> "Outcome":
        make_cost = GpuCost if chip.is_gpu else TpuCost
        cost = fields["cost"] and make_cost(**fields["cost"], chip=chip)
        return cls(**fields | {"cost": cost, "is_earlier": True})


class HasOutcome:
    """The parts of `outcome` that plans show, for the class of a plan."""

    outcome: Outcome

    @property
    def memory(self) -> dict[str, int]:
        return self.outcome.memory

    @property
    def peak(self) -> int | None:
        return self.outcome.peak

    @property
    def cost(self) -> Cost | None:
        return self.outcome.cost

    @property
    def fits(self) -> bool:
        return self.outcome.cost is not None


def compiled_outcome(
    module: str,
    case: Mapping[str, Any],
    topology: str,
    *,
    arguments: Mapping[str, int],
    devices: int,
    wan: WanConfig | None,
    flops: float,
    vmem_remedy: str,
    report: Report = no_report,
) -> Outcome:
    """Compiles a program, unless an earlier plan did: the same case, by the same code, with the same compiler.

    Earlier outcomes are in `plans` of `cache_folder`.

    Args:
      module: whose function `lowered` makes the program: (devices, **case) -> `jax.stages.Lowered`.
      case: JSON-ready.
      arguments: bytes of the program's arguments on a device, by kind.
      devices, wan, flops: see `step_cost`.
      vmem_remedy: what to change if a kernel does not fit the chip's VMEM.
      report: called with a message about the program's memory when it is compiled, before its cycles are known.

    Raises:
      InputError: a kernel needs more VMEM than the chip has.
    """
    chip, file = chip_of(topology), _file(module, case, topology)
    with contextlib.suppress(InputError, TypeError, KeyError):
        if file.exists():
            return Outcome.from_json(read_json_object(file), chip)
    start = time.monotonic()

    def report_memory(program: CompiledProgram) -> None:
        needed = sum(memory_by_kind(program, dict(arguments)).values())
        fits = "fits" if needed <= chip.hbm_bytes else "does not fit"
        sizes = f"{needed / 2**30:.2f} of {chip.hbm_bytes / 2**30:.2f} GiB"
        report(f"the program needs {sizes} and {fits}; the cycles of its kernels follow")

    try:
        with _compiled(module, case, topology, report_memory) as program:
            seconds = time.monotonic() - start
            cost = step_cost(program, chip, devices, wan, flops)
    except DoesNotFitError as error:
        if "vmem" in str(error).lower():
            raise InputError(
                f"--topology {topology}: a kernel does not fit the chip's VMEM ({error}); {vmem_remedy}"
            ) from error
        peak = bytes_asked_for(error, sum(arguments.values()))
        found = Outcome({}, peak, None, time.monotonic() - start)
    else:
        memory = memory_by_kind(program, dict(arguments))
        peak = sum(memory.values())
        found = Outcome(memory, peak, cost if peak <= chip.hbm_bytes else None, seconds)
    # A place that cannot be written only makes the next plan slow.
    with contextlib.suppress(OSError, InputError), written_whole(file) as temporary:
        temporary.write_text(json.dumps(found.to_json(), indent=1) + "\n")
    return found


def _compiled(
    module: str, case: Mapping[str, Any], topology: str, on_compiled: Callable[[CompiledProgram], None]
) -> contextlib.AbstractContextManager[CompiledProgram]:
    """The compiled program for all devices; its listings last as long as the context."""
    if chip_of(topology).is_gpu:
        lowered = importlib.import_module(module).lowered(devices_of(topology), **case)
        return contextlib.nullcontext(compiled_program(lowered.compile(), topology))
    function = f"{module}:lowered"
    return compiled_for_tpu(function, dict(case), topology, for_all_devices=True, on_compiled=on_compiled)


def _file(module: str, case: Mapping[str, Any], topology: str) -> Path:
    """The file of an outcome; its name is a digest of all that the outcome depends on."""
    compiler = "jaxlib" if chip_of(topology).is_gpu else "libtpu"
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", compiler)}
    content = json.dumps([module, case, topology, versions, _code()], sort_keys=True)
    return cache_folder() / "plans" / f"{hashlib.sha256(content.encode()).hexdigest()}.json"


@functools.cache
def _code() -> str:
    """A digest of this package's code."""
    digest, root = hashlib.sha256(), Path(rehyat_jax.__file__).parent
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()
