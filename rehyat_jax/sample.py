"""Samples videos: python -m rehyat_jax.sample --checkpoint DIR --prompt TEXT --out FILE.mp4 [options].

The checkpoint, a model checkpoint or a PyTorch folder, names its codec and text encoder. Defaults are those of Wan2.1
text to video: 50 UniPC steps, flow shift 5, guidance 5, and the size for which the codec's models were made. Without an
ffmpeg program, the frames are written to FILE.npy.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from rehyat_jax.cli import CommandParser, print_message, report_input_errors
from rehyat_jax.errors import InputError
from rehyat_jax.files.video import NoFfmpeg, find_ffmpeg, write_video
from rehyat_jax.files.write import check_place
from rehyat_jax.generation.generate import generate
from rehyat_jax.generation.noise import host_noise, initial_noise
from rehyat_jax.generation.options import SamplingOptions, open_model

WATCHABLE_HEIGHT = 240
"""Largest height, in pixels, to which smaller videos are enlarged by an integer factor."""


def sample(arguments: argparse.Namespace) -> list[Path]:
    """Samples videos with the options of the command line; returns the written files, .npy if ffmpeg is missing.

    Raises:
      InputError: the checkpoint, the size, the prompt or the output path is wrong.
    """
    options = SamplingOptions.from_arguments(arguments)
    files = output_files(arguments.out, options.batch)
    opened = open_model(arguments.checkpoint, options)
    check_output(files)
    draw = host_noise if options.stream else initial_noise
    noise = draw(options.seed, options.batch, opened.latent_shape)
    with opened.on_mesh():
        videos = generate(
            opened.load(),
            opened.codec,
            opened.text_encoder,
            [arguments.prompt] * options.batch,
            noise,
            negative_prompt=options.negative_prompt,
            stream=options.stream,
            progress=True,
            **options.solver,
        )

    videos = np.asarray(videos)
    if not np.isfinite(videos).all():
        raise InputError(
            f"{arguments.checkpoint}: expected finite videos, found NaN or infinity; the model's training may have "
            f"diverged, or --guidance-scale {options.guidance_scale} is too large"
        )

    scale = max(1, WATCHABLE_HEIGHT // videos.shape[2])
    written = []
    for file, video in zip(files, videos, strict=True):
        written.append(write_video(file, video, fps=opened.codec.fps, scale=scale))
        enlarged = f", enlarged {scale} times" if written[-1] == file else ""
        print_message(
            f"wrote {written[-1]}: {len(video)} frames of {video.shape[1]}x{video.shape[2]}{enlarged}", result=True
        )
    return written


def output_files(out: Path, batch: int) -> list[Path]:
    """`out` itself, or for several videos out_0.mp4, out_1.mp4 and so on. Raises InputError unless `out` is an MP4."""
    if out.suffix != ".mp4":
        raise InputError(f"--out {out}: expected a file name that ends in .mp4, found {out.name!r}")
    return [out] if batch == 1 else [out.with_stem(f"{out.stem}_{index}") for index in range(batch)]


def check_output(files: list[Path]) -> None:
    """Creates the directory of the videos, and finds out how they can be written.

    Without ffmpeg, a warning says that arrays come in place of videos.

    Raises:
      InputError: the videos cannot be written there.
    """
    for file in files:
        check_place(file)
    try:
        find_ffmpeg()
    except NoFfmpeg as error:
        print(f"warning: {error}; the frames will be written as .npy files", file=sys.stderr)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line; argparse itself exits with code 2 on a wrong one."""
    example = "--checkpoint runs/demo/finetune/model --prompt 'a seven moves sideways' --out seven.mp4"
    parser = CommandParser("sample", __doc__, example)
    option = parser.add_argument
    option("--checkpoint", type=Path, required=True, help="model checkpoint, or PyTorch folder of either layout")
    option("--prompt", required=True, help="what to show")
    option("--out", type=Path, required=True, help="the .mp4 file; with --batch, a number is added to its name")
    option(
        "--stream",
        action="store_true",
        help="sample part by part: videos of any length in the same device memory, if all blocks are hybrid",
    )
    SamplingOptions.add_to(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and samples; returns the exit code, 2 if the user's input is wrong."""
    arguments = parse_arguments(argv)
    return report_input_errors(lambda: sample(arguments))


if __name__ == "__main__":
    sys.exit(main())
