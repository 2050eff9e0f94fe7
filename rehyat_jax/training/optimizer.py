"""Optimizers and schedules from Optax, as the configuration names them."""

from typing import Any

import jax
import ml_collections
import optax

from rehyat_jax.errors import InputError


def learning_rate_schedule(peak: float, config: ml_collections.ConfigDict) -> optax.Schedule:
    """Linear warmup from 0 to `peak`, then the configured decay to the last step.

    Raises:
      InputError: if the warmup leaves no step, or the decay is unknown.
    """
    warmup = config.optimizer.warmup_steps
    remaining = config.steps - warmup
    if remaining < 1:
        raise InputError(
            f"config.optimizer.warmup_steps ({warmup}) must be less than config.steps ({config.steps}); lower it"
        )
    decays = {
        "cosine": lambda: optax.cosine_decay_schedule(peak, remaining),
        "linear": lambda: optax.linear_schedule(peak, 0.0, remaining),
        "constant": lambda: optax.constant_schedule(peak),
    }
    if config.optimizer.decay not in decays:
        raise InputError(f"config.optimizer.decay must be one of {sorted(decays)}, found {config.optimizer.decay!r}")
    # One step into the warmup, so that no update is wasted on a learning rate of zero.
    warm = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([warm, decays[config.optimizer.decay]()], [warmup])


def muon_dimension_numbers(params: Any) -> Any:
    """Marks the matrices of the stacked blocks [L, in, out] for Muon and leaves all else to AdamW."""

    def mark(path: tuple[Any, ...], leaf: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
        is_block_matrix = path[0].key == "blocks" and path[-1].key == "kernel" and leaf.ndim == 3
        return optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2) if is_block_matrix else None

    return jax.tree_util.tree_map_with_path(mark, params)


def make_optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """The configured optimizer with gradient clipping.

    Raises:
      InputError: on an unknown name or an impossible schedule.
    """
    options = config.optimizer
    schedule = learning_rate_schedule(options.learning_rate, config)
    if options.name == "adamw":
        optimizer = optax.adamw(schedule, weight_decay=options.weight_decay)
    elif options.name == "muon":
        optimizer = optax.contrib.muon(
            learning_rate_schedule(options.muon_learning_rate, config),
            weight_decay=options.weight_decay,
            adam_weight_decay=options.weight_decay,
            adam_learning_rate=schedule,
            muon_weight_dimension_numbers=muon_dimension_numbers,
        )
    else:
        raise InputError(f'config.optimizer.name must be "adamw" or "muon", found {options.name!r}')
    clip = optax.clip_by_global_norm(options.clip_norm) if options.clip_norm else optax.identity()
    return optax.chain(clip, optimizer)
