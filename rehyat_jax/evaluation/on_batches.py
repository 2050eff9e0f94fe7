"""Errors of models on fixed batches, with noise drawn as training draws it: means over the batches.

Evaluators during training, the demo's report and studies share these figures. `evaluation.compare_models` is for a
finished student: it has confidence intervals, and sees every example at every level of noise.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
from flax import nnx

from rehyat_jax.evaluation.attention_error import attention_errors, relative_error
from rehyat_jax.models.wan.modeling import apply_model
from rehyat_jax.training.noising import noise_batch
from rehyat_jax.training.step import Batch

Measure = Callable[[Any, Batch, jax.Array, Any], dict[str, jax.Array]]
"""(params, batch, key of its noise, another model's parameters or None) -> figures by name."""

Compare = Callable[[jax.Array, jax.Array, jax.Array | None], dict[str, jax.Array]]
"""(velocity, the teacher's velocity, target noise - clean or None if it is unknown) -> figures by name."""


def mean_over_batches(
    measure: Measure, batches: Sequence[tuple[Batch, jax.Array]], teacher: Any = None
) -> Callable[[Any], dict[str, jax.Array]]:
    """A function of a model's parameters that returns the means of `measure` over batches.

    Args:
      measure: compiled once.
      batches: each with the key of its noise.
      teacher: parameters of another model; an argument of the program, because XLA would bake a closure's into it.
    """
    compiled = jax.jit(measure)

    def means(params: Any) -> dict[str, jax.Array]:
        found = [compiled(params, batch, key, teacher) for batch, key in batches]
        return jax.tree.map(lambda *values: sum(values) / len(batches), *found)

    return means


def measure_attention(model_def: nnx.GraphDef, null_text: jax.Array, config: ml_collections.ConfigDict) -> Measure:
    """`attention_errors` as a measure; its arguments are the same."""
    return lambda params, batch, key, _: attention_errors(model_def, params, batch, null_text, key, config)


def relative_difference(velocity: jax.Array, of_teacher: jax.Array, target: jax.Array | None) -> dict[str, jax.Array]:
    """{"error": mean |velocity - of_teacher| / mean |of_teacher|}; a comparison for `measure_velocity`."""
    del target
    return {"error": relative_error(velocity, of_teacher)}


def measure_velocity(
    model_def: nnx.GraphDef,
    teacher_def: nnx.GraphDef,
    null_text: jax.Array,
    config: ml_collections.ConfigDict,
    compare: Compare = relative_difference,
) -> Measure:
    """A measure that compares the velocities of two models on the same noisy latents.

    Args:
      model_def, teacher_def: graph definitions of the models.
      null_text, config: see `noise_batch`.
      compare: the comparison.
    """
    student_apply, teacher_apply = apply_model(model_def), apply_model(teacher_def)

    def measure(params: Any, batch: Batch, key: jax.Array, teacher: Any) -> dict[str, jax.Array]:
        noisy = noise_batch(batch, null_text, key, config)
        inputs = noisy.latents, noisy.timestep, noisy.text
        return compare(student_apply(params, *inputs), teacher_apply(teacher, *inputs), noisy.velocity)

    return measure
