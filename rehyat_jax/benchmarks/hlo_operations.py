"""Which operations of an optimised HLO module are executed, and how often: loops multiply what is inside them."""

import dataclasses
import re
from collections.abc import Iterator

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_OPERATION_START = re.compile(r"\s+(?:ROOT )?%[\w.\-]+ = ")
_OPERATION = re.compile(r"\s+(?:ROOT )?%([\w.\-]+) = .*?[\]})] ([\w\-]+)\((.*)")
_CALLED = re.compile(r"(?:to_apply|calls|branch_computations|true_computation|false_computation)=(\{[^}]*\}|%[\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Operation:
    """One line of HLO: its name, its kind ("fusion", "custom-call"...), all of it after the kind, its executions."""

    name: str
    kind: str
    text: str
    executions: int

    @property
    def estimated_cycles(self) -> int | None:
        """The compiler's estimate of one execution; None where it made none."""
        match = re.search(r'"estimated_cycles":"(\d+)"', self.text)
        # The largest integer stands for "not estimated".
        return int(match.group(1)) if match and int(match.group(1)) < 2**60 else None

    @property
    def kernel_body(self) -> str | None:
        """The serialised Pallas kernel that is called here; None for anything else."""
        match = re.search(r'"body":"([^"]*)"', self.text)
        return match.group(1) if self.kind == "custom-call" and "tpu_custom_call" in self.text and match else None

    @property
    def source(self) -> str:
        """Where in the Python program it comes from."""
        match = re.search(r'op_name="([^"]*)"', self.text)
        return match.group(1) if match else ""


def executed_operations(hlo: str) -> Iterator[Operation]:
    """All operations in the order of the text, those in called computations in place of the call.

    Of a conditional all branches count: which of them runs is not known.

    Raises:
      ValueError: a loop that does not count from 0 to a constant.
    """
    computations: dict[str, list[str]] = {}
    entry = None
    for line in hlo.splitlines():
        if match := _COMPUTATION.match(line):
            computations[match.group(2)] = lines = []
            entry = match.group(2) if match.group(1) else entry
        elif _OPERATION_START.match(line):
            lines.append(line)
        elif computations:
            lines[-1:] = [f"{last} {line}" for last in lines[-1:]]
    if entry is None:
        raise ValueError("expected an HLO module, found no ENTRY computation")
    yield from _executed(computations, entry, 1)


def _executed(computations: dict[str, list[str]], computation: str, executions: int) -> Iterator[Operation]:
    for line in computations[computation]:
        match = _OPERATION.match(line)
        if match is None:
            continue
        name, kind, text = match.groups()
        if kind == "while":
            body, trips = re.search(r"body=%([\w.\-]+)", text).group(1), _trips(computations, name, text)
            yield from _executed(computations, body, executions * trips)
        elif kind in ("call", "conditional", "async-start"):
            for called in re.findall(r"%([\w.\-]+)", " ".join(_CALLED.findall(text))):
                yield from _executed(computations, called, executions)
        else:
            yield Operation(name, kind, text, executions)


def _trips(computations: dict[str, list[str]], name: str, text: str) -> int:
    """How often a loop's body runs: from the loop itself, or from a condition `counter < constant`."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', text):
        return int(known.group(1))
    condition = "\n".join(computations[re.search(r"condition=%([\w.\-]+)", text).group(1)])
    constants = re.findall(r"= s32\[\]\S* constant\((\d+)\)", condition)
    if len(constants) != 1 or "direction=LT" not in condition:
        raise ValueError(f"HLO loop {name}: expected it to count from 0 to a constant, found the condition {condition}")
    return int(constants[0])
