"""Memory, cycles, bytes moved and seconds of a compiled train step."""

import dataclasses
import re
from collections.abc import Mapping
from fractions import Fraction

from rehyat_jax.cost_model.chips import Chip
from rehyat_jax.cost_model.collectives import collective_bytes
from rehyat_jax.cost_model.hlo_branches import ShareOf
from rehyat_jax.cost_model.hlo_operations import Branch, executed_operations
from rehyat_jax.cost_model.memory_bound import memory_bytes
from rehyat_jax.cost_model.static_cycles import ProgramCost, StaticProgram, assumed_data
from rehyat_jax.cost_model.tpu_compile import CompiledProgram, DoesNotFitError
from rehyat_jax.models.hybrid import FORM_SWITCH
from rehyat_jax.models.wan.config import WanConfig
from rehyat_jax.training.rollout import SIMULATED_STEP

STALLS = 1.5
"""Factor of the static cycles, which include no stalls, at the slow end of a step's time. An assumption: nothing here
has run on a TPU."""

GPU_USE = 0.75, 0.3
"""Shares of a GPU's peak at which its arithmetic runs, at the fast and at the slow end. An assumption: a GPU's kernels
have no static cycles. The measured steps are within this range, see docs/gpu.md."""

LINKS_IN_USE = 0.5
"""The share of a chip's links that collectives use at the slow end: a ring along one axis of a torus leaves others
idle."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of one step on one device.

    Attributes:
      collective_bytes: bytes sent, by kind.
      hbm_traffic: least bytes of HBM traffic: arguments and temporaries are read once, results and temporaries are
        written once.
      host_bytes: bytes kept in the host's memory for the backward pass, moved there and back once each. The estimates
        include no time for that, because the bandwidth of links to hosts is not published.
    """

    collective_bytes: dict[str, int]
    hbm_traffic: int
    host_bytes: int
    chip: Chip

    @property
    def compute_seconds(self) -> tuple[float, float]:
        """(low, high) of arithmetic and everything else that kernels do."""
        raise NotImplementedError

    @property
    def hbm_seconds(self) -> float:
        return self.hbm_traffic / self.chip.hbm_bandwidth

    @property
    def collective_seconds(self) -> float:
        """Seconds of collectives with all links in use."""
        return sum(self.collective_bytes.values()) / self.chip.ici_bandwidth

    @property
    def step_seconds(self) -> tuple[float, float]:
        """(low, high), see `assumptions`."""
        low, high = self.compute_seconds
        return (
            max(low, self.hbm_seconds, self.collective_seconds),
            max(high, self.hbm_seconds) + self.collective_seconds / LINKS_IN_USE,
        )

    @property
    def assumptions(self) -> str:
        fast, slow = self._of_compute
        return (
            f"low: the largest of {fast}, least HBM traffic, and collectives on all links, all overlapped; high: "
            f"{slow}, then collectives on {LINKS_IN_USE:.0%} of the links, nothing overlapped"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TpuCost(Cost):
    """The cost from the compiler's listings.

    Attributes:
      cycles: static cycles of kernels and of XLA's own operations, without collectives; for a kernel, at least the
        cycles that memory needs.
      least_cycles: the same, with operations without matrix products as fast as memory allows, where that is faster
        than the compiler's estimate.
      kernel_cycles: cycles of Pallas kernels, with the same minimum as in `cycles`.
    """

    cycles: int
    least_cycles: int
    kernel_cycles: int

    _of_compute = "the least cycles", f"{STALLS} x static cycles (stalls)"

    @property
    def compute_seconds(self) -> tuple[float, float]:
        return self.least_cycles / self.chip.clock, STALLS * self.cycles / self.chip.clock


@dataclasses.dataclass(frozen=True, kw_only=True)
class GpuCost(Cost):
    """The cost from arithmetic only.

    Attributes:
      flops: FLOPs of one device, including recomputation.
    """

    flops: float

    _of_compute = tuple(f"arithmetic at {share:.0%} of the peak" for share in GPU_USE)

    @property
    def compute_seconds(self) -> tuple[float, float]:
        low, high = (self.flops / share / self.chip.peak_flops for share in GPU_USE)
        return low, high


def step_cost(program: CompiledProgram, chip: Chip, devices: int, wan: WanConfig | None, flops: float) -> Cost:
    """The cost of a compiled program.

    Args:
      devices: those that the program runs on.
      wan: the model, whose blocks choose among its forms; None for a program that runs no transformer.
      flops: FLOPs of the program on each device.
    """
    operations = list(executed_operations(program.hlo, of_fusions=True))
    common = dict(
        hbm_traffic=program.argument_bytes + program.result_bytes + 2 * program.temporary_bytes,
        host_bytes=program.host_bytes,
        chip=chip,
    )
    if chip.is_gpu:
        return GpuCost(flops=flops, collective_bytes=collective_bytes(operations, devices), **common)
    static, moved = program_cost(program, wan), memory_bytes(operations)
    kernel_cycles = cycles_of_kernels(static, moved, chip)
    cycles = kernel_cycles + static.xla_cycles
    return TpuCost(
        cycles=cycles,
        least_cycles=cycles - _cycles_above_least(static, moved, chip),
        kernel_cycles=kernel_cycles,
        collective_bytes=collective_bytes(operations, devices, static.shares),
        **common,
    )


def _cycles_above_least(static: ProgramCost, moved: Mapping[str, int], chip: Chip) -> int:
    """Cycles by which the compiler's estimates exceed the memory time of operations that move `moved` bytes."""
    cycles_per_byte = chip.clock / chip.hbm_bandwidth
    return sum(
        operation.executions * max(0, operation.estimated_cycles - round(moved[operation.name] * cycles_per_byte))
        for operation in static.xla
        if operation.name in moved
    )


def cycles_of_kernels(static: ProgramCost, moved: Mapping[str, int], chip: Chip) -> int:
    """Cycles of kernels: those that issue instructions, or those that memory needs for the bytes moved, if more."""
    cycles_per_byte = chip.clock / chip.hbm_bandwidth
    return sum(
        max(kernel.cycles, round(kernel.calls * moved[kernel.name] * cycles_per_byte)) for kernel in static.kernels
    )


def program_cost(program: CompiledProgram, wan: WanConfig | None) -> ProgramCost:
    """Static cycles.

    Kernels take the usual path: full masks in splash attention, fixed shifts in hybrid attention.
    """
    return StaticProgram(program).cost(assumed_data, share_of=shares_of_forms(wan))


def shares_of_forms(wan: WanConfig | None) -> ShareOf:
    """The shares in which the branches of a program's conditionals run.

    A block chooses its form once, and the branches of that conditional are the model's forms in their order. Its name
    scope identifies it, as it does the steps that stage "dmd" simulates or leaves out. For any other conditional the
    largest branch counts: inside `shard_map`, devices may choose differently, and the slowest one decides.
    """
    if wan is None:
        return lambda branch: None
    forms = wan.block_forms
    blocks_of_form = [forms.indices.count(index) for index in range(len(forms.forms))]

    def share(branch: Branch) -> Fraction | None:
        if _IS_SIMULATED_STEP.search(branch.source):
            return Fraction(1, 2)
        if not _IS_FORM_SWITCH.search(branch.source) or branch.count != len(blocks_of_form):
            return None
        return Fraction(blocks_of_form[branch.number], wan.num_layers)

    return share


_IS_SIMULATED_STEP = re.compile(rf"\b{SIMULATED_STEP}\)*/cond$")
_IS_FORM_SWITCH = re.compile(rf"\b{FORM_SWITCH}\)*/cond$")


def memory_by_kind(program: CompiledProgram, arguments: dict[str, int]) -> dict[str, int]:
    """Bytes of HBM on one device: the arguments by kind, then the compiler's additions."""
    rest = {
        # XLA's GPU compiler drops arguments that the step does not read.
        "layout padding": max(0, program.argument_bytes - sum(arguments.values())),
        "temporaries": program.peak_bytes - program.argument_bytes,
        "program": program.code_bytes,
    }
    return {kind: size for kind, size in {**arguments, **rest}.items() if size}


def bytes_asked_for(error: DoesNotFitError, arguments: int) -> int | None:
    """The bytes of HBM that a program would have needed, from the compiler's message; None if it does not say.

    Args:
      arguments: bytes of the program's arguments, which one of the messages does not count.
    """
    size = r"([\d.]+)([KMG])"
    bytes_of = lambda found: int(float(found.group(1)) * 2 ** {"K": 10, "M": 20, "G": 30}[found.group(2)])
    if found := re.search(rf"Used {size} of \S+ hbm", str(error)):
        return bytes_of(found)
    if found := re.search(rf"temporaries \({size}\)", str(error)):
        return bytes_of(found) + arguments
    return None
