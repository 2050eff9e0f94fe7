"""The result of Attention Surgery, `surgery.json`: the errors, the costs, the choice, and its alternatives."""

import dataclasses
import datetime
import importlib.metadata
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rehyat_jax.files.write import reported_write_errors, written_whole
from rehyat_jax.selection.solve import (
    TOLERANCE,
    Choice,
    Problem,
    best_choice,
    best_homogeneous,
    conversions,
    front,
    homogeneous_choice,
)

POINTS = 41
"""Number of budgets of the Pareto front."""


@dataclasses.dataclass(frozen=True)
class Row:
    """The choices for one budget; a homogeneous choice is None if its form cannot hold the budget.

    Attributes:
      budget: fraction of the cost of softmax in all blocks.
      best: the best choice.
      homogeneous: the best choice of one form.
    """

    budget: float
    best: Choice
    homogeneous: Choice | None


@dataclasses.dataclass(frozen=True)
class Result:
    """A choice with its alternatives.

    Attributes:
      problem: errors and costs.
      intervals: [forms, blocks, 2], the ends of the errors' 95% intervals.
      budget: the asked budget.
      choice: the best choice for it.
      baselines: label of each form but softmax -> its `homogeneous_choice` for the budget.
      front: see `solve.front`.
      conversions: label of each form but softmax -> its `conversions`.
      rows: the choices for round budgets and the asked one.
      about: facts about the run, for JSON.
    """

    problem: Problem
    intervals: np.ndarray
    budget: float
    choice: Choice
    baselines: dict[str, Choice | None]
    front: list[Choice]
    conversions: dict[str, list[Choice]]
    rows: list[Row]
    about: dict[str, Any]

    @property
    def labels(self) -> list[str]:
        """The label of each block's chosen form."""
        return [self.problem.labels[form] for form in self.choice.forms]


def solve(problem: Problem, intervals: np.ndarray, budget: float, about: dict[str, Any]) -> Result:
    """Solves for the budget and for all those of the tables. Raises InputError if the budget is impossible."""
    forms = dict(enumerate(problem.labels[1:], start=1))
    round_budgets = [tenths / 10 for tenths in range(1, 10) if tenths / 10 >= problem.least_cost - TOLERANCE]
    return Result(
        problem=problem,
        intervals=intervals,
        budget=budget,
        choice=best_choice(problem, budget),
        baselines={label: homogeneous_choice(problem, form, budget) for form, label in forms.items()},
        front=front(problem, POINTS),
        conversions={label: conversions(problem, form) for form, label in forms.items()},
        rows=[
            Row(each, best_choice(problem, each), best_homogeneous(problem, each))
            for each in sorted({*round_budgets, budget})
        ],
        about=about | {"date": datetime.date.today().isoformat(), "versions": versions()},
    )


def versions() -> dict[str, str]:
    """The versions of Python and the packages that matter."""
    packages = ("rehyat_jax", "jax", "flax", "optax", "numpy", "scipy")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}


def to_json(result: Result) -> dict[str, Any]:
    """The result for JSON. Choices name the forms; costs are fractions of those of softmax in all blocks."""
    problem = result.problem

    def choice(found: Choice | None, **more: Any) -> dict[str, Any] | None:
        if found is None:
            return None
        forms = [problem.labels[form] for form in found.forms]
        return more | {"forms": forms, "error": found.error, "cost": found.cost}

    def choices(found: Sequence[Choice]) -> list[dict[str, Any] | None]:
        return [choice(one) for one in found]

    return {
        **result.about,
        "budget": result.budget,
        "errors": dict(zip(problem.labels, problem.errors.tolist(), strict=True)),
        "error_intervals": dict(zip(problem.labels, result.intervals.tolist(), strict=True)),
        "costs": dict(zip(problem.labels, problem.costs.tolist(), strict=True)),
        "choice": choice(result.choice, status=result.choice.status, gap=result.choice.gap),
        "homogeneous": {label: choice(found) for label, found in result.baselines.items()},
        "pareto": {
            "heterogeneous": choices(result.front),
            "homogeneous": {label: choices(found) for label, found in result.conversions.items()},
        },
        "budgets": [
            {"budget": row.budget, "heterogeneous": choice(row.best), "homogeneous": choice(row.homogeneous)}
            for row in result.rows
        ],
    }


def write_json(result: Result, file: Path) -> None:
    """Writes `surgery.json`. Raises InputError if that fails."""
    with reported_write_errors(file), written_whole(file) as temporary:
        temporary.write_text(json.dumps(to_json(result), indent=1) + "\n", encoding="utf-8")
