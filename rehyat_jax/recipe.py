"""Trains a student in several stages, and evaluates it: python -m rehyat_jax.recipe configs/recipes/NAME.py.

A recipe goes from a softmax teacher to a causal hybrid student and further to students of few steps. Every step is a
run of `rehyat_jax.train`; `rehyat_jax.evaluate` compares the results with the teacher. The workdir gets `recipe.json`
(all figures), `recipe.md` (the table) and, for the demo, `recipe.png` (samples). The same command resumes at any point.
Fields of the configuration (--config.data.path=FOLDER) hold for all steps.

Exit codes:

  0    every model was trained and evaluated
  2    the user's input is wrong, or the recipe in the workdir began with another definition
  3    a run failed
  75   SIGTERM stopped the recipe
  130  Ctrl-C stopped it
"""

import argparse
import ast
import re
import sys
from pathlib import Path
from typing import Any

from rehyat_jax.cli import CommandParser, print_message, report_input_errors
from rehyat_jax.errors import InputError
from rehyat_jax.recipes.definition import read_recipe
from rehyat_jax.recipes.report import collect, write_report
from rehyat_jax.recipes.running import run_recipe

FAILED = 3
"""The exit code if a run failed. 1 is that of a bug."""

_FIELD = re.compile(r"--config\.([\w.]+)=(.*)", re.DOTALL)


def make_parser() -> CommandParser:
    """The parser of the options, without fields of the configuration."""
    parser = CommandParser("recipe", __doc__, "configs/recipes/demo.py")
    parser.add_argument("file", metavar="FILE", type=Path, help="the recipe's file")
    parser.add_argument("--workdir", type=Path, help="directory of the recipe; runs/recipes/NAME by default")
    parser.add_argument("--jobs", type=int, help="processes at a time; on CPUs as many as cores and memory allow")
    return parser


def parse_arguments(argv: list[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
    """(options, fields of the configuration). argparse itself exits with code 2 on a wrong command line."""
    fields = [match for argument in argv if (match := _FIELD.fullmatch(argument))]
    options = make_parser().parse_args([argument for argument in argv if not _FIELD.fullmatch(argument)])
    return options, {match[1]: _value(match[2]) for match in fields}


def _value(text: str) -> Any:
    """The Python value of a text, or the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and runs; returns the exit code, see above."""
    argv = sys.argv[1:] if argv is None else argv
    options, fields = parse_arguments(argv)
    failures: dict[str, str] = {}

    def run() -> None:
        if options.jobs is not None and options.jobs < 1:
            raise InputError(f"--jobs: expected at least 1, found {options.jobs}; leave it out, or give a number")
        recipe = read_recipe(options.file, fields)
        workdir = options.workdir or Path("runs/recipes") / options.file.stem
        failures.update(run_recipe(options.file, recipe, workdir, jobs=options.jobs))
        for name, reason in failures.items():
            print_message(f"{name}: failed, {reason}")
        if not failures:
            record = collect(recipe, workdir, argv)
            print_message(f"wrote {write_report(recipe, workdir, record)}", result=True)

    return report_input_errors(run) or (FAILED if failures else 0)


if __name__ == "__main__":
    sys.exit(main())
