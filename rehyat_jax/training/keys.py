"""Every random key of a run, derived from its seed."""

import jax

# Far above the number of any step, so that no step has the same key.
_INITIALISATION = 2**32 - 1
_CALIBRATION = 2**32 - 2
_EVALUATION = 2**32 - 3


def step_key(seed: int, step: jax.Array | int) -> jax.Array:
    """The key of one update; a stopped and resumed run gets the same one."""
    return jax.random.fold_in(jax.random.key(seed), step)


def initialisation_key(seed: int) -> jax.Array:
    """The key of fresh parameters."""
    return step_key(seed, _INITIALISATION)


def evaluation_key(seed: int) -> jax.Array:
    """The key of the noise that evaluators use."""
    return step_key(seed, _EVALUATION)


def calibration_key(seed: int) -> jax.Array:
    """The key of the noise of the batch that calibrates fresh feature maps."""
    return step_key(seed, _CALIBRATION)
