"""The command `rehyat`, one name for all commands: `rehyat train ...` is `python -m rehyat_jax.train ...`."""

import argparse
import runpy
import sys

from rehyat_jax.files.shown import closest, shown

COMMANDS = {
    "demo": "make a ReHyAt model of a small video transformer, in 14 minutes on two CPU cores",
    "convert": "convert checkpoints from and to PyTorch",
    "prepare": "prepare training examples from videos, from latents, or from a teacher",
    "train": "train a model: one stage, as a configuration describes it",
    "recipe": "train a student in several stages, and evaluate it",
    "sample": "make videos from prompts",
    "evaluate": "compare a student with its teacher",
    "plan": "estimate memory and time of a run, without its hardware",
    "surgery": "choose a form of attention for every block",
    "study": "train and compare variants over several seeds",
    "compare": "compare training runs",
    "completion": "print a script that completes command lines in a shell",
}
"""Name of a command, which is also its module's -> what it does."""

EPILOG = """
Configurations, such as configs/demo_distill.py, come with the package. One of the same name in the working directory
takes precedence.

example:
  rehyat demo --quick
  rehyat train --help
"""


def parser() -> argparse.ArgumentParser:
    """The parser of `rehyat` itself, with the commands as subparsers without options."""
    made = argparse.ArgumentParser(
        prog="rehyat",
        description="Recurrent hybrid attention (ReHyAt) for video diffusion transformers, in JAX.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--version", action="store_true", help="print the version and exit")
    commands = made.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    return made


def main(argv: list[str] | None = None) -> int:
    """Runs a command, whose own process this then is; returns the exit code, 2 for a wrong command line."""
    argv = sys.argv[1:] if argv is None else argv
    name, *arguments = argv or [""]
    if name in COMMANDS:
        return _run(name, arguments)
    if name and not name.startswith("-"):
        print(
            f"error: rehyat has no command '{shown(name)}'; did you mean '{closest(name, COMMANDS)[0]}'?",
            file=sys.stderr,
        )
        return 2
    made = parser()
    if made.parse_args(argv).version:
        from importlib.metadata import version  # takes longer than the rest

        print(f"rehyat-jax {version('rehyat-jax')}")
        return 0
    made.print_help(sys.stderr)
    return 2


def _run(name: str, arguments: list[str]) -> int:
    """Runs a command's module as `python -m` does: its processes of data find it as their parent's main module."""
    from rehyat_jax import cli  # imports JAX

    cli.started_by_rehyat = True
    sys.argv = [name, *arguments]
    runpy.run_module(f"rehyat_jax.{name}", run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
