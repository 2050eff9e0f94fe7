"""The bytes that operations without matrix products must move, which bound their time from below.

libtpu's estimates of matrix products are at most 1.5 times the least time of the matrix units. Its estimates of
everything else are 2 to 10 times the least time of memory (`rehyat_jax.benchmarks.xla_estimates`).
"""

import collections
import re
from collections.abc import Iterable

from rehyat_jax.cost_model.hlo_arrays import arrays_of
from rehyat_jax.cost_model.hlo_operations import Operation

_PRODUCTS = ("convolution", "dot")


def memory_bytes(operations: Iterable[Operation]) -> dict[str, int]:
    """Bytes of HBM that every operation must read and write, by name; operations with a matrix product are skipped.

    Arrays count with the padding of their tiles. Arrays that stay in VMEM do not count. Only the slice of a sliced
    array counts, and only the update of an array that is updated in place.

    Args:
      operations: from `executed_operations(hlo, of_fusions=True)`.
    """
    operations = list(operations)
    fused: dict[str, dict[str, Operation]] = collections.defaultdict(dict)
    for operation in operations:
        if operation.fusion:
            fused[operation.fusion][operation.name] = operation
    sizes = {operation.name: array_bytes(operation.result, in_hbm=True) for operation in operations}
    found = {}
    for operation in operations:
        inside = fused.get(_called(operation)) or {operation.name: operation}
        if not operation.fusion and not _has_product(inside, fused):
            found[operation.name] = _read(operation, inside, sizes) + _written(operation, inside, sizes)
    return found


def array_bytes(result: str, *, in_hbm: bool = False) -> int:
    """Bytes of all arrays in a result's type, or only of those in HBM, with the padding of tiles."""
    return sum(array.padded_bytes for array in arrays_of(result) if array.in_hbm or not in_hbm)


def _called(operation: Operation) -> str:
    called = re.search(r"calls=%([\w.\-]+)", operation.text)
    return called.group(1) if called else ""


def _has_product(inside: dict[str, Operation], fused: dict[str, dict[str, Operation]]) -> bool:
    return any(
        operation.kind in _PRODUCTS or _has_product(fused.get(_called(operation), {}), fused)
        for operation in inside.values()
    )


def _read(operation: Operation, inside: dict[str, Operation], sizes: dict[str, int]) -> int:
    users = collections.defaultdict(list)
    for user in inside.values():
        for operand in user.operands:
            users[operand].append(user)

    def read_of(name: str, size: int) -> int:
        """Bytes read of an array of `size` bytes that is called `name` where it is used; at most `size`."""
        parts = 0
        for user in users[name]:
            if user.kind == "bitcast" and user.name in users:
                parts += read_of(user.name, size)
            elif user.kind in ("slice", "dynamic-slice"):
                parts += array_bytes(user.result)
            elif not (user.kind == "dynamic-update-slice" and user.operands[0] == name):
                return size
        return min(parts, size)

    # An operand's name within a fusion does not say where it is.
    given = operation.operands
    names = {operand: operand for operand in given}
    if operation.kind == "fusion":
        parameters = (inner for inner in inside.values() if inner.kind == "parameter")
        names = {given[int(inner.text.split(")")[0])]: inner.name for inner in parameters}
    return sum(read_of(name, sizes.get(operand, 0)) for operand, name in names.items())


def _written(operation: Operation, inside: dict[str, Operation], sizes: dict[str, int]) -> int:
    def written_by(name: str) -> int:
        made = inside.get(name)
        if made is not None and made.kind in ("bitcast", "tuple"):
            return sum(written_by(operand) for operand in made.operands)
        if made is not None and made.kind == "dynamic-update-slice":
            # The result of control flow has no line of its own.
            return sizes.get(made.operands[1], sizes[made.name])
        return sizes.get(name, 0)

    # The result of a computation is listed last. A result that does not fit into VMEM may be there in part.
    return min(written_by(next(reversed(inside))), sizes[operation.name])
