"""Runs a recipe: one task for each seed trains all steps, then one for each seed evaluates the results.

All evaluations share the teacher's samples, which depend on no seed of training.
"""

import dataclasses
import hashlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from rehyat_jax.files.fingerprint import BLOCKS, fingerprint
from rehyat_jax.files.lock import locked
from rehyat_jax.files.write import reported_write_errors
from rehyat_jax.recipes.definition import Recipe, step_config, train_options
from rehyat_jax.studies.definition_file import changed, keep_definition
from rehyat_jax.studies.processes import Command, Task, run_tasks
from rehyat_jax.studies.running import default_jobs, process_environment
from rehyat_jax.weights.load import checkpoint_files

EVALUATION = "evaluation.json"

TEACHER_SAMPLES = "teacher_samples"
"""The folder that all evaluations have as their samples/teacher."""


def run_recipe(file: Path, recipe: Recipe, workdir: Path, *, jobs: int | None = None) -> dict[str, str]:
    """Trains and evaluates what has no result yet.

    Args:
      file: the recipe's file, for messages.
      recipe: the recipe.
      workdir: its directory; created if needed.
      jobs: number of processes at a time; `default_jobs()` by default.

    Returns:
      Name of each task that failed -> the reason. Nothing is evaluated after a failure in training.

    Raises:
      InputError: the recipe differs from the one that began in `workdir`, or something cannot be read or written.
      RunStoppedError: SIGTERM asked to stop. KeyboardInterrupt: Ctrl-C did. The same call resumes.
    """
    with reported_write_errors(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
    jobs = jobs or default_jobs()
    environment = process_environment(workdir, jobs)
    with locked(workdir):
        holds = f"a recipe that began with another definition than {file}"
        keep_definition(workdir, _described(file, recipe), changed, holds=holds)
        training = [training_task(file, recipe, workdir, seed) for seed in recipe.seeds]
        if failures := run_tasks(training, jobs, environment):
            return failures
        first, *others = [evaluation_task(recipe, workdir, seed) for seed in recipe.seeds]
        # The first evaluation samples the teacher.
        return run_tasks([first], 1, environment) or (run_tasks(others, jobs, environment) if others else {})


def seed_folder(workdir: Path, seed: int) -> Path:
    """The folder of everything that a seed decides."""
    return workdir / f"seed_{seed}"


def training_task(file: Path, recipe: Recipe, workdir: Path, seed: int) -> Task:
    """The task that trains all steps of a seed in their order."""
    folder, commands = seed_folder(workdir, seed), []
    for step in recipe.steps:
        start, place = recipe.start_of(step), folder / step.name
        init_from = recipe.teacher if start is None else str(folder / start.name / "model")
        options = train_options(recipe, step, seed, init_from)
        commands.append(
            Command(
                name=step.name,
                argv=(sys.executable, "-m", "rehyat_jax.train", *options, f"--workdir={place}"),
                result=place / "model",
                log=folder / f"{step.name}.log",
                steps=step_config(file, recipe, step).steps,
                workdir=place,
            )
        )
    return Task(f"seed {seed}", tuple(commands), folder / "seconds.json")


def evaluation_task(recipe: Recipe, workdir: Path, seed: int) -> Task:
    """The task that evaluates all results of a seed."""
    folder, commands = seed_folder(workdir, seed), []
    for name, step in recipe.results.items():
        place = folder / "evaluation" / name
        _share_samples(workdir, place)
        models = ["--teacher", recipe.teacher, "--student", str(folder / step / "model")]
        options = [*recipe.evaluation, *recipe.options.get(name, ())]
        options += ["--samples", "0"] if name in recipe.without_samples else []
        argv = (sys.executable, "-m", "rehyat_jax.evaluate", *models, "--out", str(place), *options)
        commands.append(Command(f"evaluate {name}", argv, place / EVALUATION, folder / f"evaluate_{name}.log"))
    return Task(f"seed {seed}", tuple(commands), folder / "evaluation_seconds.json")


def _share_samples(workdir: Path, place: Path) -> None:
    shared, link = workdir / TEACHER_SAMPLES, place / "samples" / "teacher"
    with reported_write_errors(place):
        shared.mkdir(exist_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(os.path.relpath(shared, link.parent), target_is_directory=True)


def _described(file: Path, recipe: Recipe) -> Mapping[str, str]:
    """What decides the results, in short. Seeds, steps and results may be added."""
    folder, files = checkpoint_files(recipe.teacher)
    about = {"the teacher": fingerprint(files, folder, blocks=BLOCKS), "evaluation": " ".join(recipe.evaluation)}
    for name, options in recipe.options.items():
        about[f"evaluation of {name}"] = " ".join(options)
    for step in recipe.steps:
        start = recipe.start_of(step)
        content = step_config(file, recipe, step).to_json() + str(None if start is None else start.name)
        digest = hashlib.sha256(content.encode()).hexdigest()[:12]
        changes = dataclasses.asdict(step)["changes"]
        about[f"step {step.name}"] = f"{step.config} with {changes} after {start and start.name}, {digest}"
    return about
