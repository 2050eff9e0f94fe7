"""Prints a script that completes the command lines of `rehyat` in a shell: python -m rehyat_jax.completion SHELL.

For bash, with the package bash-completion:

  rehyat completion bash > ~/.local/share/bash-completion/completions/rehyat

For zsh, with a folder of $fpath:

  rehyat completion zsh > FOLDER/_rehyat

The script completes commands, options, names that an option takes, fields of a configuration, and files. It does not
start Python. Make it again for another version of rehyat.
"""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from rehyat_jax import __main__ as rehyat
from rehyat_jax import compare, convert, evaluate, plan, prepare, recipe, sample, study, surgery, train
from rehyat_jax.cli import CommandParser, report_input_errors
from rehyat_jax.demo import __main__ as demo
from rehyat_jax.evaluation.vbench import command as vbench
from rehyat_jax.extras import check_installed
from rehyat_jax.planning.sampling import command as plan_sampling
from rehyat_jax.training.fields import FIELDS
from rehyat_jax.training.values import Boolean, Choice

SHELLS = ("bash", "zsh", "tcsh")


def make_parser() -> CommandParser:
    """The parser of this command's own command line."""
    parser = CommandParser("completion", __doc__, "bash")
    parser.add_argument("shell", metavar="SHELL", choices=SHELLS, help=f"one of {', '.join(SHELLS)}")
    return parser


def configured(module: ModuleType) -> argparse.ArgumentParser:
    """A parser with the options that the help of a module lists, and all fields of a configuration.

    The module's own parser is that of absl, which defines its flags when it parses a command line.
    """
    parser = argparse.ArgumentParser(add_help=False)
    # "  --frames N --height H    size of a video"
    listed = re.findall(r"^  (--.+?)(?:  |$)", module.__doc__ or "", re.MULTILINE)
    for name in dict.fromkeys(re.findall(r"--\w+(?![\w.])", " ".join(listed))):
        parser.add_argument(name, type=Path)
    _add_fields(parser)
    return parser


def _add_fields(parser: argparse.ArgumentParser) -> None:
    for field in FIELDS:
        allowed = field.allowed
        choices = tuple(allowed.names) if isinstance(allowed, Choice) else None
        parser.add_argument(
            f"--config.{field.path}", choices=("True", "False") if isinstance(allowed, Boolean) else choices
        )


def recipe_parser() -> argparse.ArgumentParser:
    parser = recipe.make_parser()
    _add_fields(parser)
    return parser


PARSERS: dict[str, Sequence[Callable[[], argparse.ArgumentParser]]] = {
    "demo": (demo.make_parser,),
    "convert": (convert.make_parser,),
    "prepare": (
        prepare.make_parser,
        lambda: prepare.make_parser(prepare.LATENTS),
        lambda: prepare.make_parser(prepare.TRAJECTORIES),
    ),
    "train": (lambda: configured(train),),
    "recipe": (recipe_parser,),
    "sample": (sample.make_parser,),
    "evaluate": (evaluate.make_parser, vbench.make_parser),
    "plan": (lambda: configured(plan), plan_sampling.parser),
    "surgery": (lambda: configured(surgery),),
    "study": (study.make_parser,),
    "compare": (compare.make_parser,),
    "completion": (make_parser,),
}
"""Name of a command -> its parser, or those of its forms, whose options are completed together."""


def complete_parser() -> argparse.ArgumentParser:
    """One parser with the options of all commands; arguments whose type is Path are completed as files."""
    top = argparse.ArgumentParser(prog="rehyat")
    top.add_argument("--version", action="store_true")
    commands = top.add_subparsers()
    for name, text in rehyat.COMMANDS.items():
        parents = [make() for make in PARSERS[name]]
        added = commands.add_parser(name, help=text, parents=parents, conflict_handler="resolve", add_help=False)
        _complete_files(added)
    return top


def _complete_files(parser: argparse.ArgumentParser) -> None:
    import shtab

    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for subparser in action.choices.values():
                _complete_files(subparser)
        elif action.type is Path:
            action.complete = shtab.FILE  # type: ignore[attr-defined]


def script(shell: str) -> str:
    """The script for one of `SHELLS`. Raises InputError if the extra is missing."""
    check_installed("the completion of command lines", "shtab")
    import shtab

    return shtab.complete(complete_parser(), shell)


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and prints the script; returns the exit code."""
    arguments = make_parser().parse_args(argv)
    return report_input_errors(lambda: print(script(arguments.shell)))


if __name__ == "__main__":
    sys.exit(main())
