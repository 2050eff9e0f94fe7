"""Makes the videos that VBench or VBench-2.0 measures, under the names that they look for.

  python -m rehyat_jax.evaluate vbench-videos --info VBench_full_info.json --models PIPELINE --out FOLDER \\
      --negative-prompt TEXT [--prompts FILE --augmented FILE] [--checkpoint STUDENT] [options]

The prompts are in VBench's repository; none are in this package. --augmented has the prompts to sample from, line by
line next to the original ones in --prompts, which name the videos. Defaults are those with which VBench's team sampled
Wan2.1-T2V-1.3B. Give teacher and student the same command, except --checkpoint and --out: their noise is the same. The
same command resumes a stopped one, and several hosts can share it. FOLDER.json, with all settings and the checksum of
every video, is written when all videos are there. docs/vbench.md has the commands to run next.
"""

import argparse
import dataclasses
import os
import warnings
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rehyat_jax.cli import CommandParser, print_message, report_input_errors
from rehyat_jax.evaluation.vbench.layout import Video, check_case, chosen_entries, foreign_files, list_videos
from rehyat_jax.evaluation.vbench.manifest import write_manifest
from rehyat_jax.evaluation.vbench.prompts import augmented_prompts, read_info
from rehyat_jax.files.fingerprint import BLOCKS, fingerprint
from rehyat_jax.files.mp4 import check_encoder
from rehyat_jax.files.temporary import remove_leftovers
from rehyat_jax.files.write import check_place
from rehyat_jax.generation.jobs import Job, make_videos, unfinished
from rehyat_jax.generation.options import SamplingOptions, number
from rehyat_jax.generation.pipeline import Pipeline
from rehyat_jax.weights.load import checkpoint_files

PROTOCOL = SamplingOptions(steps=50, guidance_scale=6.0, flow_shift=3.0, sampler="unipc")
"""Settings of VBench's team for Wan2.1-T2V-1.3B; 81 frames of 480 x 832 are the default of Wan's codec. Sources:
`sampled_videos/README.md` of its repository, and issues 130, 154 and 163."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything to make.

    Attributes:
      pipeline: the model and its options.
      settings: what decides all videos, as JSON values.
      inputs: files of prompts.
      videos, jobs: the videos of all hosts, in the same order.
    """

    pipeline: Pipeline
    settings: dict[str, Any]
    inputs: list[Path]
    videos: list[Video]
    jobs: list[Job]


def make_plan(arguments: argparse.Namespace) -> Plan:
    """Reads the prompts and opens the model. Raises InputError if one of them is wrong."""
    benchmark, entries = read_info(arguments.info)
    chosen = chosen_entries(benchmark, entries, arguments.dimensions)
    videos = list_videos(benchmark, entries, chosen, flat=arguments.layout == "flat")
    text, inputs = {entry.number: entry.prompt for entry in entries}, [arguments.info]
    if arguments.augmented is not None:
        folders = {video.entry.folder for video in videos}
        text, files = augmented_prompts(entries, folders, arguments.prompts, arguments.augmented)
        inputs += files
    pipeline = Pipeline.from_pretrained(
        arguments.models, SamplingOptions.from_arguments(arguments), student=arguments.checkpoint
    )
    folder, files = checkpoint_files(pipeline.settings["transformer"])
    weights = {"transformer_files": fingerprint(files, folder, blocks=BLOCKS)}
    jobs = [
        Job(
            text[video.entry.number],
            video.seed,
            0,
            arguments.out / video.name,
            {"benchmark": benchmark.name, "original_prompt": video.entry.prompt, **weights},
        )
        for video in videos
    ]
    settings = {"benchmark": benchmark.name, "layout": arguments.layout, **pipeline.settings, **weights}
    return Plan(pipeline, settings, inputs, videos, jobs)


def make(arguments: argparse.Namespace) -> None:
    """Makes this host's videos, and the manifest if it was the last host. Raises InputError."""
    check_encoder()
    plan = make_plan(arguments)
    mine = plan.jobs[arguments.host :: arguments.num_hosts]
    for folder in {arguments.out, *(job.file.parent for job in mine)}:
        check_place(folder / "a.mp4")
        remove_leftovers(folder)
    check_case(arguments.out, plan.videos)
    todo = unfinished(mine, plan.pipeline.settings)
    print_message(f"{len(mine) - len(todo)} of {len(mine)} videos are finished already", result=True)
    with tqdm(total=len(mine), initial=len(mine) - len(todo), desc="videos", unit="video") as bar:
        for written in make_videos(plan.pipeline, todo) if todo else ():
            bar.update(len(written))
    for path in foreign_files(arguments.out, plan.videos):
        print_message(f"warning: {path}: is no video; VBench may take its suffix for that of the videos: move it away")
    missing = sum(not job.file.exists() for job in plan.jobs)
    if missing:
        print_message(
            f"{missing} of {len(plan.jobs)} videos are those of other hosts; the last one writes the manifest"
        )
        return
    unfinished(plan.jobs, plan.pipeline.settings)
    manifest = write_manifest(arguments.out, plan.settings, plan.inputs, plan.videos, plan.jobs)
    print_message(f"wrote {manifest}: {len(plan.jobs)} videos", result=True)


def make_parser() -> CommandParser:
    """The parser of the command line."""
    example = (
        "--info VBench_full_info.json --models wan --out vbench_videos/teacher \\\n"
        '      --negative-prompt "$(cat negative.txt)" --prompts all_dimension.txt \\\n'
        "      --augmented all_dimension_aug_wanx_seed42.txt"
    )
    parser = CommandParser("evaluate vbench-videos", __doc__, example)
    option = parser.add_argument
    option("--info", type=Path, required=True, help="VBench_full_info.json, or VBench2_full_info.json for VBench-2.0")
    option("--out", type=Path, required=True, metavar="FOLDER", help="of this model's videos")
    option("--models", metavar="PIPELINE", help="folder of Wan2.1, or OWNER/NAME[@REVISION] on the Hugging Face Hub")
    option("--checkpoint", type=Path, help="transformer in place of the pipeline's: model checkpoint or PyTorch folder")
    same = "a text file, or a folder with one for each dimension"
    option(
        "--augmented", type=Path, metavar="PATH", help=f"prompts to sample from (default: the original ones): {same}"
    )
    option("--prompts", type=Path, metavar="PATH", help=f"original prompts in the order of --augmented: {same}")
    option("--dimensions", nargs="+", default=[], metavar="NAME", help="make only their videos (default: all)")
    layout = "a folder for each dimension, or one for all (default: %(default)s)"
    option("--layout", choices=("dimensions", "flat"), default="dimensions", help=layout)
    option("--num-hosts", type=number(int, 1, 1_000_000), default=1, help="that share the videos (default: 1)")
    option("--host", type=number(int, 0, 1_000_000), default=0, help="which of them this is (default: 0)")
    # It decides the score, and a command without it would not be that of VBench's team.
    wans = "what to move away from: `sample_neg_prompt` of wan/configs/shared_config.py in Wan's repository"
    option("--negative-prompt", required=True, help=wans)
    SamplingOptions.add_to(parser, PROTOCOL, without=("negative_prompt", "seed"))
    return parser


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line; argparse itself exits with code 2 on a wrong one."""
    parser = make_parser()
    arguments = parser.parse_args(argv)
    if arguments.models is None and arguments.checkpoint is None:
        parser.error("one of the arguments --models --checkpoint is required")
    if (arguments.augmented is None) != (arguments.prompts is None):
        parser.error("--augmented and --prompts: expected both or none, because the one names the other's lines")
    if not Path(os.path.abspath(arguments.out)).name:
        parser.error(f"--out: expected a folder with a name, which its manifest takes, found {arguments.out}")
    if arguments.host >= arguments.num_hosts:
        parser.error(f"--host: expected 0 to {arguments.num_hosts - 1}, found {arguments.host}")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and makes the videos; returns the exit code, 2 if the user's input is wrong."""
    arguments = parse_arguments(argv)
    with warnings.catch_warnings():
        # Those of libraries name a line of their code.
        warnings.showwarning = lambda message, *_: print_message(f"warning: {message}")
        return report_input_errors(lambda: make(arguments))
