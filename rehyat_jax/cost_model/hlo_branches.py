"""The shares in which the branches of a conditional run. Without shares, all branches would count."""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction

from rehyat_jax.cost_model.hlo_operations import Branch, Operation

ShareOf = Callable[[Branch], Fraction | None]
"""The share of a conditional's executions in which this branch runs; None to take the branch that costs most."""


def branch_shares(costs: Iterable[tuple[Operation, int]], share_of: ShareOf) -> dict[Branch, Fraction]:
    """The shares of all branches, from operations and the cost of one execution of each."""
    inside: dict[Branch, list[tuple[Operation, int]]] = collections.defaultdict(list)
    for operation, cost in costs:
        for branch in operation.branches:
            inside[branch].append((operation, cost))
    depth = {branch: operation.branches.index(branch) for branch, found in inside.items() for operation, _ in found[:1]}
    shares: dict[Branch, Fraction] = {}
    # A conditional's cost depends on the conditionals inside it, so the innermost come first.
    for branch in sorted(inside, key=lambda branch: -depth[branch]):
        if branch in shares:
            continue
        siblings = [other for other in inside if other.name == branch.name]
        known = {sibling: share_of(sibling) for sibling in siblings}
        if None in known.values():
            totals = {sibling: _total(inside[sibling], shares) for sibling in siblings}
            largest = max(totals, key=totals.get)
            known = {sibling: Fraction(sibling == largest) for sibling in siblings}
        shares |= known
    return shares


def _total(costs: list[tuple[Operation, int]], shares: Mapping[Branch, Fraction]) -> int:
    return sum(cost * weighted(operation, shares).executions for operation, cost in costs)


def weighted(operation: Operation, shares: Mapping[Branch, Fraction]) -> Operation:
    """The operation with its executions times the shares of its branches; branches without a share count fully."""
    executions = Fraction(operation.executions)
    for branch in operation.branches:
        executions *= shares.get(branch, 1)
    return dataclasses.replace(operation, executions=round(executions))
