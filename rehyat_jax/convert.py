"""Converts between PyTorch checkpoints of Wan2.1 and model checkpoints.

  python -m rehyat_jax.convert from-torch SRC DST [--force]
  python -m rehyat_jax.convert to-torch SRC DST --layout {diffusers,original} [--without-base BASE] [options]
  python -m rehyat_jax.convert publish FOLDER --repo OWNER/NAME

PyTorch checkpoints are safetensors files or folders, in diffusers' or the original layout. A model checkpoint is the
directory that training writes and sampling reads. Every tensor keeps its dtype and is converted without a change of any
bit. `--without-base` writes only what a student adds to its base. `publish` checks a folder and prints the command that
uploads it; nothing is uploaded.
"""

import argparse
import os
import re
import shlex
import sys
from pathlib import Path

import jax
from tqdm import tqdm

from rehyat_jax.cli import CommandParser, print_message, report_input_errors
from rehyat_jax.errors import InputError
from rehyat_jax.files.packaged import here_or_packaged
from rehyat_jax.generation.hub import TRANSFORMER_FILES, open_models
from rehyat_jax.publishing.card import HUB_NAME, LICENSE, card_facts, model_card
from rehyat_jax.publishing.check import check_folder
from rehyat_jax.weights.adapters import ADAPTERS_FILE
from rehyat_jax.weights.conversion import convert_from_torch, convert_to_torch, convert_without_base
from rehyat_jax.weights.replacing import MARK
from rehyat_jax.weights.streamed import StreamedModel
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
    option = to_torch.add_argument
    option("--layout", choices=LAYOUTS, required=True, help="whose tensor names and config.json")
    option("--without-base", metavar="BASE", help="leave out the weights of this base: folder or Hub name")
    option("--adapter", metavar="DIR", type=Path, help="low-rank adapters of the student's run, with --without-base")
    option(
        "--base-name",
        metavar="OWNER/NAME",
        help="the base on the Hub, for the model card (default: BASE, if it is one)",
    )
    option("--evaluation", metavar="FILE", type=Path, help="evaluation.json of this model, for the model card")
    option("--license", default=LICENSE, help="licence of the weights, for the model card (default: %(default)s)")
    publish = add(
        "publish", "check an exported folder, and print the command that uploads it", "exported --repo me/my-student"
    )
    publish.add_argument("folder", metavar="FOLDER", type=Path, help="folder that to-torch wrote")
    publish.add_argument("--repo", metavar="OWNER/NAME", required=True, help="repository on the Hugging Face Hub")
    return parser


def convert(arguments: argparse.Namespace) -> None:
    """Runs the chosen conversion and prints a summary of the written checkpoint. Raises InputError."""
    if arguments.command == "publish":
        return publish(arguments.folder, arguments.repo)
    source, destination, force = arguments.source, arguments.destination, arguments.force
    if arguments.command == "from-torch":
        models = arguments.models
        if models is not None and os.path.lexists(models):
            models = os.path.abspath(models)  # other commands may run elsewhere
        model = convert_from_torch(source, destination, models=models, replace=force)
    else:
        model = export(arguments)
    print_message(f"{destination}: {len(model.params)} parameters, {model.nbytes / 1e9:.2f} GB", result=True)


def export(arguments: argparse.Namespace) -> StreamedModel:
    """Runs `to-torch`. Raises InputError."""
    source, destination, base, force = arguments.source, arguments.destination, arguments.without_base, arguments.force
    base_name, adapter = arguments.base_name, arguments.adapter
    if base_name is not None and not HUB_NAME.fullmatch(base_name):
        raise InputError(
            f"--base-name: expected a name on the Hub, such as owner/name, found {base_name!r}; correct it"
        )
    if not re.fullmatch(r"[\w.+-]{1,100}", arguments.license, re.ASCII):
        raise InputError(f"--license: expected a name such as {LICENSE}, found {arguments.license!r}; correct it")
    if adapter is not None and base is None:
        raise InputError("--adapter: a complete export has the adapters merged; leave it out, or give --without-base")
    if arguments.layout != "diffusers":
        if any(option is not None for option in (base, base_name, arguments.evaluation)):
            raise InputError(
                "--layout: --without-base, --base-name and --evaluation need diffusers; the original layout has "
                "neither such students nor model cards"
            )
        return convert_to_torch(source, destination, arguments.layout, replace=force)

    opened, place = None, base_name
    if base is not None:
        opened = open_models(here_or_packaged(base), TRANSFORMER_FILES)
        if opened.revision and base_name is None:
            base_name, place = base.partition("@")[0], base
    facts = card_facts(
        source,
        base_name=base_name,
        license=arguments.license,
        has_base=base is None,
        evaluation=arguments.evaluation,
    )
    options = dict(card=model_card(facts), replace=force)
    if opened is None:
        return convert_to_torch(source, destination, "diffusers", **options)
    found = source.absolute().parent / "adapter"
    if adapter is None and (found / ADAPTERS_FILE).exists():
        print_message(f"{source}: its run wrote adapters; give --adapter {found} if they are this student's")
    return convert_without_base(
        source, destination, opened.folder, base_name=place or facts.base_name, adapter=adapter, **options
    )


def publish(folder: Path, repository: str) -> None:
    """Checks a folder and prints its files and the command that uploads them. Raises InputError."""
    if not HUB_NAME.fullmatch(repository):
        raise InputError(f"--repo: expected a name on the Hub, such as owner/name, found {repository!r}; correct it")
    with tqdm(unit="B", unit_scale=True, delay=1) as bar:
        files = check_folder(folder, bar.update)
    sizes = {file: (folder / file).stat().st_size for file in files if file.name != MARK}
    lines = [f"{folder}: {len(sizes)} files, {sum(sizes.values()) / 1e6:.1f} MB; all checks passed"]
    lines += [f"  {size / 1e6:10.1f} MB  {file}" for file, size in sizes.items()]
    print_message("\n".join(lines), result=True)
    command = shlex.join(["hf", "upload", repository, str(folder), ".", "--exclude", MARK])
    print_message(f"upload it with:\n  {command}", result=True)


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and converts; returns the exit code, 2 if the user's input is wrong."""
    arguments = make_parser().parse_args(argv)
    return report_input_errors(lambda: convert(arguments))


if __name__ == "__main__":
    # Nothing here computes; without this, JAX would occupy an accelerator.
    jax.config.update("jax_platforms", "cpu")
    sys.exit(main())
