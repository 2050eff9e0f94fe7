"""Samples videos from prompts.

  python -m rehyat_jax.sample --models PIPELINE --prompt TEXT --out FILE.mp4 [options]
  python -m rehyat_jax.sample --models PIPELINE --prompts FILE --out FOLDER [options]
  python -m rehyat_jax.sample --models PIPELINE --latents FILE.safetensors --out FILE.mp4
  python -m rehyat_jax.sample --show FILE.mp4

PIPELINE is a folder of Wan2.1 or its name on the Hugging Face Hub. With --checkpoint, the transformer is a model
checkpoint or a PyTorch folder, such as a student's; it may name its pipeline itself. Defaults are those of Wan2.1 text
to video. The file of a video has all settings in its comment, which --show prints. A stopped command with --prompts
skips the finished videos when it is run again. docs/sampling.md has the details.
"""

import argparse
import dataclasses
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import jax

from rehyat_jax.cli import CommandParser, print_message, report_input_errors
from rehyat_jax.errors import InputError
from rehyat_jax.files.mp4 import read_settings
from rehyat_jax.files.temporary import remove_leftovers
from rehyat_jax.files.write import check_place
from rehyat_jax.generation.continuing import continue_video
from rehyat_jax.generation.jobs import Job, make_videos, unfinished
from rehyat_jax.generation.latents_file import read_latents
from rehyat_jax.generation.options import Order, SamplingOptions, number
from rehyat_jax.generation.pipeline import Pipeline
from rehyat_jax.generation.text_encoders import read_prompts
from rehyat_jax.generation.video_files import SHEET_FRAMES, has_encoder, write_videos
from rehyat_jax.parallel.compile_cache import keep_compiled_programs
from rehyat_jax.training.profile import trace_options


def sample(arguments: argparse.Namespace) -> list[Path]:
    """Makes the videos of the command line; returns the written files, .npy if this machine has no encoder.

    Raises:
      InputError: the pipeline, an option, a prompt or the output path is wrong.
    """
    options = SamplingOptions.from_arguments(arguments)
    if arguments.continued is not None:
        options = dataclasses.replace(options, frames=None)  # --frames is the number of frames to add
    pipeline = Pipeline.from_pretrained(arguments.models, options, student=arguments.checkpoint)
    if arguments.latents is not None:
        return decode_file(pipeline, arguments)
    continued, added = None, {}
    if arguments.continued is not None:
        pipeline, continued = continue_video(pipeline, arguments.continued, arguments.frames)
        added = {"continues": str(continued.file), "given_frames": len(continued.last)}
    jobs = list_jobs(arguments)
    todo = unfinished(jobs, pipeline.settings) if arguments.prompts else jobs
    if len(todo) < len(jobs):
        print_message(f"{len(jobs) - len(todo)} of {len(jobs)} videos are finished already", result=True)
    if not todo:
        return []
    check_output(todo, arguments)
    how = dict(keep_latents=arguments.keep_latents, contact_sheet=arguments.contact_sheet)
    batches = make_videos(pipeline, todo, continued=continued, more=added, as_arrays=not has_encoder(), **how)
    return [file for batch in batches for file in _reported(batch)]


def list_jobs(arguments: argparse.Namespace) -> list[Job]:
    """The videos to make, those of this host only. Raises InputError if --out or a prompt is of another kind."""
    seeds = arguments.seeds or [arguments.seed]
    if arguments.prompts is None:
        out = arguments.out
        _check_suffix(out)
        if not arguments.prompt.strip():
            print("warning: --prompt is empty; the video will follow no text", file=sys.stderr)
        # Several videos of one prompt differ in their seeds, or else in the number of their noise.
        noises = [(seed, 0) for seed in seeds] if arguments.seeds else [(seeds[0], n) for n in range(arguments.batch)]
        several = len(noises) > 1
        files = [out.with_stem(f"{out.stem}_{index}") if several else out for index in range(len(noises))]
        return [Job(arguments.prompt, *noise, file) for noise, file in zip(noises, files, strict=True)]
    if arguments.out.suffix == ".mp4":
        raise InputError(f"--out {arguments.out}: expected a folder with --prompts, found a file name; give a folder")
    jobs = []
    for line, prompt in enumerate(read_prompts(arguments.prompts)):
        for seed in seeds:
            name = f"{line:05d}_seed{seed}.mp4" if len(seeds) > 1 else f"{line:05d}.mp4"
            jobs.append(Job(prompt, seed, 0, arguments.out / name))
    return jobs[arguments.host :: arguments.num_hosts]


def check_output(jobs: Sequence[Job], arguments: argparse.Namespace) -> None:
    """Tries to write where the videos will be. Raises InputError if that fails."""
    # With --prompts, all files are in one folder, and none of them exists.
    for job in jobs[:1] if arguments.prompts else jobs:
        check_place(job.file)
    if arguments.prompts:
        remove_leftovers(arguments.out)


def decode_file(pipeline: Pipeline, arguments: argparse.Namespace) -> list[Path]:
    """Decodes latents that were kept; returns the written file. Raises InputError if they are another model's."""
    _check_suffix(arguments.out)
    latents, settings = read_latents(arguments.latents)
    if latents.shape[-1] != pipeline.latent_shape[-1] or settings.get("codec") != pipeline.codec_name:
        raise InputError(
            f"{arguments.latents}: expected latents of {pipeline.latent_shape[-1]} channels of codec "
            f"{pipeline.codec_name!r}, found {latents.shape[-1]} of {settings.get('codec')!r}; give the --models or "
            f"--checkpoint that they were sampled with"
        )
    check_place(arguments.out)
    how = dict(fps=pipeline.fps, as_arrays=not has_encoder(), contact_sheet=arguments.contact_sheet)
    frames, count = pipeline.frames(latents[None], progress=True), pipeline.frame_count(len(latents))
    return _reported(write_videos(frames, count, [arguments.out], [settings], **how))


def _reported(written: dict[Path, str]) -> list[Path]:
    for file, description in written.items():
        print_message(f"wrote {file}: {description}", result=True)
    return list(written)


def _check_suffix(out: Path) -> None:
    if out.suffix != ".mp4":
        raise InputError(f"--out {out}: expected a file name that ends in .mp4, found {out.name!r}")


def make_parser() -> CommandParser:
    """The parser of the command line."""
    example = "--models Wan2.1-T2V-1.3B-Diffusers --prompt 'A cat runs on the beach.' --out cat.mp4"
    parser = CommandParser("sample", __doc__, example)
    option = parser.add_argument
    option("--models", metavar="PIPELINE", help="folder of Wan2.1, or OWNER/NAME[@REVISION] on the Hugging Face Hub")
    option("--checkpoint", type=Path, help="transformer in place of the pipeline's: model checkpoint or PyTorch folder")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--prompt", help="what to show")
    what.add_argument("--prompts", type=Path, metavar="FILE", help="text file, one prompt a line")
    what.add_argument("--latents", type=Path, metavar="FILE", help="latents to decode, from --keep-latents")
    what.add_argument("--show", type=Path, metavar="FILE", help="video whose settings to print")
    option("--out", type=Path, help="the .mp4 file; several get numbers. With --prompts, a folder")
    seed = number(int, 0, 2**32 - 1)
    option("--seeds", type=seed, nargs="+", metavar="SEED", help="a video of each prompt for each; in place of --seed")
    option("--num-hosts", type=number(int, 1, 1_000_000), default=1, help="that share --prompts (default: 1)")
    option("--host", type=number(int, 0, 1_000_000), default=0, help="which of them this is (default: 0)")
    option("--keep-latents", action="store_true", help="also write the latents, as .safetensors next to the video")
    option("--contact-sheet", action="store_true", help=f"also write {SHEET_FRAMES} frames as .png next to the video")
    option(
        "--stream",
        action="store_true",
        help="sample part by part: videos of any length in the same device memory, if all blocks are hybrid",
    )
    orders = "video: every step for all frames; chunks: all steps for one chunk after another (default: as in training)"
    option("--order", choices=get_args(Order), help=orders)
    help_text = "video to continue, with --stream or --order chunks; --frames is the number of frames to add"
    option("--continue", type=Path, dest="continued", metavar="FILE", help=help_text)
    longest = "latent frames; positions of a video in parts stay below it (default: they grow with the video)"
    option("--longest", type=number(int, 1, 10**9), metavar="N", help=longest)
    option("--profile", type=Path, metavar="FOLDER", help="also trace everything by JAX's profiler, for XProf")
    SamplingOptions.add_to(parser)
    return parser


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line; argparse itself exits with code 2 on a wrong one."""
    parser = make_parser()
    arguments = parser.parse_args(argv)
    if arguments.show is None:
        if arguments.models is None and arguments.checkpoint is None:
            parser.error("one of the arguments --models --checkpoint is required")
        if arguments.prompt is arguments.prompts is arguments.latents is None:
            parser.error("one of the arguments --prompt --prompts --latents --show is required")
        if arguments.out is None:
            parser.error("the following arguments are required: --out")
        if arguments.continued is not None and (
            arguments.prompt is None or not (arguments.stream or arguments.order == "chunks")
        ):
            parser.error("argument --continue: expected with --prompt and --stream, or --order chunks")
    if arguments.host >= arguments.num_hosts:
        parser.error(f"--host: expected 0 to {arguments.num_hosts - 1}, found {arguments.host}")
    return arguments


def run(arguments: argparse.Namespace) -> None:
    """Runs the command. Raises InputError."""
    if arguments.show is not None:
        print(json.dumps(read_settings(arguments.show), indent=2, ensure_ascii=False))
        return
    with warnings.catch_warnings():
        # Those of libraries name a line of their code.
        warnings.showwarning = lambda message, *_: print_message(f"warning: {message}")
        keep_compiled_programs()
        if arguments.profile is None:
            sample(arguments)
            return
        check_place(arguments.profile / "trace")
        with jax.profiler.trace(str(arguments.profile), profiler_options=trace_options()):
            sample(arguments)
        print_message(f"wrote {arguments.profile}: a trace for XProf", result=True)


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and samples; returns the exit code, 2 if the user's input is wrong."""
    arguments = parse_arguments(argv)
    return report_input_errors(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
