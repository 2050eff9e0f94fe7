"""The table of the evaluators that `config.evals` can name.

An entry of `config.evals` is a dictionary: {"type": a key of `EVALUATORS`, "every": steps}. It may also have options of
the type, and "name", the prefix of the logged figures (the type by default).
"""

import inspect
from collections.abc import Callable
from contextlib import closing
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx

from rehyat_jax.data.pipeline import Source
from rehyat_jax.diffusion import flow
from rehyat_jax.errors import InputError
from rehyat_jax.evaluation.on_batches import (
    Compare,
    Measure,
    mean_over_batches,
    measure_attention,
    measure_velocity,
    relative_difference,
)
from rehyat_jax.evaluation.pair import Facts, check_pair, facts_of
from rehyat_jax.models.wan.config import WanConfig
from rehyat_jax.models.wan.modeling import apply_model
from rehyat_jax.training import finetune
from rehyat_jax.training.keys import evaluation_key
from rehyat_jax.training.run_control import Evaluator, ScheduledEvaluator
from rehyat_jax.training.run_data import RunData
from rehyat_jax.training.step import Batch
from rehyat_jax.training.trouble import next_batch
from rehyat_jax.training.values import Choice
from rehyat_jax.weights.load import load_wan, open_checkpoint


class Situation(NamedTuple):
    """The part of a run from which an evaluator is built.

    Attributes:
      model_def: graph definition of the model.
      model_config: its architecture.
      source: the training examples.
      null_text: [L, text_dim], on all devices.
      config: configuration of the run.
    """

    model_def: nnx.GraphDef
    model_config: WanConfig
    source: Source
    null_text: jax.Array
    config: ml_collections.ConfigDict


def _fixed_batches(situation: Situation, count: int) -> list[tuple[Batch, jax.Array]]:
    """`count` batches, shuffled by another seed than the run's own, with keys; every evaluation uses them."""
    config, key = situation.config, evaluation_key(situation.config.seed)
    with closing(RunData(situation.source, config, seed=config.seed + 2, accumulation_steps=1)) as data:
        batches = [jax.tree.map(lambda x: x[0], data.on_mesh(next_batch(data, step))) for step in range(1, count + 1)]
    return [(batch, jax.random.fold_in(key, number)) for number, batch in enumerate(batches)]


def _evaluator(situation: Situation, batches: int, measure: Measure, teacher: Any = None) -> Evaluator:
    """An evaluator that reports the means of `measure` over fixed batches; see `mean_over_batches`."""
    means = mean_over_batches(measure, _fixed_batches(situation, batches), teacher)
    return lambda params: jax.device_get(means(params)).items()


def attention_error(situation: Situation, *, batches: int = 1) -> Evaluator:
    """Relative error of each hybrid block's attention, with its references; see `attention_errors`."""
    if not situation.model_config.hybrid_blocks:
        raise ValueError("the model has no hybrid blocks to evaluate")
    measure = measure_attention(situation.model_def, situation.null_text, situation.config)
    return _evaluator(situation, batches, measure)


def flow_loss(situation: Situation, *, batches: int = 1) -> Evaluator:
    """The flow-matching loss on fixed batches with fixed noise, comparable between steps and between stages."""
    _check_clean(situation)
    loss = finetune.make_loss(apply_model(situation.model_def), situation.config)
    context = {"null_text": situation.null_text}
    return _evaluator(situation, batches, lambda params, batch, key, _: loss(params, context, batch, key)[1])


def velocity_error(situation: Situation, *, teacher: str, batches: int = 1) -> Evaluator:
    """mean |student - teacher| / mean |teacher| of velocities on the same noisy latents.

    Args:
      teacher: path of the teacher, as for `load_wan`.
    """
    return _against_teacher(situation, teacher, batches, relative_difference)


def excess_vs_teacher(situation: Situation, *, teacher: str, batches: int = 1) -> Evaluator:
    """The flow-matching loss minus the teacher's on the same noise, see `evaluation.velocity`.

    Args:
      teacher: path of the teacher, as for `load_wan`.
    """
    _check_clean(situation)

    def excess(velocity: jax.Array, of_teacher: jax.Array, target: jax.Array | None) -> dict[str, jax.Array]:
        assert target is not None  # the latents are clean
        return {"loss": flow.flow_matching_loss(velocity, target) - flow.flow_matching_loss(of_teacher, target)}

    return _against_teacher(situation, teacher, batches, excess)


def _against_teacher(situation: Situation, path: str, batches: int, compare: Compare) -> Evaluator:
    """Reports a comparison of velocities with those of the teacher in `path`. Raises InputError."""
    config = situation.config
    own = Facts(situation.model_config, situation.source.codec, situation.source.text_encoder)
    check_pair(path, "the model in training", facts_of(open_checkpoint(path)), own)
    teacher_def, teacher = nnx.split(load_wan(path, dtype=jnp.dtype(config.dtype)))
    measure = measure_velocity(situation.model_def, teacher_def, situation.null_text, config, compare)
    return _evaluator(situation, batches, measure, teacher)


def _check_clean(situation: Situation) -> None:
    if situation.source.kind != "examples":
        raise ValueError(f"needs clean latents, found {situation.source.kind}")


COMMON = ("type", "every", "name")
"""The keys that every entry may have. All others are options of its type."""

EVALUATORS: dict[str, Callable[..., Evaluator]] = {
    "attention_error": attention_error,
    "flow_loss": flow_loss,
    "velocity_error": velocity_error,
    "excess_vs_teacher": excess_vs_teacher,
}
"""The evaluators by "type"; each is called with a `Situation` and the entry's options."""


def check_evaluators(config: ml_collections.ConfigDict) -> None:
    """Raises InputError for an entry of `config.evals` of an unknown type, or with options that its type lacks."""
    for number, entry in enumerate(config.evals):
        place = f"config.evals[{number}]"
        Choice(EVALUATORS).check(entry["type"], f"{place}.type")
        options = {name: value for name, value in entry.items() if name not in COMMON}
        try:
            inspect.signature(EVALUATORS[entry["type"]]).bind(None, **options)
        except TypeError as error:
            raise InputError(f"{place}: {error}") from error


def make_evaluators(situation: Situation) -> list[ScheduledEvaluator]:
    """The evaluators of `config.evals`, which `check_evaluators` passed.

    Raises:
      InputError: an evaluator cannot measure this model or these data, or an option's value is wrong.
    """
    scheduled = []
    for number, entry in enumerate(situation.config.evals):
        options = {name: value for name, value in entry.items() if name not in COMMON}
        try:
            evaluate = EVALUATORS[entry["type"]](situation, **options)
        except (TypeError, ValueError) as error:
            raise InputError(f"config.evals[{number}]: {error}") from error
        scheduled.append(ScheduledEvaluator(entry.get("name", entry["type"]), entry["every"], evaluate))
    return scheduled
