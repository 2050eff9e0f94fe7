"""Converts between PyTorch checkpoints of Wan2.1 and model checkpoints.

  python -m rehyat_jax.convert from-torch SRC DST [--force]
  python -m rehyat_jax.convert to-torch SRC DST --layout {diffusers,original} [--force]

PyTorch checkpoints are safetensors files or folders, in diffusers' or the original layout. A model checkpoint is the
directory that training writes and sampling reads. Every tensor keeps its dtype and is converted without a change of any
bit.
"""

import argparse
import os
import sys
from pathlib import Path

import jax

from rehyat_jax.cli import CommandParser, print_message, report_input_errors
from rehyat_jax.weights.conversion import convert_from_torch, convert_to_torch
from rehyat_jax.weights.table import LAYOUTS


def make_parser() -> CommandParser:
    """The parser of the command line, with a subparser for each direction."""
    parser = CommandParser("convert", __doc__, "from-torch assets/demo_teacher runs/teacher")
    commands = parser.add_subparsers(dest="command", required=True)
    add = lambda name, text, example: commands.add_parser(
        name, module=f"convert {name}", description=text, help=text, example=example
    )
    from_torch = add("from-torch", "PyTorch checkpoint -> model checkpoint", "assets/demo_teacher runs/teacher")
    to_torch = add("to-torch", "model checkpoint -> PyTorch folder", "runs/model exported --layout diffusers")
    for command, source in ((from_torch, "safetensors file or folder"), (to_torch, "model checkpoint")):
        command.add_argument("source", metavar="SRC", type=Path, help=source)
        command.add_argument("destination", metavar="DST", type=Path, help="directory to write")
        command.add_argument("--force", action="store_true", help="replace an earlier conversion at DST")
    from_torch.add_argument(
        "--models", help="pipeline with the VAE and text encoder, which `sample` will use: folder or Hub name"
    )
    to_torch.add_argument("--layout", choices=LAYOUTS, required=True, help="whose tensor names and config.json")
    return parser


def convert(arguments: argparse.Namespace) -> None:
    """Runs the chosen conversion and prints a summary of the written checkpoint. Raises InputError."""
    source, destination, force = arguments.source, arguments.destination, arguments.force
    if arguments.command == "from-torch":
        models = arguments.models
        if models is not None and os.path.lexists(models):
            models = os.path.abspath(models)  # other commands may run elsewhere
        model = convert_from_torch(source, destination, models=models, replace=force)
    else:
        model = convert_to_torch(source, destination, arguments.layout, replace=force)
    print_message(f"{destination}: {len(model.params)} parameters, {model.nbytes / 1e9:.2f} GB", result=True)


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and converts; returns the exit code, 2 if the user's input is wrong."""
    arguments = make_parser().parse_args(argv)
    return report_input_errors(lambda: convert(arguments))


if __name__ == "__main__":
    # Nothing here computes; without this, JAX would occupy an accelerator.
    jax.config.update("jax_platforms", "cpu")
    sys.exit(main())
