"""The choice of one form for each block: least error within a budget (Attention Surgery, arXiv 2509.24899).

The choice is an integer program. With z_rb = 1 if block b has form r,

    minimise    sum over r and b of e_rb z_rb
    subject to  sum over r and b of c_rb z_rb <= budget, and for each b: sum over r of z_rb = 1.

HiGHS solves it by branch and bound (`scipy.optimize.milp`), so no other choice is better.
"""

import dataclasses
from collections.abc import Iterable

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from rehyat_jax.errors import InputError

TOLERANCE = 1e-6
"""HiGHS's tolerance of a constraint: costs are fractions of 1, so a choice may exceed the budget by a millionth."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """Errors and costs of every form in every block.

    Attributes:
      labels: the forms; the first one is softmax, in which all blocks begin.
      errors: [forms, blocks]; zero for softmax.
      costs: [forms, blocks], in fractions of the cost of softmax in all blocks.
    """

    labels: tuple[str, ...]
    errors: np.ndarray
    costs: np.ndarray

    @property
    def least_cost(self) -> float:
        """The cost if every block has its cheapest form."""
        return float(self.costs.min(axis=0).sum())


@dataclasses.dataclass(frozen=True)
class Choice:
    """A form for every block.

    Attributes:
      forms: index of each block's form.
      error: sum of the blocks' errors.
      cost: sum of their costs.
      status: the solver's message; empty for a choice that is not the solver's.
      gap: relative gap between the error and the solver's lower bound of it: 0 for a proven optimum.
    """

    forms: tuple[int, ...]
    error: float
    cost: float
    status: str = ""
    gap: float = 0.0


def check_budget(budget: float, least_cost: float) -> None:
    """Raises InputError unless a budget needs a conversion and is possible.

    Args:
      budget: fraction of the cost of softmax in all blocks.
      least_cost: see `Problem`.
    """
    if not budget > 0:
        raise InputError(f"--budget: expected a fraction between 0 and 1, found {budget:g}")
    if budget >= 1:
        raise InputError(
            f"--budget: expected a fraction below 1, found {budget:g}: softmax attention in all blocks costs 1, so "
            f"nothing needs converting"
        )
    if budget < least_cost - TOLERANCE:
        raise InputError(
            f"--budget: expected at least {np.ceil(least_cost * 1e4) / 1e4:g}, which the cheapest form in every block "
            f"costs, found {budget:g}; raise it, give cheaper --forms, or count larger --latents"
        )


def best_choice(problem: Problem, budget: float) -> Choice:
    """The choice of least error within a budget.

    Raises:
      InputError: the budget is impossible.
      RuntimeError: the solver failed.
    """
    if budget < problem.least_cost - TOLERANCE:
        check_budget(budget, problem.least_cost)
    forms, blocks = problem.errors.shape
    one_form = np.tile(np.eye(blocks), forms)  # [blocks, forms * blocks]
    found = milp(
        problem.errors.ravel(),
        integrality=np.ones(forms * blocks),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(problem.costs.reshape(1, -1), -np.inf, budget),
            LinearConstraint(one_form, 1, 1),
        ],
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        raise RuntimeError(f"HiGHS found no choice for budget {budget}: {found.message}")
    chosen = found.x.reshape(forms, blocks).argmax(axis=0)
    return dataclasses.replace(_choice(problem, chosen), status=str(found.message), gap=float(found.mip_gap))


def _choice(problem: Problem, chosen: np.ndarray) -> Choice:
    blocks = np.arange(len(chosen))
    error, cost = (float(values[chosen, blocks].sum()) for values in (problem.errors, problem.costs))
    return Choice(tuple(map(int, chosen)), error, cost)


def conversions(problem: Problem, form: int) -> list[Choice]:
    """The choices that convert 0, 1, ... and finally all blocks to one form, those of lowest error first."""
    chosen, choices = np.zeros(problem.errors.shape[1], int), []
    choices.append(_choice(problem, chosen))
    for block in np.argsort(problem.errors[form], kind="stable"):
        chosen[block] = form
        choices.append(_choice(problem, chosen))
    return choices


def homogeneous_choice(problem: Problem, form: int, budget: float) -> Choice | None:
    """The papers' baseline: converts blocks to one form, lowest error first, until the budget holds; None if none does.

    Only one form is used, and the blocks that are not converted stay softmax.
    """
    return next((choice for choice in conversions(problem, form) if choice.cost <= budget + TOLERANCE), None)


def best_homogeneous(problem: Problem, budget: float) -> Choice | None:
    """The `homogeneous_choice` of least error over all forms but softmax; None if the budget holds for none."""
    choices = [homogeneous_choice(problem, form, budget) for form in range(1, len(problem.labels))]
    return min((choice for choice in choices if choice is not None), key=lambda choice: choice.error, default=None)


def undominated(choices: Iterable[Choice]) -> list[Choice]:
    """The choices by increasing cost, without those that another one dominates."""
    found: list[Choice] = []
    for choice in sorted(choices, key=lambda choice: (choice.cost, choice.error)):
        if not found or choice.error < found[-1].error:
            found.append(choice)
    return found


def front(problem: Problem, points: int) -> list[Choice]:
    """The best choices for many budgets up to 1, by increasing cost.

    The budgets are `points` evenly spaced ones, and the costs of the `conversions` that no other one dominates, so that
    no choice of one form is better than the front.
    """
    of_one_form = [choice for form in range(1, len(problem.labels)) for choice in conversions(problem, form)]
    costs = [choice.cost for choice in undominated(of_one_form)]
    budgets = {*np.linspace(problem.least_cost, 1, points).tolist(), *costs}
    return undominated(best_choice(problem, budget) for budget in budgets if problem.least_cost <= budget <= 1)
