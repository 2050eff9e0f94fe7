"""Prompts to videos: encode the text, integrate the guided flow from noise, decode the latents."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from rehyat_jax.diffusion.samplers import (
    Coefficients,
    Sampler,
    SolverState,
    coefficient_table,
    initial_state,
    solver_step,
    with_fresh_noise,
)
from rehyat_jax.diffusion.sigma_grid import wan_grid
from rehyat_jax.errors import InputError
from rehyat_jax.generation.codecs import Codec
from rehyat_jax.generation.guidance import guided_velocity
from rehyat_jax.generation.reuse import BlockReuse, Call, GuidanceReuse
from rehyat_jax.generation.streaming import stream_latents
from rehyat_jax.generation.text_encoders import TextEncoder
from rehyat_jax.models.wan.config import WanConfig
from rehyat_jax.models.wan.modeling import WanTransformer, apply_model
from rehyat_jax.parallel.memory import check_step_memory

Array = jax.Array


def generate(
    model: WanTransformer,
    codec: Codec,
    text_encoder: TextEncoder,
    prompts: Sequence[str],
    noise: Array,
    *,
    negative_prompt: str = "",
    steps: int = 50,
    guidance_scale: float = 5.0,
    flow_shift: float = 5.0,
    sampler: Sampler = "unipc",
    stream: bool = False,
    progress: bool = False,
) -> Array:
    """One video for every prompt. The defaults are Wan2.1's for text to video.

    Two models with the same noise sample the same videos as far as they agree.

    Args:
      model: softmax or hybrid; it runs in its own compute dtype, everything around it in float32.
      codec, text_encoder: those the model was trained with.
      prompts: B prompts.
      noise: [B, T, H, W, C] float32 standard normal; see `initial_noise`. Its shape decides the size of the videos.
      negative_prompt: the prompt to move away from, the same for all prompts.
      steps: evaluations of the guided model.
      guidance_scale: 1 turns guidance off, and `negative_prompt` with it.
      flow_shift: see `rehyat_jax.diffusion.flow.shift_sigma`.
      sampler: "unipc" or "euler"; "renoise" for models of few steps (`rehyat_jax.diffusion.samplers`).
      stream: keep only a part of the video on the device, see `stream_latents`. For videos of any length.
      progress: show the rate and the remaining time.

    Returns:
      [B, frames, height, width, 3] float32 in [0, 1].
    """
    text = jnp.asarray(text_encoder(prompts))
    negative_text = jnp.asarray(text_encoder([negative_prompt] * len(prompts)))
    solver = dict(steps=steps, guidance_scale=guidance_scale, flow_shift=flow_shift, sampler=sampler, progress=progress)
    if stream:
        return codec.decode(stream_latents(model, text, negative_text, np.asarray(noise), **solver))
    return codec.decode(generate_latents(model, text, negative_text, noise, **solver))


def generate_latents(
    model: WanTransformer,
    text: Array,
    negative_text: Array,
    noise: Array,
    *,
    steps: int,
    guidance_scale: float,
    flow_shift: float,
    sampler: Sampler = "unipc",
    guidance_every: int = 1,
    skipped: Sequence[bool] | None = None,
    progress: bool = False,
    on_step: Callable[[int, Coefficients, Array], None] | None = None,
) -> Array:
    """`generate` from embedded prompts [B, L, text_dim] to latents [B, T, H, W, C], for encoders used elsewhere.

    A step is compiled once for each model architecture and shape, and later calls reuse it. Before each step,
    `on_step` gets its number, its coefficients (sigma and timestep among them), and the latents [B, T, H, W, C] that
    the model will see.

    Args:
      guidance_every: evaluate the negative prompt at every so many steps only, see `rehyat_jax.generation.reuse`.
      skipped: True for every step that leaves out the blocks, see `reuse.skipped_steps`; None skips none.

    Raises:
      InputError: the arrays of a step do not fit into memory.
      ValueError: both `guidance_every` and `skipped` are given.
    """
    if guidance_every > 1 and skipped is not None:
        raise ValueError("expected guidance_every or skipped, found both")
    graphdef, params = nnx.split(model)
    table = coefficient_table(wan_grid(steps, flow_shift), sampler, noise.dtype)
    state = initial_state(noise)
    conditions: tuple[Any, ...] = (text,) if guidance_scale == 1 else (text, negative_text, guidance_scale)
    advance: Advance
    if skipped is not None:
        advance = BlockReuse(graphdef, params, conditions, skipped)
    elif guidance_every > 1 and guidance_scale != 1:
        advance = GuidanceReuse(graphdef, params, conditions, guidance_every)
    else:
        advance = _EveryStep(graphdef, params, conditions)
    for index in tqdm(range(steps), desc="sampling", unit="step", disable=not progress):
        step = Coefficients(*(column[index] for column in table))
        if on_step is not None:
            on_step(index, step, state.latents)
        program, arguments = advance.call(index, state, step)
        if index == 0:
            _check_memory(program, state, arguments)
        state = advance.after(program(*arguments))
        if step.fresh:
            state = state._replace(latents=with_fresh_noise(state.latents, noise, index, step.fresh))
        # JAX returns before the device is done; without waiting, the bar would show how fast steps are queued.
        jax.block_until_ready(state)
    return state.latents


def latent_shape(config: WanConfig, codec: Codec, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
    """(T, H, W, C) of the latents of a video that both the codec and the model can represent.

    Raises:
      InputError: the codec's strides or the model's patches don't divide the size, or their channels differ.
    """
    *size, channels = codec.latent_shape(frames, height, width)
    if channels != config.in_channels:
        raise InputError(
            f"the model has in_channels {config.in_channels}, but its codec {type(codec).__name__} makes latents of "
            f"{channels} channels; name the codec that the model was trained with"
        )
    for axis, latent, patch, pixels in zip(
        ("frames", "height", "width"), size, config.patch_size, (frames, height, width), strict=True
    ):
        if latent % patch:
            raise InputError(
                f"{axis} {pixels}: expected a latent {axis} that is a multiple of the model's patch size {patch}, "
                f"found {latent}; choose a multiple of {pixels // latent * patch}"
            )
    return *size, channels


class Advance(Protocol):
    """How the steps of one batch are computed: `_EveryStep`, or with reuse of earlier steps."""

    def call(self, index: int, state: SolverState, step: Coefficients) -> Call:
        """The jitted program of step `index`, and its arguments."""

    def after(self, result: Any) -> SolverState:
        """The solver's state in the program's result."""


class _EveryStep:
    """Evaluates the complete model at every step."""

    def __init__(self, graphdef: nnx.GraphDef, params: nnx.State, conditions: tuple[Any, ...]):
        self._model, self._conditions = (graphdef, params), conditions

    def call(self, index: int, state: SolverState, step: Coefficients) -> Call:
        del index
        program = conditional_step if len(self._conditions) == 1 else guided_step
        return program, (*self._model, state, step, *self._conditions)

    def after(self, result: Any) -> SolverState:
        return result


def _check_memory(program: Any, state: SolverState, arguments: tuple[Any, ...]) -> None:
    """Compiles a step, whose first call reuses the program. Raises InputError if it does not fit into memory."""
    batch, *latents = state.latents.shape
    check_step_memory(
        program.lower(*arguments).compile(),
        f"a step with {batch} videos, each of latents {'x'.join(map(str, latents))}",
        "sample fewer or smaller videos at once",
    )


@functools.partial(jax.jit, static_argnums=0)
def conditional_step(
    graphdef: nnx.GraphDef, params: nnx.State, state: SolverState, step: Coefficients, text: Array
) -> SolverState:
    """One step of the solver without guidance."""
    model = functools.partial(apply_model(graphdef), params)
    return solver_step(lambda latents, timestep: model(latents, timestep, text), state, step)


@functools.partial(jax.jit, static_argnums=0)
def guided_step(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    state: SolverState,
    step: Coefficients,
    text: Array,
    negative_text: Array,
    guidance_scale: Array,
) -> SolverState:
    """One step of the solver with guidance."""
    model = functools.partial(apply_model(graphdef), params)
    return solver_step(guided_velocity(model, text, negative_text, guidance_scale), state, step)
