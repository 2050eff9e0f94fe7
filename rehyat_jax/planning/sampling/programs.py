"""The programs of sampling as they run, with shapes and shardings in place of arrays.

Sampling has three parts, which take turns in a device's memory. Each part repeats one program:

- text_encoder: umT5 encodes a prompt;
- transformer: a step of the solver, or with `stream` a step of one part of the video;
- vae: Wan's VAE decodes one latent frame.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from rehyat_jax.diffusion.samplers import Coefficients, SolverState, coefficient_table
from rehyat_jax.diffusion.sigma_grid import wan_grid
from rehyat_jax.generation.generate import conditional_step, guided_step
from rehyat_jax.generation.streaming import PART_CHUNKS, part_step
from rehyat_jax.generation.wan_codec import default_dtype
from rehyat_jax.models.umt5.config import UMT5Config
from rehyat_jax.models.umt5.modeling import UMT5Encoder, apply_encoder
from rehyat_jax.models.wan.config import WanConfig
from rehyat_jax.models.wan.modeling import WanTransformer
from rehyat_jax.models.wan.quantized import Numbers, quantized, unit_ranges
from rehyat_jax.models.wan.streaming import initial_states, part_positions
from rehyat_jax.models.wan_vae.config import WanVaeConfig
from rehyat_jax.models.wan_vae.modeling import WanAutoencoder
from rehyat_jax.models.wan_vae.places import Places
from rehyat_jax.models.wan_vae.vae import StreamState, decode_stream, initial_decoder_state
from rehyat_jax.parallel.mesh import check_batch, check_heads, make_mesh
from rehyat_jax.parallel.sharding import abstract_arrays, check_divisible, param_specs, shardings

DTYPE = jnp.bfloat16
"""The compute dtype of the text encoder and the transformer."""


class AbstractProgram(NamedTuple):
    """A jitted function and its abstract arguments, sharded along the mesh in use.

    Attributes:
      function: the jitted function.
      static: its first arguments, which are no arrays.
      arguments: the other arguments by kind, in their order.
    """

    function: Any
    static: tuple[Any, ...]
    arguments: dict[str, Any]

    def lower(self) -> jax.stages.Lowered:
        return self.trace().lower()

    def trace(self) -> jax.stages.Traced:
        return self.function.trace(*self.static, *self.arguments.values())


def _abstract_module(make: Callable[[], nnx.Module]) -> tuple[nnx.GraphDef, Any]:
    """(graph definition, parameters with their shardings) of a module."""
    graphdef, state = nnx.split(nnx.eval_shape(make))
    mesh, specs, params = jax.sharding.get_mesh(), param_specs(state), nnx.to_pure_dict(state)
    check_divisible(params, specs, mesh)
    return graphdef, abstract_arrays(params, shardings(specs))


def _whole(tree: Any) -> Any:
    """Shapes of arrays that every device has completely."""
    everywhere = shardings(PartitionSpec())
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x), sharding=everywhere), tree)


def _array(*shape: int, dtype: Any = jnp.float32) -> Any:
    return _whole(jax.ShapeDtypeStruct(shape, dtype))


def text_encoder(*, model: UMT5Config, tokens: int) -> AbstractProgram:
    """umT5 on one prompt."""
    graphdef, params = _abstract_module(lambda: UMT5Encoder(model, rngs=nnx.Rngs(0), dtype=DTYPE))
    arguments = {"weights": params, "tokens": _array(1, tokens, dtype=jnp.int32), "mask": _array(1, tokens, dtype=bool)}
    return AbstractProgram(jax.jit(apply_encoder(graphdef)), (), arguments)


def transformer(
    *, model: WanConfig, latents: Sequence[int], guided: bool, stream: bool, quantize: Numbers | None = None
) -> AbstractProgram:
    """A step of the solver for one video.

    Args:
      model: the architecture.
      latents: frames, height and width of the video's latents.
      guided: evaluate the model with the prompt and with the negative prompt.
      stream: only for the first part of the video. Later parts have the same program, but for a last one that is
        shorter.
      quantize: the numbers of `models.wan.quantized`; None for a model in the compute dtype.
    """
    mesh, videos = jax.sharding.get_mesh(), 2 if guided else 1
    check_batch(mesh, videos)
    check_heads(mesh, model.num_heads)

    def make() -> WanTransformer:
        made = WanTransformer(model, rngs=nnx.Rngs(0), dtype=DTYPE, param_dtype=DTYPE)
        return made if quantize is None else quantized(made, quantize, unit_ranges(model.num_layers))

    graphdef, params = _abstract_module(make)
    frames, height, width = latents
    frames = part_frames(model, frames) if stream else frames
    history = SolverState(*[_array(1, frames, height, width, model.in_channels)] * 4)
    step = _whole(Coefficients(*(column[0] for column in coefficient_table(wan_grid(2, 5.0), "unipc"))))
    text = _array(1, model.text_length, model.text_dim)
    conditions = (text, text, _array()) if guided else (text,)
    if not stream:
        function = guided_step if guided else conditional_step
        texts = dict(zip(("text", "negative text", "guidance"), conditions, strict=False))
        return AbstractProgram(function, (graphdef,), {"weights": params, "latents": history, "step": step} | texts)
    patch_frames, patch_height, patch_width = model.patch_size
    tokens = height // patch_height * (width // patch_width)
    make_states = functools.partial(initial_states, model, videos, tokens, DTYPE)
    arguments = {
        "weights": params,
        "attention states": _whole(jax.eval_shape(make_states)),
        "latents": history,
        "step": step,
        "positions": _whole(part_positions(0, frames // patch_frames, model.head_dim)),
        "text": conditions,
    }
    return AbstractProgram(part_step, (graphdef, False), arguments)


def part_frames(model: WanConfig, frames: int) -> int:
    """Latent frames of a part of a streamed video."""
    return min(frames, PART_CHUNKS * model.block_forms.chunk_frames * model.patch_size[0])


def vae(*, model: WanVaeConfig, latents: Sequence[int]) -> AbstractProgram:
    """Decoding of one latent frame of (frames, height, width), whose rows all devices share."""
    _, height, width = latents
    dtype = jnp.dtype(default_dtype())
    graphdef, params = _abstract_module(lambda: WanAutoencoder(model, rngs=nnx.Rngs(0), dtype=dtype))
    make_state = functools.partial(initial_decoder_state, graphdef, batch=1, height=height, width=width)
    caches, placed = jax.eval_shape(make_state, params).caches, shardings(Places.of(1, height, width).spec)
    arguments = {
        "weights": params,
        "latents": _array(1, 1, height, width, model.z_dim),
        "cached frames": StreamState(_array(dtype=bool), tuple(abstract_arrays(list(caches), [placed] * len(caches)))),
    }
    return AbstractProgram(decode_stream, (graphdef,), arguments)


class Part(NamedTuple):
    """A part of sampling: its program, and the class of its `model`, whose `from_dict` reads it from JSON."""

    program: Callable[..., AbstractProgram]
    config: Any


PARTS = {
    "text_encoder": Part(text_encoder, UMT5Config),
    "transformer": Part(transformer, WanConfig),
    "vae": Part(vae, WanVaeConfig),
}
"""The parts of sampling, in the order in which they run."""


def abstract_program(part: str, model: dict[str, Any], **sizes: Any) -> AbstractProgram:
    """The program of a part on the mesh in use, from a JSON-ready description.

    Raises:
      InputError: the mesh cannot shard the part.
    """
    return PARTS[part].program(model=PARTS[part].config.from_dict(model), **sizes)


def mesh_of(devices: Sequence[jax.Device], sizes: dict[str, int]) -> Mesh:
    """A mesh of the first of these devices; `sizes` are those of all axes."""
    return make_mesh(sizes, devices[: math.prod(sizes.values())])


def lowered(devices: Sequence[jax.Device], *, mesh: dict[str, int], **case: Any) -> jax.stages.Lowered:
    """The program on a mesh of these devices; `cost_model.tpu_compile` compiles it."""
    with jax.set_mesh(mesh_of(devices, mesh)):
        return abstract_program(**case).lower()
