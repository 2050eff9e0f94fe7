"""The parts of a video that sampling takes one after another, and what is common to the ways through them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rehyat_jax.diffusion.samplers import VelocityFn
from rehyat_jax.errors import InputError
from rehyat_jax.generation.guidance import guided_velocity
from rehyat_jax.models.wan.config import WanConfig
from rehyat_jax.models.wan.modeling import WanTransformer
from rehyat_jax.models.wan.streaming import PartPositions, part_positions
from rehyat_jax.parallel.memory import check_step_memory

Array = jax.Array


class Part(NamedTuple):
    """A part of a video: its latent frames, the grid of its tokens, its positions, and if it is the last one."""

    frames: slice
    grid: tuple[int, int, int]
    positions: PartPositions
    is_last: bool


class Video(NamedTuple):
    """The videos to sample, of `shape` [B, T, H, W, C], and the model that samples them; made by `video_in_parts`.

    The conditions are the text, or both texts and the guidance scale.
    """

    graphdef: nnx.GraphDef
    params: nnx.State
    config: WanConfig
    dtype: jnp.dtype
    conditions: tuple[Array, ...]
    shape: tuple[int, ...]
    parts: list[Part]

    @property
    def evaluated(self) -> int:
        """Videos that the model evaluates at once: guidance evaluates each twice."""
        return self.shape[0] * (1 if len(self.conditions) == 1 else 2)

    @property
    def tokens_per_frame(self) -> int:
        _, height, width = self.parts[0].grid
        return height * width


def video_in_parts(
    model: WanTransformer,
    text: Array,
    negative_text: Array,
    noise: np.ndarray,
    *,
    guidance_scale: float,
    before: np.ndarray | None,
    part_chunks: int,
    longest: int | None,
) -> Video:
    """The video that noise [B, T, H, W, C] becomes, in parts of at most `part_chunks` chunks of every block's form.

    Args:
      model, text, negative_text, guidance_scale, before, longest: see `rehyat_jax.generation.streaming.stream_latents`.

    Raises:
      InputError: `before` does not fit `noise`.
    """
    if before is not None:
        _check_before(before.shape, noise.shape)
    graphdef, params = nnx.split(model)
    conditions = (text,) if guidance_scale == 1 else (text, negative_text, np.float32(guidance_scale))
    parts = _parts(model.config, noise.shape, part_chunks, longest)
    return Video(graphdef, params, model.config, model.dtype, conditions, noise.shape, parts)


def _parts(config: WanConfig, shape: tuple[int, ...], part_chunks: int, longest: int | None) -> list[Part]:
    _, frames, height, width, _ = shape
    patch_frames, patch_height, patch_width = config.patch_size
    if longest is not None:
        part_chunks = max(1, min(part_chunks, longest // config.block_forms.chunk_frames))
    part_frames = part_chunks * config.block_forms.chunk_frames * patch_frames

    def part(begin: int) -> Part:
        end = min(begin + part_frames, frames)
        first, count = begin // patch_frames, (end - begin) // patch_frames
        positions = part_positions(first, count, config.head_dim, longest=longest)
        return Part(slice(begin, end), (count, height // patch_height, width // patch_width), positions, end == frames)

    return [part(begin) for begin in range(0, frames, part_frames)]


def _check_before(before: tuple[int, ...], noise: tuple[int, ...]) -> None:
    videos, frames, *rest = noise
    if len(before) != 5 or (before[0], *before[2:]) != (videos, *rest) or not 0 < before[1] < frames:
        raise InputError(
            f"the video to continue: expected latents [{videos}, 1 to {frames - 1}, {', '.join(map(str, rest))}], "
            f"fewer frames than the result and otherwise of its size, found {list(before)}"
        )


def check_part_memory(program: Any, video: Video, part: Part, *arguments: Any) -> None:
    """Compiles a program, whose first call reuses it. Raises InputError if it does not fit into memory."""
    if part is not video.parts[0] and part is not video.parts[-1]:
        return
    videos, _, height, width, _ = video.shape
    check_step_memory(
        program.lower(*arguments).compile(),
        f"a part of {videos} videos, {part.frames.stop - part.frames.start} latent frames of {height}x{width}",
        "stream fewer chunks at once, or fewer or smaller videos",
    )


def velocity_fn(model: Any, conditions: tuple[Array, ...]) -> VelocityFn:
    """The model's velocity with its texts; guided, if there are two of them and a guidance scale."""
    if len(conditions) > 1:
        return guided_velocity(model, *conditions)
    return lambda latents, timestep: model(latents, timestep, *conditions)
