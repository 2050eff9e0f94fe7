"""Chooses a form of attention for every block within a budget, as Attention Surgery does (arXiv 2509.24899).

Every candidate form is trained in all blocks (stage 1), and every block's error is measured on held-out examples. An
integer program then chooses one form for each block: the sum of errors is the least within the budget, a fraction of
the cost of softmax attention in all blocks. WORKDIR gets `surgery.json`, `surgery.md`, `surgery.png`, and `config.py`,
which trains the choice with `rehyat_jax.train`. Another budget or cost, or more forms, reuse what was measured. The
same command resumes a stopped one. docs/surgery.md explains the figures.

Options:

  --config FILE.py          configuration of stage 1 for the softmax teacher config.init_from
  --config.field=value ...  other values of its fields
  --workdir WORKDIR         directory of the runs and results
  --budget FRACTION         budget, below 1
  --forms ENTRIES           candidates, as config.forms without blocks; fields that an entry lacks are config.hybrid's
                            (default: strided 2, 4, 8; hybrid with chunks of 1, 3, 5 frames; linear; window)
  --cost NAME               flops, cycles or memory; the last two compile each form for a TPU, which takes minutes
                            (default: flops)
  --topology NAME           slice of TPUs to compile for (default: v5e:2x2)
  --latents TxHxW           latents whose cost counts (default: the largest training examples)
  --data digits|FOLDER      held-out examples; needed if the training examples are a folder
  --examples N              number of held-out examples (default: 64)
  --jobs N                  processes at a time (default: on CPUs as many as cores and memory allow, otherwise 1)

Exit codes:

  0    the choice was made
  2    the user's input is wrong
  3    a candidate failed; the same command tries it again
  75   SIGTERM stopped the command
  130  Ctrl-C stopped the command

Example:

  python -m rehyat_jax.surgery --config configs/demo_distill.py --budget 0.4 --workdir runs/surgery --latents 21x24x24
"""

import shlex
import sys
from pathlib import Path

from absl import flags

from rehyat_jax.cli import print_message, printed_help, report_input_errors
from rehyat_jax.errors import InputError
from rehyat_jax.selection.candidates import DEFAULT_FORMS, parsed_entries
from rehyat_jax.selection.choose import Request, choose
from rehyat_jax.selection.costs import COSTS
from rehyat_jax.training.command_line import parsed_config
from rehyat_jax.training.values import Choice

FAILED = 3
"""The exit code if a candidate failed. 1 is that of a bug."""


def parse_arguments(argv: list[str]) -> Request:
    """Reads the command line, whose first element is the program's name.

    Raises:
      InputError: a flag or a field is missing, unknown or has a wrong value.
    """
    values = flags.FlagValues()
    options = dict(flag_values=values)
    workdir = flags.DEFINE_string("workdir", None, "directory of the runs and results", **options)
    budget = flags.DEFINE_float("budget", None, "fraction of the cost of softmax in all blocks", **options)
    forms = flags.DEFINE_string("forms", None, "candidates", **options)
    cost = flags.DEFINE_string("cost", "flops", "what a form costs", **options)
    topology = flags.DEFINE_string("topology", "v5e:2x2", "slice of TPUs to compile for", **options)
    latents = flags.DEFINE_string("latents", None, "latents whose cost counts", **options)
    data = flags.DEFINE_string("data", "", "held-out examples", **options)
    examples = flags.DEFINE_integer("examples", 64, "held-out examples", 2, 10**6, **options)
    jobs = flags.DEFINE_integer("jobs", None, "processes at a time", 1, 10**4, **options)
    config = parsed_config(values, argv, workdir, budget)
    Choice(COSTS).check(cost.value, "--cost")
    return Request(
        config=config,
        workdir=Path(workdir.value),
        budget=budget.value,
        forms=DEFAULT_FORMS if forms.value is None else parsed_entries(forms.value),
        cost=cost.value,
        topology=topology.value,
        latents=_latents(latents.value),
        data=data.value,
        examples=examples.value,
        jobs=jobs.value,
        command=shlex.join(["python", "-m", "rehyat_jax.surgery", *argv[1:]]),
    )


def _latents(text: str | None) -> tuple[int, int, int] | None:
    if text is None:
        return None
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isascii() and part.isdigit() and 0 < int(part) < 10**5 for part in parts):
        raise InputError(f"--latents: expected FRAMESxHEIGHTxWIDTH, such as 21x60x104, found {text!r}")
    frames, height, width = map(int, parts)
    return frames, height, width


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and chooses; returns the exit code, see above."""
    argv = sys.argv if argv is None else ["surgery", *argv]
    if printed_help(argv, __doc__):
        return 0
    failures: dict[str, str] = {}

    def run() -> None:
        failures.update(choose(parse_arguments(argv)))
        for label, reason in failures.items():
            print_message(f"{label}: failed, {reason}")

    return report_input_errors(run) or (FAILED if failures else 0)


if __name__ == "__main__":
    sys.exit(main())
