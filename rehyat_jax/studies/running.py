"""Runs a study: one task for each variant and seed, whose last command measures the model."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rehyat_jax.errors import InputError
from rehyat_jax.files.lock import locked
from rehyat_jax.files.shown import closest
from rehyat_jax.files.write import reported_write_errors
from rehyat_jax.parallel.memory import host_bytes
from rehyat_jax.studies.begun import check_definition
from rehyat_jax.studies.definition import Study, folder_name, read_study, stage_config, train_options
from rehyat_jax.studies.measure import MEASURES
from rehyat_jax.studies.processes import Command, Task, run_tasks
from rehyat_jax.studies.untrained import has_parameters_to_train

FIGURES = "figures.json"
"""The file of a run's figures, which `rehyat_jax.studies.measure` writes."""

SECONDS = "seconds.json"
"""The file of the seconds that each process of a run took."""

TEACHER = "teacher"
"""The folder of the teacher's own figures."""

BYTES_OF_A_RUN = 2 * 10**9
"""Memory of a process of the demo's studies, rounded up: finetuning takes 1.7 GB."""


def run_study(file: Path, workdir: Path, *, jobs: int | None = None, only: Sequence[str] = ()) -> dict[str, str]:
    """Runs all variants and seeds of a study that have no figures yet.

    Args:
      file: the study's file.
      workdir: directory of the study; created if needed.
      jobs: number of processes at a time; `default_jobs()` by default.
      only: labels of the variants to run; all by default.

    Returns:
      Name of each run that failed -> the reason.

    Raises:
      InputError: the study's file is wrong, or differs from the study that began in `workdir`; a label is unknown; or
        something cannot be read or written.
      RunStoppedError: SIGTERM asked to stop. KeyboardInterrupt: Ctrl-C did. The same call resumes the study.
    """
    study = read_study(file)
    for label in only:
        if label not in study.variants:
            nearest = closest(label, study.variants)[0]
            raise InputError(f"--only: {label!r} is no variant of {file}; did you mean {nearest!r}?")
    with reported_write_errors(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
    with locked(workdir):
        check_definition(file, study, workdir)
        tasks = [
            run_task(file, study, workdir, label, seed)
            for seed in study.seeds
            for label in study.variants
            if not only or label in only
        ]
        if of_teacher := teacher_task(study, workdir):
            tasks.append(of_teacher)
        jobs = jobs or default_jobs()
        return run_tasks(tasks, jobs, process_environment(workdir, jobs))


def run_folder(workdir: Path, label: str, seed: int) -> Path:
    """The folder of one run of a study."""
    return workdir / "runs" / folder_name(label) / f"seed_{seed}"


def run_task(file: Path, study: Study, workdir: Path, label: str, seed: int) -> Task:
    """The task of one variant and seed: its training runs in order, and the measurement.

    A stage 1 that has nothing to train only writes its model, see `rehyat_jax.studies.untrained`.
    """
    folder, commands, model = run_folder(workdir, label, seed), [], study.teacher
    for stage in study.stages_of(label):
        place = folder / stage.name
        options = train_options(study, label, stage, seed, model)
        config = stage_config(file, study, label, stage)
        trains = has_parameters_to_train(config)
        module = "rehyat_jax.train" if trains else "rehyat_jax.studies.untrained"
        commands.append(
            Command(
                name=stage.name,
                argv=(sys.executable, "-m", module, *options, f"--workdir={place}"),
                result=place / "model",
                log=folder / f"{stage.name}.log",
                steps=config.steps if trains else 1,
                workdir=place if trains else None,
            )
        )
        model = str(place / "model")
    commands.append(measure_command(study, folder, model, study.measures))
    return Task(f"{label}, seed {seed}", tuple(commands), folder / SECONDS)


def teacher_task(study: Study, workdir: Path) -> Task | None:
    """The task that measures the teacher itself, if a measure of the study can."""
    measures = [name for name in study.measures if not MEASURES[name].needs_student]
    folder = workdir / TEACHER
    if not measures:
        return None
    return Task("teacher", (measure_command(study, folder, study.teacher, measures),), folder / SECONDS)


def measure_command(study: Study, folder: Path, model: str, measures: Sequence[str]) -> Command:
    """The process that measures a model."""
    options = ["--teacher", study.teacher, "--measures", *measures, "--videos", str(study.videos)]
    result = folder / FIGURES
    return Command(
        name="measure",
        argv=(sys.executable, "-m", "rehyat_jax.studies.measure", model, *options, "--out", str(result)),
        result=result,
        log=folder / "measure.log",
    )


def default_jobs() -> int:
    """The number of processes at a time: one for each core, as far as memory allows.

    It is 1 unless JAX_PLATFORMS is "cpu": a process takes all accelerators that it finds.
    """
    if os.environ.get("JAX_PLATFORMS") != "cpu":
        return 1
    free, cores = host_bytes(), _cores()
    return max(1, cores if free is None else min(cores, free // BYTES_OF_A_RUN))


def process_environment(workdir: Path, jobs: int) -> dict[str, str]:
    """Variables of a study's processes: each takes its share of the cores, and what one has compiled serves others."""
    environment = {"NPROC": str(max(1, _cores() // jobs))}
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        environment["JAX_COMPILATION_CACHE_DIR"] = str(workdir / "compiled")
    return environment


def _cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
