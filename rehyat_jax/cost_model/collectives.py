"""What a program moves between devices, from its optimised HLO."""

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
    """Bytes that one device sends in one execution, by kind; of two-way rings, what an optimal algorithm sends.

    Among n devices that is (n - 1) / n of the gathered, or of the unscattered, array, twice that of an array that is
    reduced for all, (n - 1) / n of what is exchanged all to all, and all of what is permuted.

    Args:
      operations: from `executed_operations(hlo, of_fusions=True)`.
      devices: of the program.
      shares: see `cost_model.hlo_branches`.
    """
    sent: dict[str, float] = collections.Counter()
    # One collective that runs beside several fusions appears in each of them, as parts of one chain.
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
    """What the parts of one collective have in common; channels are not always numbered apart."""
    found = re.search(r'chain_id="\d+"', operation.text) or re.search(r"channel_id=\d+", operation.text)
    return found.group() if found else operation.name


def _size(operation: Operation) -> int:
    """Bytes of the result. What a -start returns names its operands too, first, but for all-reduce; and flags."""
    arrays = [array.bytes for array in arrays_of(operation.result) if array.shape]
    has_operands = operation.kind.endswith("-start") and operation.kind != "all-reduce-start"
    return sum(arrays[len(arrays) // 2 :] if has_operands else arrays)


def _group_size(text: str, devices: int) -> int:
    """How many devices take part, in any of the three ways that XLA writes groups."""
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return listed.group(1).count(",") + 1
    if tiled := re.search(r"replica_groups=\[\d+,(\d+)\]<=", text):
        return int(tiled.group(1))
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", text):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named.group(1)))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named.group(2)))
    return devices
