"""How far a student's velocity is from its teacher's, and from the data, by noise level and by frame.

`excess_vs_teacher` is the student's flow-matching loss minus the teacher's on the same draws. Most of either loss is
the variance of the target, which is one draw of noise, and it cancels. The measure is that of VDN (OpenVDN,
vdn-minimax-h3).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from rehyat_jax.errors import InputError
from rehyat_jax.evaluation.bootstrap import Resampling
from rehyat_jax.evaluation.draws import Draws
from rehyat_jax.evaluation.results import Curve, Evaluation

Apply = Callable[..., jax.Array]
"""(params, latents, timestep, text) -> velocity."""


def velocity_sums(velocity: jax.Array, teacher: jax.Array, target: jax.Array | None) -> dict[str, jax.Array]:
    """Sums over the pixels and channels of each frame, float32 [B, T].

    Args:
      velocity, teacher: velocities [B, T, H, W, C] of student and teacher on the same inputs.
      target: noise - clean; None if it is unknown.

    Returns:
      "error" (|student - teacher|), "size" (|teacher|) and, with a target, "loss_teacher" and "loss_student" (squared
      distances from it).
    """
    of_frame = lambda x: x.sum((2, 3, 4))
    velocity, teacher = velocity.astype(jnp.float32), teacher.astype(jnp.float32)
    sums = {"error": of_frame(jnp.abs(velocity - teacher)), "size": of_frame(jnp.abs(teacher))}
    if target is None:
        return sums
    loss = lambda found: of_frame(jnp.square(found - target))
    return sums | {"loss_teacher": loss(teacher), "loss_student": loss(velocity)}


def compare_velocities(
    teacher: tuple[Apply, Any], student: tuple[Apply, Any], draws: Draws, *, progress: bool = False
) -> Evaluation:
    """Runs both models on every example at every level of noise.

    Args:
      teacher, student: (function, its parameters).
      draws: inputs.
      progress: show the rate and the remaining time.

    Returns:
      The metrics are velocity_error and, for clean examples, loss_teacher, loss_student and excess_vs_teacher.

    Raises:
      InputError: a velocity is NaN or infinite.
    """

    @jax.jit
    def measure(teacher_params: Any, student_params: Any, target: Any, *inputs: jax.Array) -> dict[str, jax.Array]:
        return velocity_sums(student[0](student_params, *inputs), teacher[0](teacher_params, *inputs), target)

    count, frames = draws.examples.latents.shape[:2]
    sums: dict[str, np.ndarray] = {}
    runs = draws.batches * draws.draws_per_batch
    for draw in tqdm(draws.every_level(), total=runs, desc="velocity", unit="batch", disable=not progress):
        found = measure(teacher[1], student[1], draw.velocity, draw.latents, draw.timestep, draw.text)
        for name, values in jax.device_get(found).items():
            if not np.isfinite(values).all():
                side = "teacher" if name == "size" or not np.isfinite(found["size"]).all() else "student"
                raise InputError(
                    f"--{side}: expected finite velocities, found NaN or infinity; its training may have diverged, or "
                    f"--dtype is too narrow for it"
                )
            sums.setdefault(name, np.zeros((count, draws.levels, frames)))[draw.rows, draw.levels] = values
    return _figures(sums, draws)


def _figures(sums: dict[str, np.ndarray], draws: Draws) -> Evaluation:
    """Estimates from sums [examples, levels, frames]."""
    resampling, found = Resampling(len(draws.examples.latents)), Evaluation()
    shape = draws.examples.latents.shape
    frame_size, frames = float(np.prod(shape[2:])), list(range(shape[1]))
    ratio = lambda axes: resampling.ratio(sums["error"].sum(axes), sums["size"].sum(axes))
    found.metrics["velocity_error"] = ratio((1, 2))
    words = "relative L1 error"
    by_noise, by_frame = {"student": ratio(2)}, {"student": ratio(1)}
    noise, frame = "noise level sigma", "latent frame"
    found.curves["velocity_error_by_noise"] = Curve("velocity error", noise, words, draws.sigmas, by_noise)
    found.curves["velocity_error_by_frame"] = Curve("velocity error", frame, words, frames, by_frame)
    if "loss_student" not in sums:
        return found
    sums["excess_vs_teacher"] = sums["loss_student"] - sums["loss_teacher"]
    losses = {name: sums[name] / frame_size for name in ("loss_teacher", "loss_student", "excess_vs_teacher")}
    found.metrics |= {name: resampling.mean(loss.mean((1, 2))) for name, loss in losses.items()}
    excess = losses["excess_vs_teacher"]
    words = "student's loss - teacher's"
    for name, label, x, axis in (("noise", noise, draws.sigmas, 2), ("frame", frame, frames, 1)):
        series = {"student": resampling.mean(excess.mean(axis))}
        found.curves[f"excess_by_{name}"] = Curve("excess of loss", label, words, x, series)
    return found
