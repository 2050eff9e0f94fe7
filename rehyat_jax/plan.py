"""Plans a training run on TPUs or GPUs, none needed: python -m rehyat_jax.plan --config FILE --topology v5e:4x4.

Compiles the configuration's train step for the topology, like `train`, and reports its memory, arithmetic,
communication and time. docs/plan.md explains how the figures are computed. A topology is a slice of TPUs or the GPUs of
a host, h100:8.

Options:

  --config FILE.py                   the configuration
  --topology NAME                    the chips
  --config.field=value ...           as for `train`; docs/configuration.md lists the fields
  --frames N --height H --width W    size of a video in pixels; 81 x 480 x 832 by default
  --json FILE                        also write all figures
  --table [TEXT ...]                 without other options: plan the runs that configs/ lists and that have no record,
                                     and write docs/planned_runs.md; TEXT plans again the runs that contain it
  --sample                           plan sampling a video in place of training; `plan --sample --help` has its options

Exit codes:

  0  the run fits into the chips' memory
  2  the user's input is wrong
  3  the run does not fit; the command then searches for the smallest change that would fit

Example:

  python -m rehyat_jax.plan --config configs/wan_1_3b_distill.py --topology v5e:4x4 --config.remat=block
"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import ml_collections
from absl import flags

from rehyat_jax.cli import printed_help, progress, report_input_errors
from rehyat_jax.cost_model.chips import device_count
from rehyat_jax.data.sources import SOURCES
from rehyat_jax.errors import InputError
from rehyat_jax.generation.codecs import LATENT_SIZES
from rehyat_jax.models.wan.config import WAN_PRESETS, WanConfig
from rehyat_jax.planning import table
from rehyat_jax.planning.outcome import concluded
from rehyat_jax.planning.planner import Plan, Request, make_plan
from rehyat_jax.planning.remedies import smallest_remedy
from rehyat_jax.planning.report import report
from rehyat_jax.planning.sampling import command as sampling_command
from rehyat_jax.training.command_line import parsed_config
from rehyat_jax.training.setup import student_config
from rehyat_jax.training.stages import STAGES
from rehyat_jax.weights.load import open_checkpoint


def plan(request: Request, json_file: Path | None = None) -> int:
    """Plans, reports and returns the exit code. Raises InputError."""
    remedy = lambda found: smallest_remedy(found, announced_plan)
    return concluded(lambda: announced_plan(request), report, remedy, json_file)


def announced_plan(request: Request) -> Plan:
    config = request.config
    axes = " ".join(f"{axis}={size}" for axis, size in config.mesh.items())
    with progress(
        f"compiling the step for {request.topology}: {axes} accumulation_steps={config.accumulation_steps} "
        f"remat={config.remat}; this takes minutes"
    ) as report:
        return make_plan(request, report)


def plan_table(arguments: Sequence[str] = ("--table",)) -> None:
    """Plans runs that the configurations list, by default those that the record lacks; see `PlanTable.update`.

    Args:
      arguments: "--table", and texts that the runs to be planned again contain.

    Raises:
      InputError: no run contains one of the texts, there are other options, this is not the repository's root, or the
        recorded plans are damaged.
    """
    option, *again = arguments
    if option != "--table":
        raise InputError(f"--table takes no other options, found {option}; put texts of runs after it")
    of_run = lambda run: announced_plan(parse_arguments(["plan", *shlex.split(run)]).request)
    table.TRAINING.update(table.planned_runs(), lambda run: table.record(of_run(run)), again)


def planned_model(config: ml_collections.ConfigDict) -> WanConfig:
    """The architecture to train: read from `init_from` if that path exists, otherwise of the size `preset`.

    Raises:
      InputError: the checkpoint is damaged; or it does not exist, and the configuration names no hybrid blocks.
    """
    stage = STAGES[config.stage]
    if stage.starts_from_model and Path(config.init_from).exists():
        return student_config(open_checkpoint(config.init_from).config, config)
    if stage.starts_from_model and not config.hybrid.blocks and not config.forms:
        raise InputError(
            f"config.init_from: {config.init_from} is not here, and config.hybrid.blocks is unset, so which of its "
            f'blocks are hybrid is not known; give --config.hybrid.blocks=all, or indices as "(1,3)"'
        )
    return student_config(WAN_PRESETS[config.preset], config)


def latent_size(config: ml_collections.ConfigDict, size: tuple[int | None, ...]) -> tuple[int, int, int]:
    """Frames, height and width of the latents of a video with a size in pixels. None stands for the codec's default.

    Raises:
      InputError: the codec cannot encode videos of that size.
    """
    codec = LATENT_SIZES[SOURCES[config.data.source].codec]
    pixels = (asked or default for asked, default in zip(size, codec.default_size, strict=True))
    return codec.latent_shape(*pixels)[:3]


class Arguments(NamedTuple):
    request: Request
    json_file: Path | None


def parse_arguments(argv: list[str]) -> Arguments:
    """Reads the command line, whose first element is the program's name.

    Raises:
      InputError: a flag or a field is missing, unknown or wrong, or the values are not valid together.
    """
    values = flags.FlagValues()
    topology = flags.DEFINE_string(
        "topology", None, "a slice of TPUs, v5e:4x4, or the GPUs of a host, h100:8", flag_values=values
    )
    json_file = flags.DEFINE_string("json", None, "file for all figures", flag_values=values)
    size = [
        flags.DEFINE_integer(axis, None, "of a video, in pixels", flag_values=values)
        for axis in ("frames", "height", "width")
    ]
    config = parsed_config(values, argv, topology)
    device_count(topology.value)
    latents = latent_size(config, tuple(flag.value for flag in size))
    request = Request(config, planned_model(config), latents, topology.value)
    return Arguments(request, Path(json_file.value) if json_file.value else None)


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and plans; returns the exit code."""
    argv = sys.argv if argv is None else ["plan", *argv]
    # The plan is for the topology, not for devices of this machine.
    jax.config.update("jax_platforms", "cpu")
    if "--sample" in argv:
        return sampling_command.main(argv[1:])
    if printed_help(argv, __doc__):
        return 0
    if "--table" in argv:
        return report_input_errors(lambda: plan_table(argv[1:]))
    code = 0

    def run() -> None:
        nonlocal code
        code = plan(*parse_arguments(argv))

    return report_input_errors(run) or code


if __name__ == "__main__":
    sys.exit(main())
