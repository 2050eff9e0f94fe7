"""Compares the attention of teacher and student, block by block: its error, and the frames that it goes to."""

from typing import Any

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from rehyat_jax.evaluation.attention_error import attention_differences
from rehyat_jax.evaluation.attention_mass import attention_mass, by_distance, moved_mass
from rehyat_jax.evaluation.bootstrap import Resampling
from rehyat_jax.evaluation.draws import Draws
from rehyat_jax.evaluation.results import Curve, Evaluation
from rehyat_jax.models.student import Inputs
from rehyat_jax.models.wan.modeling import WanTransformer

KINDS = {
    "hybrid": "attention_error",
    "window_only": "attention_error_window_only",
    "exact": "attention_error_exact",
}
"""The metric of each result of `attention_differences`."""


def compare_attention(
    teacher: WanTransformer, student: WanTransformer, draws: Draws, *, progress: bool = False
) -> Evaluation:
    """Runs both models on every example, at one level of noise each.

    The error is that of `attention_differences`, on the student's own queries, keys and values while its attention is
    softmax. The mass is that of each model in its own run.

    Args:
      teacher, student: the models.
      draws: inputs.
      progress: show the rate and the remaining time.

    Returns:
      The metrics are attention_moved and, if the student has hybrid blocks, those in `KINDS`.
    """
    masses, differences = [], []
    (teacher_def, teacher_params), (student_def, student_params) = nnx.split(teacher), nnx.split(student)
    forms = student.config.block_forms

    @jax.jit
    def measure(teacher_params: Any, student_params: Any, inputs: Inputs) -> tuple[Any, Any]:
        models = nnx.merge(teacher_def, teacher_params), nnx.merge(student_def, student_params)
        mass = [attention_mass(model, inputs) for model in models]
        return mass, attention_differences(models[1], inputs) if forms.converted else {}

    bar = tqdm(draws.one_level(), total=draws.batches, desc="attention", unit="batch", disable=not progress)
    for draw in bar:
        mass, difference = jax.device_get(
            measure(teacher_params, student_params, (draw.latents, draw.timestep, draw.text))
        )
        masses.append(np.stack(mass))
        differences.append(difference)
    # The last batch repeats its last example.
    count = len(draws.examples.latents)
    found = _mass_figures(np.concatenate(masses, axis=2)[:, :, :count])
    if forms.converted:
        joined = {name: np.concatenate([part[name] for part in differences], axis=1) for name in differences[0]}
        found.add(_error_figures({name: values[:, :count].T for name, values in joined.items()}, forms.converted))
    return found


def _mass_figures(masses: np.ndarray) -> Evaluation:
    """Estimates from masses [teacher and student, blocks, examples, T, T]."""
    found = Evaluation()
    teacher, student = masses.swapaxes(1, 2)
    resampling, blocks = Resampling(len(teacher)), list(range(teacher.shape[1]))
    moved = moved_mass(teacher, student)
    found.metrics["attention_moved"] = resampling.mean(moved.mean(1))
    words = "share of attention"
    series = {"student": resampling.mean(moved)}
    found.curves["attention_moved_by_block"] = Curve("attention that moved", "block", words, blocks, series)
    distances, of_teacher = by_distance(teacher)
    _, of_student = by_distance(student)
    for block in blocks:
        series = {
            "teacher": resampling.mean(of_teacher[:, block]),
            "student": resampling.mean(of_student[:, block]),
        }
        title, axis = f"block {block}", "query's frame - key's frame"
        found.curves[f"attention_by_distance/block_{block}"] = Curve(title, axis, words, distances, series)
    return found


def _error_figures(differences: dict[str, np.ndarray], blocks: tuple[int, ...]) -> Evaluation:
    """Estimates from the results of `attention_differences`, transposed to [examples, blocks]."""
    found, size = Evaluation(), differences["softmax"]
    resampling = Resampling(len(size))
    series = {}
    for kind, name in KINDS.items():
        series[kind.replace("_", " ")] = resampling.ratio(differences[kind], size)
        # The mean over blocks of each block's relative error, as stage 1 reports it.
        found.metrics[name] = resampling.ratio(differences[kind], size, over=(0,))
    title, words = "attention error", "relative L1 error"
    found.curves["attention_error_by_block"] = Curve(title, "block", words, list(blocks), series)
    return found
