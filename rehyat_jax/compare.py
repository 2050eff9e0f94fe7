"""Compares two or more training runs: python -m rehyat_jax.compare RUN RUN ... [--out PAGE.md].

A run is the workdir of `rehyat_jax.train`. The command prints tables in Markdown: the fields of the configuration that
differ, the last and the lowest value of every metric, and the seconds of a step. --out writes them as a page, with the
curves as a picture next to it. A run may still be training.
"""

import sys
from pathlib import Path

from rehyat_jax.cli import CommandParser, print_message, report_input_errors
from rehyat_jax.errors import InputError
from rehyat_jax.files.write import check_place
from rehyat_jax.studies.run_comparison import check_different, comparison, read_run, write_comparison


def make_parser() -> CommandParser:
    """The parser of the command line."""
    parser = CommandParser("compare", __doc__, "runs/demo/distill runs/demo/distill_bidirectional --out compared.md")
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="workdirs of training runs, two or more")
    parser.add_argument("--out", type=Path, metavar="PAGE.md", help="page to write, with a picture of the same name")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and compares; returns the exit code, 2 if the user's input is wrong."""
    arguments = make_parser().parse_args(argv)

    def run() -> None:
        page = arguments.out
        if page is not None:
            if page.suffix != ".md":
                raise InputError(f"--out: expected a name that ends in .md, found {page.name!r}; give such a name")
            check_place(page)
        runs = [read_run(workdir) for workdir in arguments.runs]
        check_different(runs)
        print(comparison(runs))
        if page is not None:
            write_comparison(runs, page)
            print_message(f"wrote {page}", result=True)

    return report_input_errors(run)


if __name__ == "__main__":
    sys.exit(main())
