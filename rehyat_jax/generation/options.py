"""The options of commands that sample from a model."""

import argparse
import dataclasses
import re
from collections.abc import Callable, Collection
from typing import Any, Literal, get_args

from rehyat_jax.diffusion.samplers import Sampler
from rehyat_jax.errors import InputError
from rehyat_jax.models.wan.quantized import INPUTS, Numbers
from rehyat_jax.parallel.mesh import AXES

SIZES = {"480p": (480, 832), "720p": (720, 1280)}
"""(height, width) of the sizes that Wan2.1 is made for."""


WAN: dict[str, Any] = {"steps": 50, "guidance_scale": 5.0, "sampler": "unipc"}
"""Wan2.1's solver, for models without an own one."""

DEFAULT_SHIFT = 5.0
"""The flow shift of models without an own one, if no scheduler says another."""

Order = Literal["video", "chunks"]
"""Order of sampling: every step on the complete video, or all steps on one chunk after another."""


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """Options of sampling: everything except the model, the prompts and the place of the result.

    None stands for the pipeline's own value, which `Pipeline` fills in: that of a model of few steps, or Wan2.1's.

    Attributes:
      negative_prompt: the prompt to move away from.
      seed: seed of the initial noise, 0 to 2**32 - 1.
      steps, guidance_scale, sampler: see `rehyat_jax.generation.generate.generate`.
      flow_shift: likewise; None also for that of the pipeline's scheduler.
      frames, height, width: size of the videos, height and width in pixels; None for the codec's default.
      batch: number of videos that are sampled at once.
      dtype: compute dtype of the transformer, and of the weights that it multiplies by; None for the codec's default.
      vae_dtype: compute dtype of Wan's VAE; None for `wan_codec.default_dtype`.
      vae_tile: side in pixels of the tiles in which Wan's VAE codes larger frames, a multiple of 32; None for whole
        frames. See `rehyat_jax.models.wan_vae.vae.WanVae.decode`.
      stream: keep only a part of the video on the device; see `rehyat_jax.generation.streaming`.
      order: "chunks" finishes a chunk before the next one begins, see `rehyat_jax.generation.chunks`. None is "chunks"
        for a model that was trained with a noise level for every chunk, unless `stream` is True.
      longest: of videos in parts, see `rehyat_jax.models.wan.streaming.part_positions`; None for no limit.
      mesh: sizes of mesh axes; empty for one device.
      quantize: "int8" or "fp8" for products of such numbers in the blocks, see `rehyat_jax.models.wan.quantized`; None
        for those of `dtype`.
      exact: names of layers that `quantize` leaves as they are.
      guidance_every: evaluate the negative prompt at every so many steps only, see `rehyat_jax.generation.reuse`.
      step_cache: threshold of the estimated error below which a step skips the blocks, likewise; None skips none.
    """

    negative_prompt: str = ""
    seed: int = 0
    steps: int | None = None
    guidance_scale: float | None = None
    flow_shift: float | None = None
    sampler: Sampler | None = None
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    batch: int = 1
    dtype: str | None = None
    vae_dtype: str | None = None
    vae_tile: int | None = None
    stream: bool = False
    order: Order | None = None
    longest: int | None = None
    mesh: tuple[tuple[str, int], ...] = ()
    quantize: Numbers | None = None
    exact: tuple[str, ...] = ()
    guidance_every: int = 1
    step_cache: float | None = None

    @property
    def in_parts(self) -> bool:
        """True if the device holds a part of the video only."""
        return self.stream or self.order == "chunks"

    @property
    def approximations(self) -> dict[str, Any]:
        """The options that make samples cheaper and change them, by name; empty if there are none."""
        used: dict[str, Any] = {"quantize": self.quantize, "step_cache": self.step_cache}
        used = {name: value for name, value in used.items() if value is not None}
        used |= {"exact": list(self.exact)} if self.exact else {}
        return used | ({"guidance_every": self.guidance_every} if self.guidance_every > 1 else {})

    @classmethod
    def add_to(
        cls,
        parser: argparse.ArgumentParser,
        defaults: "SamplingOptions | None" = None,
        *,
        without: Collection[str] = (),
    ) -> None:
        """Adds an option for each field.

        Args:
          parser: the parser of a command.
          defaults: the command's own defaults.
          without: fields of "negative_prompt" and "seed" that the command reads in another way.
        """
        defaults = defaults or cls()
        parser.set_defaults(**dataclasses.asdict(defaults))
        option = parser.add_argument
        default = " (default: %(default)s)"
        if "negative_prompt" not in without:
            option("--negative-prompt", help="what to move away from (default: the empty prompt)")
        if "seed" not in without:
            option("--seed", type=number(int, 0, 2**32 - 1), help="of the initial noise" + default)
        own = lambda name, words: default if getattr(defaults, name) is not None else f" (default: {words})"
        steps, scale, sampler = (own(name, f"the model's own, or {WAN[name]}") for name in WAN)
        option("--steps", type=number(int, 1, 10_000), help="evaluations of the model" + steps)
        option("--guidance-scale", type=number(float, 0, 1000), help="1 turns guidance off" + scale)
        shift = own("flow_shift", f"the model's own, that of the pipeline's scheduler, or {DEFAULT_SHIFT:g}")
        option("--flow-shift", type=number(float, 0.001, 1000), help="above 1, more steps near noise" + shift)
        option("--sampler", choices=get_args(Sampler), help="solver of the flow" + sampler)
        option("--frames", type=number(int, 1, 10**9), help="of the video (default: the codec's)")
        option("--size", type=size, metavar="480p|720p|HxW", help="height and width in pixels (default: the codec's)")
        option("--height", type=number(int, 1, 10_000), help="in pixels, in place of --size")
        option("--width", type=number(int, 1, 10_000), help="in pixels, in place of --size")
        option("--batch", type=number(int, 1, 10_000), help="videos that are sampled at once" + default)
        dtype = "compute dtype of the transformer (default: float32 for the demo's models, else bfloat16)"
        option("--dtype", choices=("float32", "bfloat16"), help=dtype)
        dtype = "compute dtype of Wan's VAE (default: bfloat16 on TPUs, float32 elsewhere)"
        option("--vae-dtype", choices=("float32", "bfloat16"), help=dtype)
        tile = "side in pixels of overlapping tiles in which Wan's VAE codes larger frames, e.g. 256 (default: none)"
        option("--vae-tile", type=number(int, 32, 8192, multiple_of=32), metavar="PIXELS", help=tile)
        option(
            "--mesh",
            nargs="+",
            type=axis_and_size,
            metavar="AXIS=DEVICES",
            help="shard along data, fsdp, context or tensor over all devices, e.g. context=4 (default: one device)",
        )
        numbers = "multiply numbers of 8 bits in the blocks (default: those of --dtype)"
        option("--quantize", choices=get_args(Numbers), help=numbers)
        exact = "layers that --quantize leaves exact, such as feed_forward.down (default: none)"
        option("--exact", nargs="+", choices=tuple(INPUTS), metavar="LAYER", help=exact)
        every = "evaluate the negative prompt at every N-th step only" + default
        option("--guidance-every", type=number(int, 1, 10_000), metavar="N", help=every)
        cache = "skip the blocks at steps with an estimated error below this, e.g. 0.12 (default: skip none)"
        option("--step-cache", type=number(float, 0, 1000), metavar="ERROR", help=cache)

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> "SamplingOptions":
        """The options of a command line that `add_to` described. Raises InputError if it has two sizes."""
        values = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(cls)}
        if arguments.size is not None:
            if arguments.height is not None or arguments.width is not None:
                raise InputError("--size: expected without --height and --width, found both; give one of them")
            values |= dict(zip(("height", "width"), arguments.size, strict=True))
        return cls(**values | {name: tuple(getattr(arguments, name)) for name in ("mesh", "exact")})


def number(kind: type, minimum: float, maximum: float, *, multiple_of: int | None = None) -> Callable[[str], float]:
    """An argparse type: a number of `kind` within the bounds."""

    def parse(text: str) -> float:
        multiple = f", a multiple of {multiple_of}" if multiple_of else ""
        expected = f"expected {kind.__name__} from {minimum} to {maximum}{multiple}, found {text!r}"
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(expected) from None
        if not minimum <= value <= maximum or (multiple_of and value % multiple_of):
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
