"""The report of a recipe: means over seeds of every evaluated model, as JSON, Markdown and a strip of samples."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rehyat_jax.benchmarks.environment import describe_environment
from rehyat_jax.data.sources import JUDGES
from rehyat_jax.files.json_files import read_json_object
from rehyat_jax.files.pictures import save_frames
from rehyat_jax.files.write import reported_write_errors, written_whole
from rehyat_jax.generation.codecs import SpaceToDepth
from rehyat_jax.generation.latents_file import read_latents
from rehyat_jax.recipes.definition import STUDENT, Recipe
from rehyat_jax.recipes.running import EVALUATION, TEACHER_SAMPLES, seed_folder
from rehyat_jax.training.continuation import code_version

RECORD, PAGE, STRIP = "recipe.json", "recipe.md", "recipe.png"

TEACHER = "teacher"

OF_SIDES = {
    "digit_accuracy": "digit, majority of frames",
    "frame_accuracy": "digit, every frame",
    "motion_accuracy": "motion",
    "motion_amplitude": "distance that the digit moves, pixels",
    "lowest_frame": "digit, worst frame position",
    "diversity": "diversity of one prompt's videos",
    "frame_change": "change from frame to frame",
    "chunk_jump": "change at chunk boundaries / within chunks",
}
"""Figures of every model that has them: key in the record -> title."""

SHOWN_FRAMES, SHOWN_VIDEOS = 9, 2


def collect(recipe: Recipe, workdir: Path, command: Sequence[str]) -> dict[str, Any]:
    """The record of a finished recipe: means over seeds, and the values of every seed.

    Raises:
      InputError: an evaluation is missing or damaged.
    """
    found = {
        name: [read_json_object(seed_folder(workdir, seed) / "evaluation" / name / EVALUATION) for seed in recipe.seeds]
        for name in recipe.results
    }
    of_student = found[STUDENT]
    record: dict[str, Any] = {
        "title": recipe.title,
        "seeds": list(recipe.seeds),
        "samples": _option(recipe.evaluation, "--samples"),
        # The teacher has the same samples in all evaluations.
        TEACHER: _of_side(of_student[:1], TEACHER),
        **{name: _of_side(evaluations, STUDENT) for name, evaluations in found.items()},
        "boundary_ratio_teacher": _mean(of_student, "chunk_jump_teacher"),
        "boundary_ratio_student": _mean(of_student, "chunk_jump_student"),
        "velocity_error": _mean(of_student, "velocity_error"),
        **{
            f"velocity_error_{name}": _mean(evaluations, "velocity_error")
            for name, evaluations in found.items()
            if name != STUDENT
        },
        "steps": {step.name: step.config for step in recipe.steps},
        "seconds": {str(seed): read_json_object(seed_folder(workdir, seed) / "seconds.json") for seed in recipe.seeds},
        "command": shlex.join(["python", "-m", "rehyat_jax.recipe", *command]),
        "hardware": describe_environment(),
        "code": code_version(),
    }
    return {name: value for name, value in record.items() if value is not None}


def write_report(recipe: Recipe, workdir: Path, record: dict[str, Any]) -> Path:
    """Writes recipe.json, recipe.md and, for the demo, recipe.png into the workdir; returns the page's path."""
    with reported_write_errors(workdir):
        pictured = _save_strip(recipe, workdir)
        for name, text in (
            (RECORD, json.dumps(record, indent=1) + "\n"),
            (PAGE, markdown(recipe, record, pictured=pictured)),
        ):
            with written_whole(workdir / name) as temporary:
                temporary.write_text(text, encoding="utf-8")
    return workdir / PAGE


def markdown(recipe: Recipe, record: dict[str, Any], *, pictured: bool) -> str:
    """The page of a record."""
    models = [TEACHER, *(name for name in recipe.results if name not in recipe.without_samples)]
    rows = [
        f"| {title} | {' | '.join(_shown(record[name], key) for name in models)} |"
        for key, title in OF_SIDES.items()
        if any(key in record[name] for name in models)
    ]
    errors = [record[_error_key(name)] for name in models[1:]]
    others = [f"{name.replace('_', ' ')} {record[_error_key(name)]:.4f}" for name in recipe.without_samples]
    minutes = [sum(seconds.values()) / 60 for seconds in record["seconds"].values()]
    lines = [
        f"# {record['title']}",
        "",
        f"{_seeds(record)}, {record['samples']} samples of each model. In brackets: the 95% "
        "confidence interval over videos for one seed, else the lowest and the highest seed.",
        "",
        f"| | {' | '.join(name.replace('_', ' ') for name in models)} |",
        "|---" * (len(models) + 1) + "|",
        *rows,
        f"| velocity error | | {' | '.join(f'{error:.4f}' for error in errors)} |",
        "",
        *([f"Velocity error of others: {', '.join(others)}.", ""] if others else []),
        *(["![Samples from the same noise](recipe.png)", ""] if pictured else []),
        "Training took " + ", ".join(f"{value:.0f}" for value in minutes) + " minutes a seed, in these steps:",
        "",
        *(f"1. {step.name}: `{step.config}`{_words(step.changes)}" for step in recipe.steps),
        "",
        f"    {record['command']}",
        "",
        f"{record['hardware']}; rehyat_jax {record['code']}.",
        "",
    ]
    return "\n".join(lines)


def _seeds(record: dict[str, Any]) -> str:
    count = len(record["seeds"])
    return "One seed" if count == 1 else f"Means over {count} seeds"


def _error_key(name: str) -> str:
    return "velocity_error" if name == STUDENT else f"velocity_error_{name}"


def _words(changes: Any) -> str:
    return "".join(f", {field} = {value!r}" for field, value in changes.items())


def _of_side(evaluations: Sequence[dict[str, Any]], side: str) -> dict[str, Any]:
    """The figures of one model: the mean over seeds, and under "intervals" its bounds."""
    figures: dict[str, Any] = {}
    intervals: dict[str, Any] = {}
    for key in OF_SIDES:
        found = [value for value in (_metric(evaluation, key, side) for evaluation in evaluations) if value is not None]
        if not found:
            continue
        values = [value["value"] for value in found]
        figures[key] = float(np.mean(values))
        alone = len(found) == 1
        intervals[key] = [found[0]["low"], found[0]["high"]] if alone else [min(values), max(values)]
    return figures | {"intervals": intervals}


def _metric(evaluation: dict[str, Any], key: str, side: str) -> dict[str, float] | None:
    if key == "lowest_frame":
        curve = evaluation["curves"].get("frame_accuracy_by_frame")
        if curve is None:
            return None
        series = curve["series"][side]
        worst = int(np.argmin(series["value"]))
        return {end: series[end][worst] for end in ("value", "low", "high")}
    return evaluation["metrics"].get(f"{key}_{side}")


def _mean(evaluations: Sequence[dict[str, Any]], name: str) -> float | None:
    values = [evaluation["metrics"][name]["value"] for evaluation in evaluations if name in evaluation["metrics"]]
    return float(np.mean(values)) if values else None


def _shown(figures: dict[str, Any], key: str) -> str:
    if key not in figures:
        return ""
    form = (lambda value: f"{value:.1%}") if key.endswith(("accuracy", "lowest_frame")) else (lambda v: f"{v:.3f}")
    low, high = figures["intervals"][key]
    return f"{form(figures[key])} ({form(low)} to {form(high)})"


def _option(options: Sequence[str], name: str) -> int:
    return int(options[options.index(name) + 1]) if name in options else 0


def _save_strip(recipe: Recipe, workdir: Path) -> bool:
    """Writes samples of all models from the same noise, if the demo's codec can decode them."""
    data = recipe.evaluation[recipe.evaluation.index("--data") + 1] if "--data" in recipe.evaluation else "digits"
    if data not in JUDGES or not _option(recipe.evaluation, "--samples"):
        return False
    folders = {TEACHER: workdir / TEACHER_SAMPLES}
    for name in (name for name in recipe.results if name not in recipe.without_samples):
        folders[name] = seed_folder(workdir, recipe.seeds[0]) / "evaluation" / name / "samples" / STUDENT
    codec, rows = SpaceToDepth(), {}
    for number in range(SHOWN_VIDEOS):
        for name, folder in folders.items():
            latents, settings = read_latents(folder / f"{number:05d}.safetensors")
            video = np.asarray(codec.decode(latents[None]))[0]
            rows[f"{settings['prompt']}\n{name.replace('_', ' ')}, {settings['steps']} steps"] = video
    frames = np.unique(np.linspace(0, len(video) - 1, SHOWN_FRAMES).round().astype(int)).tolist()
    save_frames(workdir / STRIP, rows, frames)
    return True
