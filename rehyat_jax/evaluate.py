"""Evaluates models.

  python -m rehyat_jax.evaluate vbench-videos ...   videos for VBench and VBench-2.0, see docs/vbench.md

Options: each command explains its own with --help.
"""

import sys

from rehyat_jax.cli import CommandParser
from rehyat_jax.evaluation.vbench import command as vbench

COMMANDS = {"vbench-videos": vbench.main}


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        return COMMANDS[argv[0]](argv[1:])
    parser = CommandParser("evaluate", __doc__, "vbench-videos --help")
    parser.add_argument("command", choices=COMMANDS, help="what to do")
    parser.parse_args(argv)
    return 2


if __name__ == "__main__":
    sys.exit(main())
