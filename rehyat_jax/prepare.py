"""Prepares training examples: latents and text embeddings in ArrayRecord shards, for `data.source = "prepared"`.

  python -m rehyat_jax.prepare SRC DST [options]                       videos and captions: files, tar shards, tables
  python -m rehyat_jax.prepare SRC DST --codec wan_vae --text-encoder umt5 --models DIR   for Wan, with its pipeline
  python -m rehyat_jax.prepare latents SRC DST [options]               examples that were encoded elsewhere
  python -m rehyat_jax.prepare teacher-trajectories MODEL DST [options]   inputs of a model while it samples

Run a stopped command again to resume it; the resulting bytes are the same. On several hosts, give each its --host and
the same --num-hosts, and a DST that all of them see. Otherwise copy their results into one folder and run the command
again there. The command writes into DST the shards, `summary.json` and `summary.txt` with the rejected inputs and the
reasons, a contact sheet, and last `dataset.json`. docs/data.md describes the formats.
"""

import argparse
import os
import sys
from pathlib import Path

from rehyat_jax.cli import CommandParser, report_input_errors
from rehyat_jax.data.manifest import NULL_TEXT
from rehyat_jax.errors import InputError
from rehyat_jax.generation.hub import open_models
from rehyat_jax.generation.options import SamplingOptions, number
from rehyat_jax.preparation.latent_files import prepare_latent_files
from rehyat_jax.preparation.latent_tables import LAYOUTS, LatentColumn, prepare_latent_table
from rehyat_jax.preparation.tables import has_table
from rehyat_jax.preparation.trajectories import prepare_trajectories
from rehyat_jax.preparation.units import STORED, Hosts
from rehyat_jax.preparation.videos import Size, prepare_videos

LATENTS, TRAJECTORIES = "latents", "teacher-trajectories"


def video_size(text: str) -> Size:
    """An argparse type: frames, height and width, as in "81x480x832"."""
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdecimal() and 0 < int(part) <= 10_000 for part in parts):
        raise argparse.ArgumentTypeError(f"expected FRAMESxHEIGHTxWIDTH, as in 81x480x832, found {text!r}")
    frames, height, width = map(int, parts)
    return frames, height, width


def make_parser(command: str = "") -> CommandParser:
    """The parser of a command: "" for videos, `LATENTS` or `TRAJECTORIES`."""
    example = {
        "": "videos prepared --size 81x480x832",
        LATENTS: "latents prepared --codec wan_vae --text-encoder umt5",
        TRAJECTORIES: "model prepared --prompts prompts.txt",
    }
    parser = CommandParser(f"prepare {command}".strip(), __doc__, example[command])
    option = parser.add_argument
    default = " (default: %(default)s)"
    count = number(int, 1, 1_000_000)
    source = {
        "": "folder of videos, of tar shards or of Parquet files, or a data set's folder",
        LATENTS: "folder of safetensors files or of Parquet files, or a data set's folder",
        TRAJECTORIES: "model checkpoint, or PyTorch folder",
    }
    option("source", metavar="MODEL" if command == TRAJECTORIES else "SRC", type=Path, help=source[command])
    option("destination", metavar="DST", type=Path, help="folder to fill")
    option("--store", choices=STORED, default="float32", help="dtype of stored latents and text" + default)
    option("--num-hosts", type=count, default=1, help="that share the work" + default)
    option("--host", type=number(int, 0, 1_000_000), default=0, help="which of them this is" + default)
    units = {LATENTS: ("files or rows", 256), TRAJECTORIES: ("trajectories", 16)}
    what, size = units.get(command, ("videos", 64))
    option("--unit", type=count, default=size, help=f"{what} of a shard, done again if stopped within" + default)
    if command == TRAJECTORIES:
        option("--prompts", type=Path, required=True, help="text file, one prompt a line")
        models = "with the text encoder: folder of Wan2.1, or its Hub name (default: what MODEL names)"
        option("--models", metavar="PIPELINE", help=models)
        option("--noises", type=count, default=1, help="trajectories of each prompt" + default)
        option("--keep", type=count, default=8, help="examples of each trajectory" + default)
        SamplingOptions.add_to(parser)
    elif command == LATENTS:
        option("--codec", required=True, help="that made the latents; the model to be trained must name it too")
        option("--text-encoder", required=True, help="that made the text; the same holds")
        models = "with the weights for the contact sheet and for captions: folder of Wan2.1, or its Hub name"
        option("--models", metavar="PIPELINE", help=models)
        normalised = "whether a table's latents are normalised as the codec does, which FastVideo's are not"
        option("--normalised", choices=("yes", "no"), help=normalised)
        option("--layout", choices=LAYOUTS, help="order of the axes of a table's latents (FastVideo's: CTHW)")
        option("--latents", metavar="COLUMN", default="latents", help="of a table that is not FastVideo's" + default)
        option("--caption", metavar="COLUMN", default="caption", help="of a table" + default)
        option("--embed-captions", action="store_true", help="in place of the text embeddings of FastVideo's tables")
    else:
        option("--codec", default="space_to_depth", help="of the model to be trained, wan_vae for Wan" + default)
        option("--text-encoder", default="word_vectors", help="of the model to be trained, umt5 for Wan" + default)
        models = "with the weights of wan_vae and umt5: folder of Wan2.1, or its Hub name"
        option("--models", metavar="PIPELINE", help=models)
        option(
            "--dtype",
            choices=("float32", "bfloat16"),
            help="in which wan_vae computes (default: bfloat16 on TPUs, float32 elsewhere)",
        )
    if not command:
        option(
            "--size",
            nargs="+",
            type=video_size,
            metavar="FRAMESxHEIGHTxWIDTH",
            default=[],
            help="of videos to make; each goes where it loses least (default: the codec's)",
        )
        option("--video", metavar="COLUMN", default="video", help="of a table, with the videos' bytes" + default)
        text = "column of a table, or field of JSON files in tar shards"
        option("--caption", metavar="NAME", default="caption", help=text + default)
        option("--workers", type=count, default=min(16, os.cpu_count() or 1), help="videos decoded at a time" + default)
    return parser


def parse_arguments(argv: list[str]) -> tuple[str, argparse.Namespace]:
    """(command, its arguments); argparse exits with code 2 on a wrong command line."""
    command = argv[0] if argv and argv[0] in (LATENTS, TRAJECTORIES) else ""
    parser = make_parser(command)
    arguments = parser.parse_args(argv[1:] if command else argv)
    if arguments.host >= arguments.num_hosts:
        parser.error(f"--host: expected 0 to {arguments.num_hosts - 1}, found {arguments.host}")
    return command, arguments


def latent_column(arguments: argparse.Namespace) -> LatentColumn | None:
    """The user's description of a table of latents; None for a folder of safetensors files. Raises InputError."""
    source, normalised = arguments.source, arguments.normalised
    files = source.glob("*.safetensors") if source.is_dir() else ()
    if any(file.name != NULL_TEXT for file in files) or not has_table(source):
        if normalised or arguments.layout or arguments.embed_captions:
            raise InputError(
                f"{source}: expected a table for --normalised, --layout and --embed-captions, found none; safetensors "
                f"files have normalised latents [T, H, W, C]: leave the options out"
            )
        return None
    if normalised is None:
        raise InputError(
            f"{source}: nothing in a table says whether its latents are normalised; give --normalised no for what "
            f"FastVideo's text-to-video preprocessing stores, or what else is right"
        )
    return LatentColumn(
        normalised == "yes", arguments.layout, arguments.latents, arguments.caption, arguments.embed_captions
    )


def run(command: str, arguments: argparse.Namespace) -> str:
    """Runs the chosen preparation; returns a message for the user. Raises InputError."""
    places = arguments.source, arguments.destination
    common = dict(dtype=arguments.store, unit=arguments.unit, hosts=Hosts(arguments.host, arguments.num_hosts))
    if command == TRAJECTORIES:
        options = dict(models=arguments.models, prompts=arguments.prompts, noises=arguments.noises, keep=arguments.keep)
        return prepare_trajectories(*places, SamplingOptions.from_arguments(arguments), **options, **common)
    names = dict(codec=arguments.codec, text_encoder=arguments.text_encoder)
    models = open_models(arguments.models).folder if arguments.models else None
    if command == LATENTS:
        about = latent_column(arguments)
        if about is None:
            return prepare_latent_files(*places, **names, models=models, **common)
        return prepare_latent_table(*places, about, **names, models=models, **common)
    return prepare_videos(
        *places,
        **names,
        models=models,
        video=arguments.video,
        caption=arguments.caption,
        sizes=arguments.size,
        compute_dtype=arguments.dtype,
        workers=arguments.workers,
        **common,
    )


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and prepares; returns the exit code, 2 if the user's input is wrong."""
    command, arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
    return report_input_errors(lambda: print(run(command, arguments)))


if __name__ == "__main__":
    sys.exit(main())
