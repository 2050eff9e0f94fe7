"""Trains and measures every candidate form: stage 1 with all blocks in that form, then every block's error.

The blocks' losses of stage 1 are independent, so one run gives the error of every block. A form without parameters is
measured without training. Finished candidates are not repeated, and stopped runs resume.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_collections
from flax.traverse_util import flatten_dict

from rehyat_jax.errors import InputError
from rehyat_jax.files.fingerprint import BLOCKS, fingerprint
from rehyat_jax.files.json_files import read_json_object
from rehyat_jax.selection.candidates import Candidate, candidate_config
from rehyat_jax.selection.config_file import write_config
from rehyat_jax.studies.definition_file import changed, keep_definition
from rehyat_jax.studies.processes import Command, Task, run_tasks
from rehyat_jax.studies.running import default_jobs, process_environment
from rehyat_jax.training.fields import BY_PATH, SAME
from rehyat_jax.weights.load import checkpoint_files

FIGURES = "errors.json"
"""The file that `rehyat_jax.selection.measure` writes."""


def check_definition(config: ml_collections.ConfigDict, data: str, examples: int, workdir: Path) -> None:
    """Writes what all candidates have in common, or compares it with that of the candidates in the workdir.

    Candidates, the budget and the cost may change: the errors stay valid.

    Args:
      config: configuration of stage 1.
      data, examples: see `selection.measure`.
      workdir: an existing directory.

    Raises:
      InputError: something differs; the message has a table of it. Or a file cannot be read or written.
    """
    now = _definition(config, data, examples)
    keep_definition(workdir, now, changed, holds="candidates that were measured with another definition")


def _definition(config: ml_collections.ConfigDict, data: str, examples: int) -> dict[str, Any]:
    fields = flatten_dict(json.loads(config.to_json()), sep=".")
    kept = {
        f"config.{name}": value
        for name, value in fields.items()
        # Each candidate has its own form, and a fingerprint stands for the teacher.
        if BY_PATH[name].effect != SAME and not name.startswith("hybrid.") and name not in ("forms", "init_from")
    }
    folder, files = checkpoint_files(config.init_from)
    return kept | {
        "the teacher": fingerprint(files, folder, blocks=BLOCKS),
        "--data": data,
        "--examples": examples,
    }


def run_candidates(
    config: ml_collections.ConfigDict,
    candidates: Sequence[Candidate],
    workdir: Path,
    *,
    data: str,
    examples: int,
    jobs: int | None,
) -> dict[str, str]:
    """Trains and measures the candidates that have no figures yet.

    Args:
      config: configuration of stage 1.
      candidates: the candidates without softmax.
      workdir: an existing directory.
      data, examples: see `selection.measure`.
      jobs: number of processes at a time; `default_jobs()` by default.

    Returns:
      Label of each candidate that failed -> the reason.

    Raises:
      InputError: something cannot be written.
      RunStoppedError: SIGTERM asked to stop. KeyboardInterrupt: Ctrl-C did. The same call resumes.
    """
    tasks = []
    for candidate in candidates:
        folder = candidate_folder(workdir, candidate)
        description = f"Stage 1 with all blocks in one form: {candidate.label}."
        write_config(candidate_config(config, candidate.fields), description, folder / "config.py")
        tasks.append(_task(candidate, folder, config.steps, ["--data", data, "--examples", str(examples)]))
    jobs = jobs or default_jobs()
    return run_tasks(tasks, jobs, process_environment(workdir, jobs))


def candidate_folder(workdir: Path, candidate: Candidate) -> Path:
    """The folder of one candidate."""
    return workdir / "candidates" / candidate.folder


def _task(candidate: Candidate, folder: Path, steps: int, options: list[str]) -> Task:
    run, file, commands = folder / "distill", f"--config={folder / 'config.py'}", []
    if candidate.form.learned is not None:
        commands.append(
            Command(
                name="distill",
                argv=(sys.executable, "-m", "rehyat_jax.train", file, f"--workdir={run}"),
                result=run / "model",
                log=folder / "distill.log",
                steps=steps,
                workdir=run,
            )
        )
        options = ["--model", str(run / "model"), *options]
    result = folder / FIGURES
    measure = (sys.executable, "-m", "rehyat_jax.selection.measure", file, *options, f"--out={result}")
    commands.append(Command(name="measure", argv=measure, result=result, log=folder / "measure.log"))
    return Task(candidate.label, tuple(commands), folder / "seconds.json")


def read_figures(workdir: Path, candidate: Candidate, blocks: int) -> dict[str, Any]:
    """The figures that `selection.measure` wrote of a candidate. Raises InputError for a damaged file."""
    file = candidate_folder(workdir, candidate) / FIGURES
    found = read_json_object(file)
    error = found.get("error")
    ends = [error.get(end) for end in ("value", "low", "high")] if isinstance(error, dict) else []
    if len(ends) != 3 or not all(_are_errors(end, blocks) for end in ends):
        raise InputError(f"{file}: expected errors of {blocks} blocks, found others; delete it, and run again")
    return found


def _are_errors(values: Any, blocks: int) -> bool:
    numbers = values if isinstance(values, list) else []
    return len(numbers) == blocks and all(isinstance(value, int | float) and value >= 0 for value in numbers)
