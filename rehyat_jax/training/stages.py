"""The stages of training: a table of their differences, and the function that assembles a step."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_collections
import optax
from flax import nnx

from rehyat_jax.diffusion.samplers import Sampler
from rehyat_jax.diffusion.solver_options import SolverOptions
from rehyat_jax.models.lora import LoraConfig, adapted_layers, is_adapter, joined, split_tree
from rehyat_jax.models.wan.config import WanConfig
from rehyat_jax.models.wan.flops import StepFlops, distillation_flops, forward_flops, teacher_flops, training_flops
from rehyat_jax.training import consistency, distill, dmd, finetune
from rehyat_jax.training.optimizer import make_optimizer
from rehyat_jax.training.over_chunks import make_apply
from rehyat_jax.training.sharded_step import ShardedStep, make_sharded_step
from rehyat_jax.training.step import Context, Params, UpdateFn, accumulate, gradient_update
from rehyat_jax.training.velocity import make_teacher


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage, whose name is its key in `STAGES`.

    Attributes:
      make_update: (graph definition of the model, configuration, optimizer) -> the update of a step.
      step_flops: (architecture, size of the latents, configuration) -> FLOPs of one video in a step.
      starts_from_model: whether the model is read from `init_from`; otherwise it is initialised.
      trains: the part of the parameter tree in training, "feature_maps"; None for all of it. The rest is frozen: the
        teacher. A model without this part has nothing to train. With LoRA, see `split`.
      takes_lora: whether it can train adapters, `config.lora`.
      noises_by_chunk: whether it can train for sampling chunk by chunk, `config.noise_by_chunk`.
      converts: whether the configuration must name the blocks to convert.
      recomputes: whether gradients pass through the blocks, so that `config.remat` matters.
      updates_per_step: configuration -> updates of the optimizer in a step.
      make_optimizer: configuration -> the optimizer; None for `optimizer.make_optimizer`.
      start: (trained part of the initial model, context, configuration) -> the parameters in training, if these are
        several networks: a dictionary by name. None for the model alone.
      result: name of the network that is the result.
      teacher_weight: configuration -> weight of the teacher's velocity in the loss, see `finetune.make_loss`.
      own_teacher: whether the teacher, without `velocity.teacher`, is the initial model in its own forms. With LoRA,
        its feature maps are then frozen too.
      sampler: the sampler of the result, if that is a model of few steps without guidance, `config.few_step`.
      learns_guidance: whether the teacher's velocity must be one after guidance, `velocity.guidance_scale`.
      own_videos: whether it learns from videos that the student makes. Of the data's latents it reads only the size.
    """

    make_update: Callable[[nnx.GraphDef, ml_collections.ConfigDict, optax.GradientTransformation], UpdateFn]
    step_flops: Callable[[WanConfig, tuple[int, int, int], ml_collections.ConfigDict], StepFlops]
    starts_from_model: bool = True
    trains: str | None = None
    takes_lora: bool = False
    noises_by_chunk: bool = False
    converts: bool = False
    recomputes: bool = True
    updates_per_step: Callable[[ml_collections.ConfigDict], int] = lambda config: 1
    make_optimizer: Callable[[ml_collections.ConfigDict], optax.GradientTransformation] | None = None
    start: Callable[[Params, Context, ml_collections.ConfigDict], Params] | None = None
    result: str = ""
    teacher_weight: Callable[[ml_collections.ConfigDict], float] = lambda config: 0.0
    own_teacher: bool = False
    sampler: Sampler | None = None
    learns_guidance: bool = False
    own_videos: bool = False

    @property
    def few_steps(self) -> bool:
        """Whether the result is a model of few steps."""
        return self.sampler is not None

    def data_kinds(self, config: ml_collections.ConfigDict) -> tuple[str, ...]:
        """Kinds of data sets that it learns from, see `data.pipeline.Source`.

        Trajectories hold no clean latents, and have one noise level in all frames.
        """
        by_chunk = config.noise_by_chunk and not self.own_videos
        needs_clean = not self.converts and (self.teacher_weight(config) < 1 or by_chunk)
        return ("examples",) if needs_clean else ("examples", "trajectories")

    def teacher_path(self, config: ml_collections.ConfigDict) -> str:
        """Path of the teacher whose velocity is learned; "" if there is none, or its parameters are the frozen ones."""
        if not self.teacher_weight(config):
            return ""
        own = config.init_from if self.own_teacher and not config.lora.rank else ""
        return config.velocity.teacher or own

    def freezes(self, config: ml_collections.ConfigDict) -> bool:
        """True if only some parameters are in training. A resumed run reads the others from `init_from`."""
        return self.trains is not None or config.lora.rank > 0

    def split(self, params: dict[str, Any]) -> tuple[Params, dict[str, Any]]:
        """Splits a tree with the structure of the model's parameters into (trained part, frozen part).

        If the model has adapters, these are trained, and feature maps too unless they are the teacher's, see
        `own_teacher`.
        """
        if _has_adapters(params):
            with_maps = not self.own_teacher
            return split_tree(params, lambda path: is_adapter(path) or (with_maps and path[0] == "feature_maps"))
        if self.trains is None:
            return params, {}
        return params[self.trains], {name: tree for name, tree in params.items() if name != self.trains}

    def sampling(self, config: ml_collections.ConfigDict) -> SolverOptions | None:
        """The solver that the result is made for, which has learned guidance; None for that of any model."""
        return SolverOptions(config.few_step.steps, 1.0, config.flow_shift, self.sampler) if self.sampler else None

    def of_result(self, trained: Params) -> Params:
        """The trained part of the network that is the result. A moving average is kept of this part alone."""
        return trained[self.result] if self.result else trained

    def join(self, trained: Params, frozen: dict[str, Any]) -> dict[str, Any]:
        """Inverse of `split`: the parameters of a network."""
        if _has_adapters(trained):
            return joined(frozen, trained)
        return trained if self.trains is None else {**frozen, self.trains: trained}


def lora_config(config: ml_collections.ConfigDict) -> LoraConfig | None:
    """The configured adapters; None if lora.rank is 0. Raises ValueError if the fields do not fit together."""
    lora = config.lora
    return LoraConfig(lora.rank, lora.alpha or lora.rank, tuple(lora.targets)) if lora.rank else None


def _has_adapters(params: Params) -> bool:
    return any(adapted_layers(params))


def _update_by_velocity(
    model_def: nnx.GraphDef, config: ml_collections.ConfigDict, optimizer: optax.GradientTransformation
) -> UpdateFn:
    stage = STAGES[config.stage]
    weight = stage.teacher_weight(config)
    teacher = make_teacher(model_def, config, is_softmax=_has_softmax_teacher(config)) if weight else None
    chunk_frames = lambda params: nnx.merge(model_def, params).config.chunk_frames
    loss = finetune.make_loss(
        make_apply(config)(model_def),
        config,
        teacher=teacher,
        teacher_weight=weight,
        chunk_frames=chunk_frames if config.noise_by_chunk else None,
    )
    return gradient_update(accumulate(finetune.make_grad_fn(loss, stage.join), config.accumulation_steps), optimizer)


def _has_softmax_teacher(config: ml_collections.ConfigDict) -> bool:
    return bool(config.velocity.teacher) or not STAGES[config.stage].own_teacher


def _flops_by_velocity(model: WanConfig, latents: tuple[int, int, int], config: ml_collections.ConfigDict) -> StepFlops:
    of_student = _flops_of_update(model, latents, config)
    if not STAGES[config.stage].teacher_weight(config):
        return of_student
    if _has_softmax_teacher(config):
        of_teacher = teacher_flops(model, latents)
    else:
        of_teacher = _forward_flops(model, latents) + config.teacher_forcing * _finished_flops(model, latents)
    return of_student._replace(model=of_student.model + _teacher_passes(config) * of_teacher)


def _flops_of_update(model: WanConfig, latents: tuple[int, int, int], config: ml_collections.ConfigDict) -> StepFlops:
    trains_weights = not STAGES[config.stage].freezes(config)
    how = dict(remat=config.remat, trains_weights=trains_weights, lora=lora_config(config))
    of_noisy = training_flops(model, latents, **how)
    finished = _finished_latents(model, latents)
    if not config.teacher_forcing or not finished[0]:
        return of_noisy
    # Finished chunks are read too. For the gradient, these and the noisy ones are computed again.
    of_finished = training_flops(model, finished, **how)
    again = 2 * _finished_flops(model, latents)
    return StepFlops(of_noisy.model + of_finished.model, of_noisy.recomputed + of_finished.recomputed + again)


def _finished_latents(model: WanConfig, latents: tuple[int, int, int]) -> tuple[int, int, int]:
    """Size of the latents before the last chunk, which no chunk reads."""
    chunk = model.block_forms.chunk_frames * model.patch_size[0]
    return (latents[0] - 1) // chunk * chunk, *latents[1:]


def _finished_flops(model: WanConfig, latents: tuple[int, int, int]) -> int:
    finished = _finished_latents(model, latents)
    return _forward_flops(model, finished) if finished[0] else 0


def _teacher_passes(config: ml_collections.ConfigDict) -> int:
    return 1 if config.velocity.guidance_scale == 1 else 2


def _forward_flops(model: WanConfig, latents: tuple[int, int, int]) -> int:
    count = forward_flops(model, latents)
    return count.outside + count.blocks


def _update_to_few_steps(make_update: Callable[..., UpdateFn]) -> Callable[..., UpdateFn]:
    return lambda model_def, config, optimizer: make_update(model_def, config, optimizer, STAGES[config.stage].join)


def _flops_of_dmd(model: WanConfig, latents: tuple[int, int, int], config: ml_collections.ConfigDict) -> StepFlops:
    score = model.replace(hybrid_blocks=()) if config.velocity.teacher else model
    of_student, of_score = (_flops_of_update(network, latents, config) for network in (model, score))
    # On average, the simulation evaluates the generator (steps + 1) / 2 times.
    simulated = int((config.few_step.steps + 1) / 2 * _forward_flops(model, latents))
    scores = (1 + _teacher_passes(config)) * _forward_flops(score, latents)
    # Chunk by chunk, the generator also reads the finished chunks, in the simulation and for its gradient.
    states = 2 * config.noise_by_chunk * _finished_flops(model, latents)
    updates = config.dmd.score_updates
    return StepFlops(
        of_student.model + updates * of_score.model + simulated + states + scores,
        of_student.recomputed + updates * of_score.recomputed,
    )


def _flops_of_consistency(
    model: WanConfig, latents: tuple[int, int, int], config: ml_collections.ConfigDict
) -> StepFlops:
    of_update = _flops_of_update(model, latents, config)
    # A pass in forward mode costs two.
    forward = 2 + _teacher_passes(config)
    return of_update._replace(model=of_update.model + forward * _forward_flops(model, latents))


def _flops_of_distillation(
    model: WanConfig, latents: tuple[int, int, int], config: ml_collections.ConfigDict
) -> StepFlops:
    return distillation_flops(model, latents, updates=distill.updates_per_step(config))


STAGES = {
    "pretrain": Stage(_update_by_velocity, _flops_by_velocity, starts_from_model=False, noises_by_chunk=True),
    "distill": Stage(
        distill.make_update,
        _flops_of_distillation,
        trains="feature_maps",
        converts=True,
        recomputes=False,
        updates_per_step=distill.updates_per_step,
    ),
    "velocity": Stage(
        _update_by_velocity,
        _flops_by_velocity,
        trains="feature_maps",
        takes_lora=True,
        teacher_weight=lambda config: 1.0,
    ),
    "finetune": Stage(
        _update_by_velocity,
        _flops_by_velocity,
        takes_lora=True,
        noises_by_chunk=True,
        teacher_weight=lambda config: config.velocity.teacher_weight,
    ),
    "guidance": Stage(
        _update_by_velocity,
        _flops_by_velocity,
        takes_lora=True,
        noises_by_chunk=True,
        teacher_weight=lambda config: 1.0,
        own_teacher=True,
        sampler="unipc",
        learns_guidance=True,
    ),
    "consistency": Stage(
        _update_to_few_steps(consistency.make_update),
        _flops_of_consistency,
        takes_lora=True,
        teacher_weight=lambda config: 1.0,
        own_teacher=True,
        sampler="renoise",
    ),
    "dmd": Stage(
        _update_to_few_steps(dmd.make_update),
        _flops_of_dmd,
        takes_lora=True,
        make_optimizer=dmd.joint_optimizer,
        start=dmd.start,
        noises_by_chunk=True,
        result=dmd.GENERATOR,
        own_videos=True,
        teacher_weight=lambda config: 1.0,
        own_teacher=True,
        sampler="renoise",
    ),
}
"""The stages by `config.stage`."""


class Assembly(NamedTuple):
    """A step and its arguments.

    Attributes:
      sharded: the step and its initial state.
      params: the parameters in training, from which the initial state is made.
      context: arrays that the step reads but does not change, including the frozen parameters.
    """

    sharded: ShardedStep
    params: Params
    context: Context


def assemble(
    model_def: nnx.GraphDef,
    params: dict[str, Any],
    specs: dict[str, Any],
    context: Context,
    config: ml_collections.ConfigDict,
) -> Assembly:
    """The configured stage's step on the mesh in use.

    Args:
      model_def: graph definition of the transformer.
      params: all parameters, arrays or `jax.ShapeDtypeStruct`s with shardings.
      specs: their PartitionSpecs.
      context: the context that every stage's step reads, "null_text", and "teacher" if the teacher is a model of its
        own (`Stage.teacher_path`).
      config: configuration of the run.
    """
    stage = STAGES[config.stage]
    trained, frozen = stage.split(params)
    trained_specs, _ = stage.split(specs)
    if frozen:
        context = {**context, "frozen": frozen}
    if stage.make_optimizer is not None:
        optimizer = stage.make_optimizer(config)
    else:
        optimizer = make_optimizer(config, stage.updates_per_step(config))
    update_fn = stage.make_update(model_def, config, optimizer)

    def start(trained: Params, context: Context) -> Params:
        return trained if stage.start is None else stage.start(trained, context, config)

    sharded = make_sharded_step(
        update_fn, optimizer, trained, trained_specs, context, config, start=start, averaged=stage.of_result
    )
    return Assembly(sharded, trained, context)
