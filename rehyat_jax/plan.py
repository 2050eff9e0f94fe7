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
  --table                            alone: plan the runs that configs/ lists, and write docs/planned_runs.md

Exit codes:

  0  the run fits into the chips' memory
  2  the user's input is wrong
  3  the run does not fit; the command then searches for the smallest change that would fit

Example:

  python -m rehyat_jax.plan --config configs/wan_1_3b_distill.py --topology v5e:4x4 --config.remat=block
"""

import json
import shlex
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
from absl import flags

from rehyat_jax.cli import printed_help, report_input_errors
from rehyat_jax.cost_model.chips import device_count
from rehyat_jax.data.sources import SOURCES
from rehyat_jax.errors import InputError
from rehyat_jax.files.write import check_place, written_whole
from rehyat_jax.generation.codecs import LATENT_SIZES
from rehyat_jax.models.wan.config import WAN_PRESETS, WanConfig
from rehyat_jax.planning import table
from rehyat_jax.planning.planner import Plan, Request, make_plan
from rehyat_jax.planning.remedies import smallest_remedy
from rehyat_jax.planning.report import report
from rehyat_jax.training.command_line import parsed_config
from rehyat_jax.training.setup import student_config
from rehyat_jax.training.stages import STAGES
from rehyat_jax.weights.load import open_checkpoint

DOES_NOT_FIT = 3


def plan(request: Request, json_file: Path | None = None) -> int:
    """Plans, reports and returns the exit code. Raises InputError."""
    if json_file is not None:
        check_place(json_file)
    found = announced_plan(request)
    print(report(found), flush=True)
    result = found.to_json()
    if json_file is not None:
        _write(json_file, result)
    if found.fits:
        return 0
    remedy = smallest_remedy(found, announced_plan)
    print(f"\nwould fit: {remedy}" if remedy else "\nno change of those known here would fit")
    if json_file is not None:
        _write(json_file, {**result, "remedy": remedy and str(remedy)})
    return DOES_NOT_FIT


def _write(json_file: Path, result: dict[str, Any]) -> None:
    with written_whole(json_file) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")


def announced_plan(request: Request) -> Plan:
    config = request.config
    axes = " ".join(f"{axis}={size}" for axis, size in config.mesh.items())
    with progress(
        f"compiling the step for {request.topology}: {axes} accumulation_steps={config.accumulation_steps} "
        f"remat={config.remat}; this takes minutes"
    ):
        return make_plan(request)


def plan_table(arguments: Sequence[str] = ("--table",)) -> None:
    """Plans the runs that the configurations list and docs/measurements/planned_runs.json lacks; writes both files.

    A run that cannot be planned here, because its compiler is not installed, is named and keeps its record, if any.

    Raises:
      InputError: there are other arguments, this is not the repository's root, or the recorded plans are damaged.
    """
    if list(arguments) != ["--table"]:
        raise InputError(f"--table takes no other arguments, found {list(arguments)}")
    runs, records = table.planned_runs(), table.read_records()
    for number, run in enumerate(runs, 1):
        if run in records:
            continue
        print(f"run {number} of {len(runs)}: {run}", file=sys.stderr, flush=True)
        try:
            records[run] = table.record(announced_plan(parse_arguments(["plan", *shlex.split(run)]).request))
        except InputError as error:
            print(f"  not planned: {error}", file=sys.stderr, flush=True)
            continue
        table.write_records({run: records[run] for run in runs if run in records})
    table.write_table(runs, records)
    print(f"wrote {table.TABLE}")


@contextmanager
def progress(message: str) -> Iterator[None]:
    """Prints a message on stderr, and the elapsed time every half minute until the block ends."""
    print(message, file=sys.stderr, flush=True)
    done, start = threading.Event(), time.monotonic()

    def tick() -> None:
        while not done.wait(30):
            print(f"  {time.monotonic() - start:.0f} seconds", file=sys.stderr, flush=True)

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        print(f"  done in {time.monotonic() - start:.0f} seconds", file=sys.stderr, flush=True)


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
    if printed_help(argv, __doc__):
        return 0
    # The plan is for the topology, not for devices of this machine.
    jax.config.update("jax_platforms", "cpu")
    if "--table" in argv:
        return report_input_errors(lambda: plan_table(argv[1:]))
    code = 0

    def run() -> None:
        nonlocal code
        code = plan(*parse_arguments(argv))

    return report_input_errors(run) or code


if __name__ == "__main__":
    sys.exit(main())
