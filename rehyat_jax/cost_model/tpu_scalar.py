"""Executes the scalar half of a compiled TPU kernel, to count how often each of its bundles is issued.

A bundle's scalar instructions keep the grid's indices, decide which parts of the kernel run at a grid step (`pl.when`)
and branch; its vector instructions do the work. Branches depend only on scalars. Executing the scalar instructions
therefore gives the exact count of every bundle, including the pipeline's own steps, inner loops, and unrolled or
predicated parts. The kernel's source is not needed.
"""

import collections
import dataclasses

import numpy as np

from rehyat_jax.cost_model.tpu_bundles import Kernel
from rehyat_jax.cost_model.tpu_instructions import Instruction, is_literal, literal, operation, parse

_MAX_BLOCKS = 30_000_000
"""Basic blocks executed before a kernel is assumed never to end; the largest here run some millions."""


class ScalarProgram:
    """A kernel's branches and what they depend on.

    Attributes:
      depends_on_data: True if a branch may depend on numbers that exist only when the kernel runs.
    """

    def __init__(self, kernel: Kernel):
        """Raises ValueError on unknown control flow."""
        instructions = _instructions(kernel)
        branches = [instruction for instruction in instructions if instruction.target is not None]
        needed = _needed(instructions, branches)
        self.depends_on_data = any(instruction.is_data for instruction in needed)

        branch_before = {branch.bundle + 1 + kernel.delay_slots: branch for branch in branches}
        cuts = sorted({0, len(kernel.bundles), *branch_before, *(branch.target for branch in branches)})
        self._lengths = np.diff(cuts)
        self._block_at = {cut: block for block, cut in enumerate(cuts)}
        self._branches = [branch_before.get(end) for end in cuts[1:]]
        self._blocks: list[list[Instruction]] = [[] for _ in self._lengths]
        # Phis first: other instructions of their bundle read their results.
        for instruction in sorted(needed, key=lambda instruction: (instruction.bundle, not instruction.is_phi)):
            self._blocks[np.searchsorted(cuts, instruction.bundle, side="right") - 1].append(instruction)

    def times_issued(self, *, core: int = 0, data: float = 0.0) -> np.ndarray:
        """The number of times that each bundle is issued in one call of the kernel, int [bundles].

        Args:
          core: number of the executing core, if a chip's cores divide the grid between them.
          data: assumed value of every number that exists only when the kernel runs.

        Raises:
          ValueError: the kernel does not end.
        """
        memory: dict[int, int | float] = {}
        blocks = [[_executable(instruction, memory, core, data) for instruction in block] for block in self._blocks]
        read = {name for block in blocks for _, _, _, _, operands, _, _ in block for name in operands}
        values = {name: literal(name) for name in read if is_literal(name)}

        visits = np.zeros(len(blocks), int)
        block = 0
        for _ in range(_MAX_BLOCKS):
            if block == len(blocks):
                return np.repeat(visits, self._lengths)
            visits[block] += 1
            for predicate, expected, otherwise, compute, operands, result, register in blocks[block]:
                if predicate is None or values[predicate] == expected:
                    value = compute(*[values[operand] for operand in operands])
                elif otherwise is not None:
                    value = values[otherwise]
                else:
                    continue
                values[result] = values[register] = value
            branch = self._branches[block]
            is_taken = branch and (branch.predicate is None or values[branch.predicate] == branch.expected)
            block = self._block_at[branch.target] if is_taken else block + 1
        raise ValueError(f"expected the kernel to end, found {_MAX_BLOCKS:,} basic blocks executed with data={data}")


def _instructions(kernel: Kernel) -> list[Instruction]:
    """All scalar instructions in order. Those that take a division's results in turn get the index of their result."""
    instructions, taken = [], collections.Counter()
    for bundle, text in enumerate(kernel.bundles):
        for part in text.split(" ;; "):
            instruction = parse(bundle, part)
            if instruction is None:
                continue
            if instruction.name == "spop.drf":
                division = instruction.operands[0]
                instruction = dataclasses.replace(instruction, operands=(division, str(taken[division])))
                taken[division] += 1
            instructions.append(instruction)
    return instructions


def _needed(instructions: list[Instruction], branches: list[Instruction]) -> list[Instruction]:
    """The instructions that the branches depend on, in order."""
    writers = collections.defaultdict(list)
    for instruction in instructions:
        writers[instruction.cell if instruction.name == "sst" else instruction.result].append(instruction)
    needed, asked = set(), [branch.predicate for branch in branches if branch.predicate]
    while asked:
        for writer in writers[asked.pop()]:
            if writer not in needed:
                needed.add(writer)
                asked += writer.reads if writer.name != "sld" else {*writer.reads, writer.cell}
    return [instruction for instruction in instructions if instruction in needed]


def _executable(instruction: Instruction, memory: dict, core: int, data: float) -> tuple:
    """Predicate, its expected value, result otherwise, function, operands, and the two names of the result."""
    operands = instruction.operands
    if instruction.is_phi:
        compute, operands = (lambda value: value), (instruction.register,)
    elif instruction.name == "core_id":
        compute = lambda: core
    elif instruction.name in ("data", "spop"):
        compute, operands = (lambda: data), ()
    elif instruction.name == "sld":
        compute, operands = (lambda *address: memory.get(sum(address), data)), instruction.address
    elif instruction.name == "sst":
        compute = lambda value, *address: memory.update({sum(address): value})
        operands += instruction.address
    else:
        compute = operation(instruction.name)
    if compute is None:
        raise ValueError(
            f"bundle {instruction.bundle:#x}: a branch depends on {instruction.name}, an instruction not known here"
        )
    predicate, expected, otherwise = instruction.predicate, instruction.expected, instruction.otherwise
    return predicate, expected, otherwise, compute, operands, instruction.result, instruction.register
