"""The inputs on which two models are compared: examples, and noise that depends only on the seed and the example.

Noise levels are stratified. The sampler's path from noise to data, with its flow shift, is divided into `levels` equal
parts. An example is seen once in each part, at a place that is drawn at random. So a mean over parts weighs noise
levels as the sampler visits them.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rehyat_jax.data.pipeline import Source
from rehyat_jax.diffusion import flow
from rehyat_jax.errors import InputError


class Examples(NamedTuple):
    """Examples of one shape.

    Attributes:
      latents: [N, T, H, W, C] float32; clean, or those of a teacher's trajectories.
      text: [N, L, text_dim] float32.
      timestep: [N] float32, only for trajectories; None for clean latents.
    """

    latents: np.ndarray
    text: np.ndarray
    timestep: np.ndarray | None


class Draw(NamedTuple):
    """Inputs of both models, each [B, ...].

    Attributes:
      rows: numbers of the examples.
      levels: the part of the path that each is in.
      latents, timestep, text: inputs of a model.
      velocity: the target noise - clean; None for trajectories, whose clean latents are unknown.
    """

    rows: np.ndarray
    levels: np.ndarray
    latents: Any
    timestep: Any
    text: Any
    velocity: Any


def read_examples(source: Source, count: int, seed: int) -> Examples:
    """At most `count` examples of the bucket with the most examples, drawn without replacement.

    Raises:
      InputError: there are fewer than two examples, or one cannot be read.
    """
    bucket = max(source.buckets, key=len)
    if len(bucket) < 2:
        raise InputError(
            "the examples: expected at least 2 of one shape, found 1; prepare more, or give another --data"
        )
    chosen = np.random.default_rng(seed).choice(len(bucket), min(count, len(bucket)), replace=False)
    found = [bucket[int(index)] for index in chosen]
    stacked = {name: np.stack([example[name] for example in found]) for name in found[0]}
    return Examples(stacked["latents"], stacked["text"], stacked.get("timestep"))


@dataclasses.dataclass(frozen=True)
class Draws:
    """The draws of an evaluation.

    Attributes:
      examples: the examples.
      levels: number of parts of the path.
      flow_shift: of the path, see `flow.shift_sigma`.
      seed: of the noise.
      batch: examples that go through a model at once.
    """

    examples: Examples
    levels: int
    flow_shift: float
    seed: int
    batch: int

    @property
    def sigmas(self) -> list[float]:
        """The noise level in the middle of each part, from data to noise."""
        return [float(flow.shift_sigma((level + 0.5) / self.levels, self.flow_shift)) for level in range(self.levels)]

    def every_level(self) -> Iterator[Draw]:
        """Every example at every level; trajectories once, at their own level."""
        for rows in self._batches():
            if self.examples.timestep is not None:
                yield self._draw(rows, self._own_levels(rows))
                continue
            for level in range(self.levels):
                yield self._draw(rows, np.full(len(rows), level))

    def one_level(self) -> Iterator[Draw]:
        """Every example at one level; the levels take turns."""
        for rows in self._batches():
            own = self.examples.timestep is not None
            yield self._draw(rows, self._own_levels(rows) if own else rows % self.levels)

    @property
    def batches(self) -> int:
        """Number of batches of `one_level`."""
        return -(-len(self.examples.latents) // self.batch)

    @property
    def draws_per_batch(self) -> int:
        """Draws of a batch in `every_level`."""
        return self.levels if self.examples.timestep is None else 1

    def _batches(self) -> Iterator[np.ndarray]:
        """Numbers of examples. The last batch repeats its last example, because a smaller one would compile again."""
        count = len(self.examples.latents)
        for first in range(0, count, self.batch):
            yield np.minimum(np.arange(first, first + self.batch), count - 1)

    def _own_levels(self, rows: np.ndarray) -> np.ndarray:
        assert self.examples.timestep is not None
        sigma = self.examples.timestep[rows] / flow.NUM_TRAIN_TIMESTEPS
        place = flow.shift_sigma(sigma, 1 / self.flow_shift)  # the inverse
        return np.minimum((place * self.levels).astype(int), self.levels - 1)

    def _draw(self, rows: np.ndarray, levels: np.ndarray) -> Draw:
        latents, text = self.examples.latents[rows], self.examples.text[rows]
        if self.examples.timestep is not None:
            return Draw(rows, levels, latents, self.examples.timestep[rows], text, None)
        noisy = _noised(latents, rows, levels, np.uint32(self.seed), self.levels, self.flow_shift)
        return Draw(rows, levels, noisy[0], noisy[1], text, noisy[2])


@functools.partial(jax.jit, static_argnums=(4, 5))
def _noised(
    latents: jax.Array, rows: jax.Array, levels: jax.Array, seed: jax.Array, count: int, shift: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(noisy latents, timestep, target velocity) of examples; their noise does not depend on the batch."""

    def draw(row: jax.Array, level: jax.Array) -> tuple[jax.Array, jax.Array]:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), row), level)
        noise_key, sigma_key = jax.random.split(key)
        return jax.random.normal(noise_key, latents.shape[1:]), jax.random.uniform(sigma_key)

    noise, place = jax.vmap(draw)(rows, levels)
    sigma = flow.shift_sigma((levels + place) / count, shift)
    noisy = flow.add_noise(latents, noise, sigma)
    return noisy, jnp.asarray(flow.sigma_to_timestep(sigma)), flow.velocity_target(latents, noise)
