"""Distances between sets of videos, in a fixed space of random features.

The features come from a small convolutional network over space and time with random weights of a fixed seed. It knows
nothing of the content of videos, unlike the networks behind FVD. So the distances compare models on the same kind of
videos, and no others. Nothing has to be downloaded.
"""

import functools
import itertools

import jax
import numpy as np

from rehyat_jax.evaluation.bootstrap import INTERVAL, Estimate

NAME = "32 features of a random 3-D convolutional network, seed 0"
_CHANNELS = (3, 16, 32, 32)
_STRIDES = ((1, 2, 2), (2, 2, 2), (2, 2, 2))
SHORTER_SIDE = 64
"""Larger frames are scaled down to this size of their shorter side."""

_RESAMPLES = 500


@functools.cache
def _kernels() -> list[np.ndarray]:
    # The stream of RandomState is frozen for ever, unlike those of newer generators.
    draw = np.random.RandomState(0).standard_normal
    shapes = [(3, 3, 3, *ends) for ends in itertools.pairwise(_CHANNELS)]
    return [(draw(shape) * np.sqrt(2 / np.prod(shape[:-1]))).astype(np.float32) for shape in shapes]


def features(video: np.ndarray) -> np.ndarray:
    """[frames, height, width, 3] floating point in [0, 1] -> [32] float32."""
    return np.asarray(_features(np.asarray(video, np.float32), _kernels()))


@jax.jit
def _features(video: jax.Array, kernels: list[jax.Array]) -> jax.Array:
    frames, height, width, _ = video.shape
    scale = min(1, SHORTER_SIDE / min(height, width))
    size = frames, round(height * scale), round(width * scale), 3
    x = 2 * jax.image.resize(video, size, "linear")[None] - 1
    for kernel, strides in zip(kernels, _STRIDES, strict=True):
        layout = ("NDHWC", "DHWIO", "NDHWC")
        x = jax.nn.leaky_relu(jax.lax.conv_general_dilated(x, kernel, strides, "SAME", dimension_numbers=layout))
    return x.mean((0, 1, 2, 3))


def frechet_distance(first: np.ndarray, second: np.ndarray, *, paired: bool, seed: int = 0) -> Estimate:
    """Frechet distance between normal distributions with the means and covariances of two sets of features.

    With few videos the distance itself is too large: two sets from one distribution differ. Resampled sets differ from
    the sets by as much again. So the estimate is the distance minus this bias, 2 d - mean(resampled d), and the
    interval is that of the basic bootstrap, 2 d - resampled d. It may be negative near 0.

    Args:
      first, second: [N, F], [M, F].
      paired: True if row i of both has the same noise; both are then resampled alike.
      seed: of the resamples.

    Returns:
      The distance divided by F. In standardised features, a shift by one standard deviation in all of them gives 1.
    """
    rng = np.random.default_rng(seed)

    def counts(rows: int) -> np.ndarray:
        return rng.multinomial(rows, np.full(rows, 1 / rows), size=_RESAMPLES)

    of_first = counts(len(first))
    of_second = of_first if paired else counts(len(second))
    distance = _distance(first, np.ones(len(first)), second, np.ones(len(second)))
    pairs = zip(of_first, of_second, strict=True)
    resampled = np.array([_distance(first, count, second, other) for count, other in pairs])
    high, low = np.percentile(resampled, INTERVAL)
    return Estimate(*(np.asarray(2 * distance - found) for found in (resampled.mean(), low, high)))


def _distance(first: np.ndarray, counts: np.ndarray, second: np.ndarray, other_counts: np.ndarray) -> float:
    (mean, covariance), (other_mean, other_covariance) = _moments(first, counts), _moments(second, other_counts)
    values, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    # The trace of (C1 C2)^(1/2), by the symmetric matrix with the same eigenvalues.
    cross = np.sqrt(np.linalg.eigvalsh(root @ other_covariance @ root).clip(0)).sum()
    spread = np.trace(covariance) + np.trace(other_covariance) - 2 * cross
    return float((np.square(mean - other_mean).sum() + spread) / len(mean))


def _moments(rows: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean [F] and covariance [F, F] of rows [N, F] that occur `counts` times."""
    weights = counts / counts.sum()
    mean = weights @ rows
    centred = rows - mean
    return mean, (centred * weights[:, None]).T @ centred * counts.sum() / (counts.sum() - 1)


def spreads(rows: np.ndarray, prompts: list[str]) -> np.ndarray:
    """The mean distance between two samples of one prompt, for every prompt with at least two: [P].

    Args:
      rows: features [N, F].
      prompts: N prompts.

    Returns:
      Root mean square differences over features: 1.4 for independent rows of standardised features.
    """
    found = []
    for prompt in dict.fromkeys(prompts):
        own = rows[[number for number, other in enumerate(prompts) if other == prompt]]
        if len(own) > 1:
            first, second = np.triu_indices(len(own), 1)
            found.append(np.sqrt(np.square(own[first] - own[second]).mean(-1)).mean())
    return np.array(found)


def standardised(sets: dict[str, np.ndarray], reference: str) -> dict[str, np.ndarray]:
    """Sets of features [N, F], each feature shifted and scaled to mean 0 and standard deviation 1 in the reference.

    A feature that hardly varies there is not scaled up to more than 100 times the others.
    """
    mean, deviation = sets[reference].mean(0), sets[reference].std(0)
    deviation = np.maximum(deviation, 0.01 * deviation.mean())
    return {name: (rows - mean) / np.where(deviation > 0, deviation, 1) for name, rows in sets.items()}
