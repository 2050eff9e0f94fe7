"""The options of commands that sample from a model, and the model that they name."""

import argparse
import contextlib
import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp

from rehyat_jax.diffusion.samplers import Sampler
from rehyat_jax.errors import InputError
from rehyat_jax.generation.codecs import Codec
from rehyat_jax.generation.generate import latent_shape
from rehyat_jax.generation.opening import get_codec, get_text_encoder
from rehyat_jax.generation.text_encoders import TextEncoder
from rehyat_jax.models.wan.modeling import WanTransformer
from rehyat_jax.models.wan.streaming import check_streams
from rehyat_jax.parallel.memory import check_device_memory
from rehyat_jax.parallel.mesh import AXES, check_batch, check_heads, make_mesh
from rehyat_jax.weights import load_wan, read_model_metadata
from rehyat_jax.weights.models import spec_of

SIZES = {"480p": (480, 832), "720p": (720, 1280)}
"""Height and width of the sizes that Wan was trained for."""


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """Options of sampling: everything except the model, the prompts and the place of the result.

    Attributes:
      negative_prompt: the prompt to move away from.
      seed: seed of the initial noise, 0 to 2**32 - 1.
      steps, guidance_scale, flow_shift, sampler: see `rehyat_jax.generation.generate.generate`.
      frames, height, width: size of the videos, height and width in pixels; None for the codec's default.
      batch: number of videos that are sampled at once.
      dtype: compute dtype of the transformer.
      stream: keep only a part of the video on the device; see `rehyat_jax.generation.streaming`.
      mesh: sizes of mesh axes; empty for one device.
    """

    negative_prompt: str = ""
    seed: int = 0
    steps: int = 50
    guidance_scale: float = 5.0
    flow_shift: float = 5.0
    sampler: Sampler = "unipc"
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    batch: int = 1
    dtype: str = "float32"
    stream: bool = False
    mesh: tuple[tuple[str, int], ...] = ()

    @classmethod
    def add_to(cls, parser: argparse.ArgumentParser) -> None:
        """Adds an option for each field."""
        parser.set_defaults(**dataclasses.asdict(cls()))
        option = parser.add_argument
        default = " (default: %(default)s)"
        option("--negative-prompt", help="what to move away from (default: the empty prompt)")
        option("--seed", type=number(int, 0, 2**32 - 1), help="of the initial noise" + default)
        option("--steps", type=number(int, 1, 10_000), help="evaluations of the model" + default)
        option("--guidance-scale", type=number(float, 0, 1000), help="1 turns guidance off" + default)
        option("--flow-shift", type=number(float, 0.001, 1000), help="above 1, more steps near noise" + default)
        option("--sampler", choices=get_args(Sampler), help="solver of the flow" + default)
        option("--frames", type=number(int, 1, 1_000_000), help="of the video (default: the codec's)")
        option("--height", type=number(int, 1, 10_000), help="in pixels (default: the codec's)")
        option("--width", type=number(int, 1, 10_000), help="in pixels (default: the codec's)")
        option("--batch", type=number(int, 1, 10_000), help="videos, each from its own noise" + default)
        option("--dtype", choices=("float32", "bfloat16"), help="compute dtype of the transformer" + default)
        option(
            "--mesh",
            nargs="+",
            type=axis_and_size,
            metavar="AXIS=DEVICES",
            help="shard along data, fsdp, context or tensor over all devices, e.g. context=4 (default: one device)",
        )

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> "SamplingOptions":
        """The options of a command line that `add_to` described."""
        values = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(cls)}
        return cls(**values | {"mesh": tuple(arguments.mesh)})

    @property
    def solver(self) -> dict[str, Any]:
        """Keyword arguments of `rehyat_jax.generation.generate.generate` and `generate_latents`."""
        return {name: getattr(self, name) for name in ("steps", "guidance_scale", "flow_shift", "sampler")}


class OpenedModel(NamedTuple):
    """The contents of a checkpoint, before its weights are read.

    Attributes:
      codec_name, text_encoder_name: their names in the checkpoint.
      codec, text_encoder: the objects of those names.
      latent_shape: (T, H, W, C) of the videos to sample.
      on_mesh: function that returns a context; within it, computation runs on the mesh of the options.
      load: function that reads the weights, to be called within `on_mesh`.
    """

    codec_name: str
    text_encoder_name: str
    codec: Codec
    text_encoder: TextEncoder
    latent_shape: tuple[int, int, int, int]
    on_mesh: Callable[[], contextlib.AbstractContextManager]
    load: Callable[[], WanTransformer]


def open_model(checkpoint: Path, options: SamplingOptions) -> OpenedModel:
    """Checks the options against a model checkpoint or a PyTorch folder.

    Raises:
      InputError: the checkpoint, the size or the mesh is wrong, or the videos cannot fit into memory.
    """
    config, metadata = read_model_metadata(checkpoint)
    codec, text_encoder = get_codec(metadata["codec"]), get_text_encoder(metadata["text_encoder"])
    if text_encoder.text_dim != config.text_dim or text_encoder.length > config.text_length:
        raise InputError(
            f"{checkpoint}: expected text_dim {text_encoder.text_dim} and a text_length of at least "
            f"{text_encoder.length}, which its text encoder {metadata['text_encoder']!r} makes, found "
            f"{config.text_dim} and {config.text_length}; name the text encoder that the model was trained with"
        )
    asked_size = options.frames, options.height, options.width
    size = [asked or default for asked, default in zip(asked_size, codec.default_size, strict=True)]
    shape = latent_shape(config, codec, *size)
    mesh = make_mesh(dict.fromkeys(AXES, 1) | dict(options.mesh)) if options.mesh else None
    # Guidance evaluates every video twice at once.
    evaluated = options.batch * (1 if options.guidance_scale == 1 else 2)
    if mesh is not None:
        check_batch(mesh, evaluated)
        check_heads(mesh, config.num_heads)
    devices = 1 if mesh is None else mesh.size
    itemsize = jnp.dtype(options.dtype).itemsize
    on_device, pixels = shape, math.prod(size)
    if options.stream:
        check_streams(config)
        if (devices := dict(options.mesh).get("context", 1)) != 1:
            raise InputError(
                f"--mesh context={devices} --stream: expected context=1, because the parts of a video follow one "
                f"another in time; shard along data or tensor, or sample without --stream"
            )
        on_device, pixels = (min(shape[0], config.block_forms.chunk_frames), *shape[1:]), 0
    check_device_memory(
        _least_bytes(config, on_device, options.batch, evaluated, pixels, itemsize) // devices,
        f"--batch {options.batch} --frames {size[0]} --height {size[1]} --width {size[2]}",
        "choose fewer or smaller videos",
        devices=devices,
    )
    on_mesh = lambda: contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)
    load = lambda: load_wan(checkpoint, dtype=jnp.dtype(options.dtype))
    return OpenedModel(metadata["codec"], metadata["text_encoder"], codec, text_encoder, shape, on_mesh, load)


def _least_bytes(
    config: Any, latent_shape: tuple[int, int, int, int], videos: int, evaluated: int, pixels: int, itemsize: int
) -> int:
    """Bytes that are in memory at once, at the least, while `videos` videos of `pixels` pixels are sampled.

    In a block, its input is there next to queries, keys and values, and next to the hidden layer of its MLP. Compilers
    fuse much, but none computes attention before it has all keys. A step takes two or more arrays of latents, and
    returns four.

    Args:
      config: architecture.
      latent_shape: (T, H, W, C) of a video.
      videos: videos sampled at once.
      evaluated: videos that the model evaluates at once.
      pixels: of all frames of a video.
      itemsize: bytes of a number in the compute dtype.
    """
    weights = sum(math.prod(row.stacked_shape) for row in spec_of(config).table(config))
    latents = videos * math.prod(latent_shape)
    tokens = math.prod(latent_shape[:3]) // math.prod(config.patch_size)
    text = config.text_length * (config.text_dim + config.width)
    activations = evaluated * (tokens * (config.width + max(3 * config.width, config.ffn_dim)) + text)
    return 4 * weights + max(8 * latents + itemsize * activations, 24 * latents, 4 * latents + 12 * videos * pixels)


def number(kind: type, minimum: float, maximum: float) -> Callable[[str], float]:
    """An argparse type: a number of `kind` within the bounds."""

    def parse(text: str) -> float:
        expected = f"expected {kind.__name__} from {minimum} to {maximum}, found {text!r}"
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(expected) from None
        if not minimum <= value <= maximum:
            raise argparse.ArgumentTypeError(expected)
        return value

    return parse


def size(text: str) -> tuple[int, int]:
    """An argparse type: (height, width) in pixels, as a name of `SIZES` or as in "480x832"."""
    if text in SIZES:
        return SIZES[text]
    if not (found := re.fullmatch(r"([1-9][0-9]{0,3})x([1-9][0-9]{0,3})", text)):
        raise argparse.ArgumentTypeError(f"expected {', '.join(SIZES)} or HEIGHTxWIDTH, as in 480x832, found {text!r}")
    return int(found[1]), int(found[2])


def axis_and_size(text: str) -> tuple[str, int]:
    """An argparse type: a mesh axis and its size, as in "context=4"."""
    axis, _, size = text.partition("=")
    if axis not in AXES or not re.fullmatch(r"-?[0-9]{1,9}", size):
        raise argparse.ArgumentTypeError(f"expected AXIS=DEVICES with an axis of {', '.join(AXES)}, found {text!r}")
    return axis, int(size)
