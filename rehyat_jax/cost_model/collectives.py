"""The bytes that a program moves between devices, from its optimised HLO."""

import collections
import math
import re
from collections.abc import Iterable, Mapping
from fractions import Fraction

from rehyat_jax.cost_model.hlo_arrays import arrays_of
from rehyat_jax.cost_model.hlo_branches import weighted
from rehyat_jax.cost_model.hlo_operations import Branch, Operation

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


def collective_bytes(
    operations: Iterable[Operation], devices: int, shares: Mapping[Branch, Fraction] | None = None
) -> dict[str, int]:
    """Bytes that one device sends in one execution, by kind, with an optimal algorithm on two-way rings.

    Among n devices that is, of an array:

    - all-gather: (n - 1) / n of the gathered array;
    - reduce-scatter: (n - 1) / n of the unscattered array;
    - all-reduce: 2 (n - 1) / n;
    - all-to-all: (n - 1) / n;
    - collective-permute: all of it.

    Args:
      operations: from `executed_operations(hlo, of_fusions=True)`.
      devices: number of devices of the program.
      shares: see `cost_model.hlo_branches`.
    """
    sent: dict[str, float] = collections.Counter()
    # One collective that runs next to several fusions appears in each of them, as parts of one chain.
    seen = set()
    for operation in operations:
        kind = operation.kind.removesuffix("-start")
        if kind not in KINDS:
            continue
        if operation.fusion:
            key = (operation.computation, kind, _chain(operation))
            if key in seen:
                continue
            seen.add(key)
        size, group = _size(operation), _group_size(operation.text, devices)
        if kind == "all-reduce" and operation.fusion.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"
        elif kind == "reduce-scatter":
            size *= group  # its result is one part
        share = 1 if kind == "collective-permute" else (group - 1) / group
        times = weighted(operation, shares or {}).executions
        sent[kind] += times * size * share * (2 if kind == "all-reduce" else 1)
    return {kind: round(sent[kind]) for kind in KINDS}


def _chain(operation: Operation) -> str:
    """The text that the parts of one collective have in common. Different collectives may share a channel number."""
    found = re.search(r'chain_id="\d+"', operation.text) or re.search(r"channel_id=\d+", operation.text)
    return found.group() if found else operation.name


def _size(operation: Operation) -> int:
    """Bytes of the result. A -start also returns flags and, except for all-reduce, its operands first."""
    arrays = [array.bytes for array in arrays_of(operation.result) if array.shape]
    has_operands = operation.kind.endswith("-start") and operation.kind != "all-reduce-start"
    return sum(arrays[len(arrays) // 2 :] if has_operands else arrays)


def _group_size(text: str, devices: int) -> int:
    """The number of devices that take part, from any of XLA's three notations of groups."""
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return listed.group(1).count(",") + 1
    if tiled := re.search(r"replica_groups=\[\d+,(\d+)\]<=", text):
        return int(tiled.group(1))
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", text):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named.group(1)))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named.group(2)))
    return devices
