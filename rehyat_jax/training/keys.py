"""Every random key of a run, from its one seed."""

import jax

# Far above any step's number, so that no step shares its randomness with them.
_INITIALISATION = 2**32 - 1
_CALIBRATION = 2**32 - 2
_EVALUATION = 2**32 - 3


def step_key(seed: int, step: jax.Array | int) -> jax.Array:
    """The key of one update; the same however often the run was stopped before it."""
    return jax.random.fold_in(jax.random.key(seed), step)


def initialisation_key(seed: int) -> jax.Array:
    """The key of fresh parameters."""
    return step_key(seed, _INITIALISATION)


def evaluation_key(seed: int) -> jax.Array:
    """The key of the noise that evaluators use."""
    return step_key(seed, _EVALUATION)


def calibration_key(seed: int) -> jax.Array:
    """The key of the batch that fresh feature maps are scaled by."""
    return step_key(seed, _CALIBRATION)
