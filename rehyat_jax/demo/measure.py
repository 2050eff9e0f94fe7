"""Measurements for the demo's report: attention, velocity, samples and the export to PyTorch."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx
from tqdm import tqdm

from rehyat_jax.data.pipeline import batches
from rehyat_jax.demo.digits import CAPTIONS, DigitVideos
from rehyat_jax.evaluation.on_batches import mean_over_batches, measure_attention, measure_velocity
from rehyat_jax.generation.chunks import sample_by_chunk
from rehyat_jax.generation.codecs import SpaceToDepth
from rehyat_jax.generation.generate import generate_latents
from rehyat_jax.generation.noise import initial_noise
from rehyat_jax.generation.text_encoders import WordVectors
from rehyat_jax.models.wan.modeling import WanTransformer
from rehyat_jax.parallel.mesh import make_mesh
from rehyat_jax.training import distill
from rehyat_jax.training.setup import calibration_batch, initial_model, open_data
from rehyat_jax.training.step import Batch
from rehyat_jax.weights import read_model_metadata
from rehyat_jax.weights.streamed import BY_CHUNK, NOISE_LEVELS, SAMPLING

BATCH_SIZE = 16
EVALUATION_SEED = 1000

SOLVER: dict[str, Any] = dict(steps=25, guidance_scale=3.0, flow_shift=5.0, sampler="unipc")
"""Options of samples of models that have no solver of their own."""


def solver_of(checkpoint: str | Path) -> dict[str, Any]:
    """The options of samples of a model: those of its checkpoint if it is one of few steps, or `SOLVER`."""
    return SOLVER | read_model_metadata(checkpoint)[1].get(SAMPLING, {})


def samples_by_chunk(checkpoint: Path) -> bool:
    """Whether a model was trained for sampling chunk by chunk."""
    return read_model_metadata(checkpoint)[1].get(NOISE_LEVELS) == BY_CHUNK


def held_out_batches(count: int) -> list[tuple[Batch, jax.Array]]:
    """Batches of digits that no transformer trains on, each with a random key for its noise."""
    data = batches(DigitVideos("judge", seed=EVALUATION_SEED), batch_size=BATCH_SIZE, seed=EVALUATION_SEED)
    return [(next(data), jax.random.fold_in(jax.random.key(EVALUATION_SEED), number)) for number in range(count)]


def no_caption() -> jax.Array:
    """The embedding of no caption, [L, text_dim]."""
    return jnp.asarray(DigitVideos("judge").null_text)


def undistilled(config: ml_collections.ConfigDict) -> WanTransformer:
    """The model that a distillation run starts from: fresh, calibrated feature maps."""
    source = open_data(config)
    null_text = jnp.asarray(source.null_text)
    with jax.set_mesh(make_mesh(config.mesh)):
        model, batch = initial_model(config), calibration_batch(source, config)
        params = distill.calibrated(model.model_def, model.params, batch, null_text, config)
    return nnx.merge(model.model_def, params)


def block_errors(model: WanTransformer, config: ml_collections.ConfigDict, count: int = 4) -> dict[str, np.ndarray]:
    """Means over held-out batches of `attention_errors`, for a model whose other parameters are the teacher's."""
    model_def, params = nnx.split(model)
    measure = measure_attention(model_def, no_caption(), config)
    return jax.device_get(mean_over_batches(measure, held_out_batches(count))(params))


def velocity_error(
    model: WanTransformer, teacher: WanTransformer, config: ml_collections.ConfigDict, count: int = 4
) -> float:
    """mean |v - v_teacher| / mean |v_teacher| on held-out noisy latents."""
    (model_def, params), (teacher_def, teacher_params) = nnx.split(model), nnx.split(teacher)
    measure = measure_velocity(model_def, teacher_def, no_caption(), config)
    return float(mean_over_batches(measure, held_out_batches(count), teacher_params)(params)["error"])


def sample_captions(
    model: WanTransformer, count: int, description: str, solver: dict[str, Any] = SOLVER, *, by_chunk: bool = False
) -> tuple[np.ndarray, list[str]]:
    """Samples every caption equally often, half of the videos from each of two noise seeds.

    Args:
      model: teacher or student; the noise is the same for both.
      count: total number of videos, a multiple of 20.
      description: label of the progress bar.
      solver: options of `generate`.
      by_chunk: whether every chunk is finished before the next one begins, see `sample_by_chunk`.

    Returns:
      (videos [count, 21, 24, 24, 3] in [0, 1], their captions).
    """
    captions = list(CAPTIONS) * (count // len(CAPTIONS))
    shape = SpaceToDepth().latent_shape(*SpaceToDepth.default_size)
    noise = np.concatenate([initial_noise(seed, count // 2, shape) for seed in (0, 1)])
    videos = []
    for start in tqdm(range(0, count, 2 * len(CAPTIONS)), desc=description, unit="batch"):
        part = slice(start, start + 2 * len(CAPTIONS))
        text = WordVectors()(captions[part])
        inputs = text, WordVectors()([""] * len(text)), noise[part]
        latents = sample_by_chunk(model, *inputs, **solver) if by_chunk else generate_latents(model, *inputs, **solver)
        videos.append(np.asarray(SpaceToDepth().decode(latents)))
    return np.concatenate(videos), captions


def export_difference(student: WanTransformer, exported: Path) -> float:
    """Largest absolute difference between the velocities of the JAX student and of its export in PyTorch."""
    import torch

    from rehyat_jax.pytorch.rehyat_torch import load_student

    ((batch, key),) = held_out_batches(1)
    latents = jax.random.normal(key, batch["latents"].shape)
    timestep = jnp.linspace(1.0, 999.0, len(latents))
    # PyTorch runs on the CPU in float32; a GPU's default products of float32 arrays are less precise.
    with jax.default_matmul_precision("highest"):
        ours = np.asarray(student(latents, timestep, jnp.asarray(batch["text"])))

    transformer = load_student(exported)
    with torch.no_grad():
        theirs = transformer(
            torch.tensor(np.asarray(latents)).permute(0, 4, 1, 2, 3),
            torch.tensor(np.asarray(timestep)),
            torch.tensor(batch["text"]),
        ).sample.permute(0, 2, 3, 4, 1)
    return float(np.abs(ours - theirs.numpy()).max())
