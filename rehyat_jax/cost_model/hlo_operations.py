"""The executed operations of an optimised HLO module, and how often each runs: loops multiply their contents."""

import dataclasses
import itertools
import re
from collections.abc import Iterator

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_OPERATION_START = re.compile(r"\s+(?:ROOT )?%[\w.\-]+ = ")
_OPERATION = re.compile(r"\s+(?:ROOT )?%([\w.\-]+) = (.*?[\]})]) ([\w\-]+)\((.*)")
_CALLED = re.compile(r"(?:to_apply|calls)=%([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRUE_OR_FALSE = re.compile(r"(true|false)_computation=%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Branch:
    """One of `count` branches of the conditional `name`, of which one runs. If there are two, number 1 is for true."""

    name: str
    number: int
    count: int
    source: str


@dataclasses.dataclass(frozen=True)
class Operation:
    """One line of HLO.

    Attributes:
      name: name of its result.
      result: type of its result.
      kind: "fusion", "custom-call"...
      text: the rest of the line after the kind.
      executions: number of executions, as if every branch of the conditionals around it ran.
      branches: the branches that contain it, outermost first.
      computation: the computation that contains it, not counting fusions.
      fusion: the computation of the fusion that contains it.
    """

    name: str
    result: str
    kind: str
    text: str
    executions: int
    branches: tuple[Branch, ...] = ()
    computation: str = ""
    fusion: str = ""

    @property
    def operands(self) -> list[str]:
        """Names of its operands."""
        return re.findall(r"%([\w.\-]+)", self.text.split(")")[0])

    @property
    def estimated_cycles(self) -> int | None:
        """The compiler's estimate of one execution; None if it made none."""
        match = re.search(r'"estimated_cycles":"(\d+)"', self.text)
        # The largest integer stands for "not estimated".
        return int(match.group(1)) if match and int(match.group(1)) < 2**60 else None

    @property
    def kernel_body(self) -> str | None:
        """The serialised Pallas kernel that it calls; None for anything else."""
        match = re.search(r'"body":"([^"]*)"', self.text)
        return match.group(1) if self.kind == "custom-call" and "tpu_custom_call" in self.text and match else None

    @property
    def source(self) -> str:
        """Its origin in the Python program."""
        match = re.search(r'op_name="([^"]*)"', self.text)
        return match.group(1) if match else ""


def executed_operations(hlo: str, *, of_fusions: bool = False) -> Iterator[Operation]:
    """All operations in the order of the text; a call is replaced by the operations of the called computation.

    All branches of a conditional count, because it is not known which of them runs.

    Args:
      of_fusions: True to yield the operations in a fusion too, after it.

    Raises:
      ValueError: a loop that does not count in constant steps to a constant.
    """
    entry, computations = _computations(hlo)
    yield from _Walk(computations, of_fusions).operations(entry, 1, ())


def types_of(hlo: str) -> dict[str, str]:
    """The type of the result of every operation in the text of an HLO module, by the operation's name."""
    lines = itertools.chain.from_iterable(_computations(hlo)[1].values())
    return {match.group(1): match.group(2) for line in lines if (match := _OPERATION.match(line))}


def _computations(hlo: str) -> tuple[str, dict[str, list[str]]]:
    """The name of the first computation to run, and the lines of all. Raises ValueError if there is none."""
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
    return entry, computations


@dataclasses.dataclass(frozen=True)
class _Walk:
    computations: dict[str, list[str]]
    of_fusions: bool

    def operations(
        self, computation: str, executions: int, branches: tuple[Branch, ...], fused_in: str = ""
    ) -> Iterator[Operation]:
        for line in self.computations[computation]:
            match = _OPERATION.match(line)
            if match is None:
                continue
            operation = Operation(
                *match.groups(), executions, branches, fused_in or computation, fused_in and computation
            )
            name, kind, text = operation.name, operation.kind, operation.text
            if kind == "while":
                body = re.search(r"body=%([\w.\-]+)", text).group(1)
                trips = _trips(self.computations, computation, operation)
                yield from self.operations(body, executions * trips, branches)
            elif kind == "conditional":
                called = _branches(text)
                for number, branch in enumerate(called):
                    here = Branch(name, number, len(called), operation.source)
                    yield from self.operations(branch, executions, (*branches, here))
            elif kind in ("call", "async-start"):
                for called in _CALLED.findall(text):
                    yield from self.operations(called, executions, branches)
            else:
                yield operation
                if kind == "fusion" and self.of_fusions:
                    for called in _CALLED.findall(text):
                        yield from self.operations(called, executions, branches, operation.computation)


def _branches(text: str) -> list[str]:
    """The computations of a conditional's branches, by number."""
    if listed := _BRANCHES.search(text):
        return re.findall(r"%([\w.\-]+)", listed.group(1))
    named = dict(_TRUE_OR_FALSE.findall(text))
    return [named["false"], named["true"]]


def _trips(computations: dict[str, list[str]], caller: str, loop: Operation) -> int:
    """The number of times that a loop's body runs, from the loop itself or from a condition `counter < constant`."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.text):
        return int(known.group(1))
    called = {role: re.search(rf"{role}=%([\w.\-]+)", loop.text).group(1) for role in ("condition", "body")}
    condition = computations[called["condition"]]
    limits = re.findall(r"= [su]32\[\]\S* constant\((\d+)\)", "\n".join(condition))
    if len(limits) != 1 or "direction=LT" not in "\n".join(condition):
        raise ValueError(f"HLO loop {loop.name}: expected it to count to a constant, found the condition {condition}")
    counters = re.findall(r"get-tuple-element\([^)]*\), index=(\d+)", "\n".join(condition))
    first = step = None
    if len(counters) == 1:
        first = _constant(computations[caller], _element(computations[caller], loop.text, int(counters[0])))
        step = _step(computations[called["body"]], int(counters[0]))
    return -(-(int(limits[0]) - (first or 0)) // (step or 1))


def _line(lines: list[str], name: str) -> Operation | None:
    """The operation of that name."""
    for line in lines:
        match = _OPERATION.match(line)
        if match and match.group(1) == name:
            return Operation(*match.groups(), 1)
    return None


def _element(lines: list[str], operands: str, index: int) -> str:
    """The name of an element of the tuple that a loop is given; "" if the tuple is not made here."""
    operation = _line(lines, re.search(r"%([\w.\-]+)", operands).group(1))
    elements = operation.operands if operation else []
    return elements[index] if index < len(elements) else ""


def _constant(lines: list[str], name: str) -> int | None:
    """The constant of that name, perhaps copied; None for anything else."""
    operation = _line(lines, name)
    if operation and operation.kind in ("copy", "bitcast"):
        return _constant(lines, operation.operands[0])
    number = re.match(r"(\d+)\)", operation.text) if operation and operation.kind == "constant" else None
    return int(number.group(1)) if number else None


def _step(body: list[str], index: int) -> int | None:
    """The number that a loop's body adds to its counter, element `index` of its tuple; None if it is not found."""
    root = next(match for line in body if "ROOT " in line and (match := _OPERATION.match(line)))
    elements = Operation(*root.groups(), 1).operands
    added = _line(body, elements[index]) if index < len(elements) else None
    if added is None or added.kind != "add":
        return None
    steps = [number for name in added.operands if (number := _constant(body, name)) is not None]
    return steps[0] if len(steps) == 1 else None
