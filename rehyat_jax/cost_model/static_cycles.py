"""The cycles of a program on a TPU, from the TPU compiler's listings; no TPU is needed.

The cycles of Pallas kernels are the bundles that they issue, counted by executing their control flow (`tpu_scalar`).
For XLA's own operations they are the compiler's estimate of each fusion, times the trips of the loops around it. See
docs/static_cycles.md.
"""

import dataclasses
import functools
from collections.abc import Callable
from fractions import Fraction

import numpy as np

from rehyat_jax.cost_model.hlo_branches import ShareOf, branch_shares, weighted
from rehyat_jax.cost_model.hlo_operations import Branch, Operation, executed_operations
from rehyat_jax.cost_model.tpu_bundles import Kernel, Region, read_kernel, regions
from rehyat_jax.cost_model.tpu_compile import CompiledProgram
from rehyat_jax.cost_model.tpu_kernels import kernel_calls
from rehyat_jax.cost_model.tpu_scalar import ScalarProgram

CORES_SHARING_A_GRID = {"v5p": 2}
"""Chips whose cores divide the parallel dimensions of a grid between them (megacore). All others: one core a device."""


SPLASH_DATA = 0x02020202
"""A word of the mask that splash attention's kernels read, four blocks a word: 2 is a block without masked scores."""


def assumed_data(kernel: str, others: float = 0.0) -> float:
    """The assumed value of a kernel's numbers that exist only when it runs, see `StaticProgram.cost`.

    Args:
      kernel: its name.
      others: the value for kernels other than splash attention's. 0 holds for models that normalise queries and keys.
    """
    return SPLASH_DATA if kernel.startswith("splash") else others


@dataclasses.dataclass(frozen=True)
class KernelCost:
    """A kernel that a program calls `calls` times; `times` is how often each bundle is issued in one call."""

    name: str
    calls: int
    kernel: Kernel
    times: np.ndarray

    @property
    def cycles(self) -> int:
        return self.calls * int(self.times.sum())

    @property
    def mxu_cycles(self) -> float:
        """The cycles that its matrix products would take if all matrix units were always in use."""
        return self.calls * float(self.times @ self.kernel.slots[:, 0] / self.kernel.capacity[0])

    @functools.cached_property
    def regions(self) -> list[Region]:
        return regions(self.kernel, self.times)

    @property
    def inner_loop(self) -> Region:
        """The region with the most matrix products, or with the most cycles if there are none."""
        return max(self.regions, key=lambda region: (region.cycles * region.busy[0], region.cycles))


@dataclasses.dataclass(frozen=True)
class ProgramCost:
    """The kernels of one program, and the operations that XLA made itself and estimated.

    `shares` is the assumed share of executions of each branch of a conditional.
    """

    kernels: list[KernelCost]
    xla: list[Operation]
    shares: dict[Branch, Fraction] = dataclasses.field(default_factory=dict)

    @property
    def kernel_cycles(self) -> int:
        return sum(kernel.cycles for kernel in self.kernels)

    @property
    def xla_cycles(self) -> int:
        return sum(operation.estimated_cycles * operation.executions for operation in self.xla)

    @property
    def cycles(self) -> int:
        return self.kernel_cycles + self.xla_cycles

    @property
    def main_kernel(self) -> KernelCost | None:
        """The kernel with the most matrix products."""
        return max(self.kernels, key=lambda kernel: kernel.mxu_cycles, default=None)


class StaticProgram:
    """A compiled program whose listings have been read.

    Attributes:
      depends_on_data: True if the control flow of a kernel may depend on numbers that exist only when it runs.
    """

    def __init__(self, program: CompiledProgram):
        """Raises ValueError on unknown control flow, or on an unknown format of the compiler's listings."""
        self._cores = CORES_SHARING_A_GRID.get(program.generation, 1)
        operations = list(executed_operations(program.hlo))
        self._xla = [operation for operation in operations if operation.estimated_cycles is not None]
        self._calls = [operation for operation in operations if operation.kernel_body is not None]

        listed = program.hlo.count('custom_call_target="tpu_custom_call"')
        if len({call.name for call in self._calls}) != listed:
            raise ValueError(f"found {listed} kernels in the program, but reached only {[x.name for x in self._calls]}")

        self._kernels: dict[str, tuple[Kernel, ScalarProgram]] = {}
        for name, call in kernel_calls(program.hlo).items():
            kernel = read_kernel(program.directory, call.digest(program.generation), program.generation)
            self._kernels[name] = kernel, ScalarProgram(kernel)
        self.depends_on_data = any(scalars.depends_on_data for _, scalars in self._kernels.values())

    def cost(
        self, data: float | Callable[[str], float] = 0.0, *, share_of: ShareOf = lambda branch: Fraction(1)
    ) -> ProgramCost:
        """The cost of one execution on one chip (v5p), or one core (v5e, v6e have one, tpu7x two a chip).

        Args:
          data: assumed value of every number that a kernel's control flow depends on and that exists only when the
            kernel runs; or a function from the kernel's name to it.
          share_of: share of executions of a conditional's branch; by default all branches always run.
        """
        data_of = data if callable(data) else lambda name: data
        times = {}
        for name, (_, scalars) in self._kernels.items():
            per_core = (scalars.times_issued(core=core, data=data_of(name)) for core in range(self._cores))
            times[name] = max(per_core, key=np.sum)
        costs = [(operation, operation.estimated_cycles) for operation in self._xla]
        costs += [(call, int(times[call.name].sum())) for call in self._calls]
        shares = branch_shares(costs, share_of)
        kernels = [
            KernelCost(call.name, weighted(call, shares).executions, self._kernels[call.name][0], times[call.name])
            for call in self._calls
        ]
        return ProgramCost(kernels, [weighted(operation, shares) for operation in self._xla], shares)
