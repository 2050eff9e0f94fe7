"""The least time that memory allows to operations that multiply no matrices.

libtpu's estimates of matrix products are at most 1.5 times what the matrix units allow; those of everything else are 2
to 10 times what memory allows (`rehyat_jax.benchmarks.xla_estimates`).
"""

import collections
import re
from collections.abc import Iterable

from rehyat_jax.cost_model.hlo_arrays import arrays_of
from rehyat_jax.cost_model.hlo_operations import Operation

_PRODUCTS = ("convolution", "dot")


def memory_bytes(operations: Iterable[Operation]) -> dict[str, int]:
    """Bytes of HBM that every operation must read and write, by name; those with a matrix product are left out.

    Arrays count with the padding of their tiles, those that stay in VMEM not at all. Of an array that is sliced, only
    the slice counts; of one that is updated in place, only the update.

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
    """Of all arrays in a result's type, or of those in HBM, tiles' padding included."""
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
        """What is read of an array of some size, which has this name where it is used; all at most."""
        parts = 0
        for user in users[name]:
            if user.kind == "bitcast" and user.name in users:
                parts += read_of(user.name, size)
            elif user.kind in ("slice", "dynamic-slice"):
                parts += array_bytes(user.result)
            elif not (user.kind == "dynamic-update-slice" and user.operands[0] == name):
                return size
        return min(parts, size)

    # What an operand is called within a fusion does not say where it is.
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
            # What control flow returns has no line of its own.
            return sizes.get(made.operands[1], sizes[made.name])
        return sizes.get(name, 0)

    # What a computation returns is listed last. What does not fit VMEM in all may be there in part.
    return min(written_by(next(reversed(inside))), sizes[operation.name])
