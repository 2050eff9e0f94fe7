"""The definition of a recipe: training stages from a teacher to its students, as `configs/recipes/` has it."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_collections

from rehyat_jax.errors import InputError
from rehyat_jax.training.command_line import call_in_file, override_options, read_config_file
from rehyat_jax.training.config import check_config, check_known
from rehyat_jax.training.stages import STAGES

STUDENT = "student"
"""The result that every recipe has: the student of many steps."""


@dataclasses.dataclass(frozen=True)
class Step:
    """One training run of a recipe.

    Attributes:
      name: name of its folder.
      config: path of its configuration file.
      start: name of the step whose model it starts from; "" for the teacher, None for the step before.
      changes: fields with other values than the file's; "optimizer.name" names a field of a group. The value of
        "velocity.teacher" may be `TEACHER`.
    """

    name: str
    config: str
    start: str | None = None
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


TEACHER = "{teacher}"
"""In a step's changes, the path of the recipe's teacher."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Training stages, and the models among their results that are evaluated.

    Attributes:
      title: a few words.
      teacher: the softmax model, in a PyTorch layout or as a model checkpoint.
      steps: the training runs in their order.
      results: name of an evaluated model -> name of the step that makes it. `STUDENT` must be one of them.
      evaluation: options of `rehyat_jax.evaluate`, without models and place.
      options: name of a result -> further options of its evaluation.
      without_samples: results of which no videos are sampled. Their errors on the data are measured.
      seeds: seeds of the training runs.

    Raises:
      ValueError: a value is wrong, or two values contradict each other.
    """

    title: str
    teacher: str
    steps: tuple[Step, ...]
    results: Mapping[str, str]
    evaluation: tuple[str, ...] = ()
    options: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    without_samples: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        names = [step.name for step in self.steps]
        named = all(re.fullmatch(r"\w+", name) for name in [*names, *self.results])
        _expect(named and len(set(names)) == len(names) > 0, "steps", "steps with different names of letters", names)
        for number, step in enumerate(self.steps):
            known = ["", *names[:number]]
            _expect(step.start is None or step.start in known, f"step {step.name!r}", f"start of {known}", step.start)
        unknown = [name for name in self.results.values() if name not in names]
        _expect(
            STUDENT in self.results and not unknown, "results", f"{STUDENT!r}, of steps {names}", dict(self.results)
        )
        _expect(set(self.results) >= set(self.options), "options", f"some of {sorted(self.results)}", [*self.options])
        known = set(self.results) - {STUDENT}
        _expect(known >= set(self.without_samples), "without_samples", f"some of {sorted(known)}", self.without_samples)
        different = len(set(self.seeds)) == len(self.seeds) > 0
        _expect(different and all(type(seed) is int and seed >= 0 for seed in self.seeds), "seeds", "seeds", self.seeds)

    def start_of(self, step: Step) -> Step | None:
        """The step whose model another one starts from; None for the teacher."""
        number = self.steps.index(step)
        if step.start is None:
            return self.steps[number - 1] if number else None
        return next((other for other in self.steps[:number] if other.name == step.start), None)

    def changes_of(self, step: Step) -> dict[str, Any]:
        """The step's changes, with the teacher's path."""
        return {field: self.teacher if value == TEACHER else value for field, value in step.changes.items()}


def _expect(holds: bool, field: str, expected: str, found: Any) -> None:
    if not holds:
        raise ValueError(f"{field}: expected {expected}, found {found!r}")


def read_recipe(file: Path, changes: Mapping[str, Any]) -> Recipe:
    """Runs a recipe's file, and checks the configuration and the order of its steps.

    Args:
      file: the recipe's file.
      changes: fields of a command line, for all steps. Those of a step take precedence.

    Raises:
      InputError: the file or one of its configurations cannot be read, a field is wrong, or a stage cannot follow the
        one before. The message names the step.
    """
    recipe = call_in_file(str(file), "get_recipe", Recipe, "a function get_recipe that returns a Recipe")
    steps = tuple(dataclasses.replace(step, changes={**changes, **step.changes}) for step in recipe.steps)
    recipe = dataclasses.replace(recipe, steps=steps)
    for step in recipe.steps:
        _check_order(file, recipe, step, step_config(file, recipe, step))
    return recipe


def step_config(file: Path, recipe: Recipe, step: Step) -> ml_collections.ConfigDict:
    """The configuration of a step. Raises InputError."""
    config = read_config_file(step.config)
    changes = recipe.changes_of(step)
    try:
        check_known(changes)
        config.update_from_flattened_dict({**changes, "init_from": recipe.teacher})
        check_config(config)
    except (InputError, TypeError, ValueError, AttributeError, KeyError) as error:
        raise InputError(f"{file}: step {step.name!r}: {error}") from error
    return config


def _check_order(file: Path, recipe: Recipe, step: Step, config: ml_collections.ConfigDict) -> None:
    """Raises InputError if the stage of a step cannot follow the stages before it."""
    before, start = [], recipe.start_of(step)
    while start is not None:
        before.append(step_config(file, recipe, start))
        start = recipe.start_of(start)
    place, stage = f"{file}: step {step.name!r}", STAGES[config.stage]
    if not stage.starts_from_model:
        raise InputError(f"{place}: stage {config.stage!r} makes a teacher; a recipe begins with one")
    if before and STAGES[before[0].stage].few_steps:
        raise InputError(
            f"{place}: stage {config.stage!r} cannot follow stage {before[0].stage!r}, whose result is a model of few "
            f"steps; start from a step before that"
        )
    # Adapters are merged into the weights.
    trained = [other.stage for other in before if STAGES[other.stage].trains is None or other.lora.rank]
    if stage.trains is not None and trained and not stage.teacher_path(config):
        raise InputError(
            f"{place}: stage {config.stage!r} learns from the softmax attention of its own model, which stage "
            f"{trained[0]!r} has changed before; put it first, or give it velocity.teacher"
        )


def train_options(recipe: Recipe, step: Step, seed: int, init_from: str) -> list[str]:
    """The options of `rehyat_jax.train` for one run, except its workdir."""
    return override_options(step.config, {**recipe.changes_of(step), "init_from": init_from, "seed": seed})
