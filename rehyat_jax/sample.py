"""Samples videos: python -m rehyat_jax.sample --checkpoint DIR --prompt TEXT --out FILE.mp4 [options].

The checkpoint, a model checkpoint or a PyTorch folder, names its codec and text encoder. Defaults are those of Wan2.1
text to video: 50 UniPC steps, flow shift 5, guidance 5, and the size that the codec's models were made for.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from rehyat_jax.cli import report_input_errors
from rehyat_jax.codecs import get_codec
from rehyat_jax.diffusion.generate import generate, initial_noise, latent_shape
from rehyat_jax.errors import InputError
from rehyat_jax.parallel.mesh import AXES, check_batch, check_heads, make_mesh
from rehyat_jax.text_encoders import get_text_encoder
from rehyat_jax.video import write_mp4
from rehyat_jax.weights import load_wan, read_model_metadata

WATCHABLE_HEIGHT = 240
"""Smaller videos are enlarged a whole number of times, to at most this many pixels."""


def sample(arguments: argparse.Namespace) -> list[Path]:
    """Samples and writes what the command line asks for; returns the files.

    Raises:
      InputError: the checkpoint, the size, the prompt or the output's place is wrong.
    """
    files = output_files(arguments.out, arguments.batch)
    config, metadata = read_model_metadata(arguments.checkpoint)
    codec, text_encoder = get_codec(metadata["codec"]), get_text_encoder(metadata["text_encoder"])
    asked_size = arguments.frames, arguments.height, arguments.width
    size = [asked or default for asked, default in zip(asked_size, codec.default_size, strict=True)]
    shape = latent_shape(config, codec, *size)

    mesh = make_mesh(dict.fromkeys(AXES, 1) | dict(arguments.mesh)) if arguments.mesh else None
    if mesh is not None:
        # Guidance evaluates every video twice at once.
        check_batch(mesh, arguments.batch * (1 if arguments.guidance_scale == 1 else 2))
        check_heads(mesh, config)
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        videos = generate(
            load_wan(arguments.checkpoint, dtype=jnp.dtype(arguments.dtype)),
            codec,
            text_encoder,
            [arguments.prompt] * arguments.batch,
            initial_noise(arguments.seed, arguments.batch, shape),
            negative_prompt=arguments.negative_prompt,
            steps=arguments.steps,
            guidance_scale=arguments.guidance_scale,
            flow_shift=arguments.flow_shift,
            sampler=arguments.sampler,
            progress=True,
        )

    videos = np.asarray(videos)
    if not np.isfinite(videos).all():
        raise InputError(
            f"{arguments.checkpoint}: expected finite videos, found NaN or infinity; the model's training may have "
            f"diverged, or --guidance-scale {arguments.guidance_scale} is too large"
        )

    scale = max(1, WATCHABLE_HEIGHT // videos.shape[2])
    for file, video in zip(files, videos, strict=True):
        write_mp4(file, video, fps=codec.fps, scale=scale)
        print(f"wrote {file}: {len(video)} frames of {video.shape[1]}x{video.shape[2]}, enlarged {scale} times")
    return files


def output_files(out: Path, batch: int) -> list[Path]:
    """`out` itself, or for several videos out_0.mp4, out_1.mp4 and so on. Makes the directory, to fail before sampling.

    Raises:
      InputError: not an MP4 file, or a place that cannot be written to.
    """
    if out.suffix != ".mp4":
        raise InputError(f"--out {out}: expected a file name that ends in .mp4, found {out.name!r}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out}: cannot make its directory ({error}); choose another place") from error
    if not os.access(out.parent, os.W_OK):
        raise InputError(f"--out {out}: its directory is not writable; choose another place")
    return [out] if batch == 1 else [out.with_stem(f"{out.stem}_{index}") for index in range(batch)]


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


def axis_and_size(text: str) -> tuple[str, int]:
    """An argparse type: a mesh axis and its size, as in "context=4"."""
    axis, _, size = text.partition("=")
    if axis not in AXES or not size.lstrip("-").isdigit():
        raise argparse.ArgumentTypeError(f"expected AXIS=DEVICES with an axis of {', '.join(AXES)}, found {text!r}")
    return axis, int(size)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line; argparse itself exits with code 2 on a wrong one."""
    parser = argparse.ArgumentParser(prog="python -m rehyat_jax.sample", description="Samples videos from a prompt.")
    option = parser.add_argument
    default = " (default: %(default)s)"
    option("--checkpoint", type=Path, required=True, help="model checkpoint, or PyTorch folder of either layout")
    option("--prompt", required=True, help="what to show")
    option("--out", type=Path, required=True, help="the .mp4 file; with --batch, a number is added to its name")
    option("--negative-prompt", default="", help="what to move away from (default: the empty prompt)")
    option("--seed", type=number(int, 0, 2**32 - 1), default=0, help="of the initial noise" + default)
    option("--steps", type=number(int, 1, 10_000), default=50, help="evaluations of the model" + default)
    option("--guidance-scale", type=number(float, 0, 1000), default=5.0, help="1 turns guidance off" + default)
    option(
        "--flow-shift", type=number(float, 0.001, 1000), default=5.0, help="above 1, more steps near noise" + default
    )
    option("--sampler", choices=("unipc", "euler"), default="unipc", help="solver of the flow" + default)
    option("--frames", type=number(int, 1, 10_000), help="of the video (default: the codec's)")
    option("--height", type=number(int, 1, 10_000), help="in pixels (default: the codec's)")
    option("--width", type=number(int, 1, 10_000), help="in pixels (default: the codec's)")
    option("--batch", type=number(int, 1, 10_000), default=1, help="videos, each from its own noise" + default)
    option("--dtype", choices=("float32", "bfloat16"), default="float32", help="the transformer computes in" + default)
    option(
        "--mesh",
        nargs="+",
        type=axis_and_size,
        metavar="AXIS=DEVICES",
        help="cut the work along data, fsdp, context or tensor over all devices, e.g. context=4 (default: one device)",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and samples; returns the exit code, 2 when the user's input is wrong."""
    arguments = parse_arguments(argv)
    return report_input_errors(lambda: sample(arguments))


if __name__ == "__main__":
    sys.exit(main())
