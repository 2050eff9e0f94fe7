"""The configured optimizers and schedules, built with Optax."""

from typing import Any

import jax
import ml_collections
import optax

from rehyat_jax.models.lora import is_adapter


def learning_rate_schedule(peak: float, config: ml_collections.ConfigDict) -> optax.Schedule:
    """Linear warmup to `peak`, then the configured decay until the last step."""
    warmup = config.optimizer.warmup_steps
    remaining = config.steps - warmup
    decay = {
        "cosine": optax.cosine_decay_schedule(peak, remaining),
        "linear": optax.linear_schedule(peak, 0.0, remaining),
        "constant": optax.constant_schedule(peak),
    }[config.optimizer.decay]
    # Starts one step into the warmup, so that no update has a learning rate of zero.
    warm = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([warm, decay], [warmup])


def muon_dimension_numbers(params: Any) -> Any:
    """Marks the matrices of the stacked blocks [L, in, out] for Muon and leaves all else to AdamW."""

    def mark(path: tuple[Any, ...], leaf: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
        is_block_matrix = path[0].key == "blocks" and path[-1].key == "kernel" and leaf.ndim == 3
        return optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2) if is_block_matrix else None

    return jax.tree_util.tree_map_with_path(mark, params)


def decayed(params: Any) -> Any:
    """Marks kernels and adapters for AdamW's weight decay.

    Norms, biases, modulation and scales have no reason to be small.
    """

    def mark(path: tuple[Any, ...], _: Any) -> bool:
        names = tuple(entry.key for entry in path)
        return names[-1] == "kernel" or is_adapter(names)

    return jax.tree_util.tree_map_with_path(mark, params)


def make_optimizer(config: ml_collections.ConfigDict, updates_per_step: int = 1) -> optax.GradientTransformation:
    """The configured optimizer with gradient clipping. Weight decay is only for the matrices: see `decayed`, or Muon's.

    Args:
      config: steps and the group "optimizer" are read.
      updates_per_step: updates of a step, all with the step's learning rate.
    """
    options = config.optimizer
    of_step = learning_rate_schedule(options.learning_rate, config)
    schedule = of_step if updates_per_step == 1 else lambda update: of_step(update // updates_per_step)
    if options.name == "muon":
        optimizer = optax.contrib.muon(
            learning_rate_schedule(options.muon_learning_rate, config),
            weight_decay=options.weight_decay,
            adam_learning_rate=schedule,
            muon_weight_dimension_numbers=muon_dimension_numbers,
        )
    else:
        optimizer = optax.adamw(schedule, weight_decay=options.weight_decay, mask=decayed)
    clip = optax.clip_by_global_norm(options.clip_norm) if options.clip_norm else optax.identity()
    return optax.chain(clip, optimizer)
