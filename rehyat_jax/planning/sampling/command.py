"""Plans sampling a video, on any machine: memory and time of the text encoder, the transformer and the VAE.

The three parts take turns in memory. Each is compiled for the topology. docs/plan.md explains how the figures are
computed. Exit codes: 0 the parts fit into the chips' memory, 2 the input is wrong, 3 a part does not fit; the command
then searches for the smallest change that would fit.
"""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from rehyat_jax.attention.forms.hybrid import HybridConfig
from rehyat_jax.cli import CommandParser, progress, report_input_errors
from rehyat_jax.cost_model.chips import device_count
from rehyat_jax.errors import InputError
from rehyat_jax.extras import check_installed
from rehyat_jax.generation.options import axis_and_size, number, size
from rehyat_jax.models.wan.config import WAN_PRESETS, WanConfig
from rehyat_jax.models.wan.quantized import Numbers
from rehyat_jax.planning.outcome import concluded
from rehyat_jax.planning.sampling.plan import (
    COMPANIONS,
    PartPlan,
    Program,
    SamplingPlan,
    SamplingRequest,
    check_request,
    part_plan,
)
from rehyat_jax.planning.sampling.remedies import smallest_remedy
from rehyat_jax.planning.sampling.report import SAMPLING, planned_samplings, report


def plan(request: SamplingRequest, json_file: Path | None = None) -> int:
    """Plans, reports and returns the exit code. Raises InputError."""
    check_request(request)
    remedy = lambda found: smallest_remedy(found, announced_part)
    return concluded(lambda: announced_plan(request), report, remedy, json_file)


def announced_plan(request: SamplingRequest) -> SamplingPlan:
    check_request(request)
    return SamplingPlan(request, {name: announced_part(program) for name, program in request.programs().items()})


def announced_part(program: Program) -> PartPlan:
    mesh = " ".join(f"{axis}={size}" for axis, size in program.mesh.items() if size > 1) or "one device"
    with progress(f"compiling the {program.part} for {program.topology}: {mesh}; this takes minutes") as report:
        return part_plan(program, report)


def plan_table(again: Sequence[str]) -> None:
    """Plans rows of docs/planned_sampling.md, by default those that the record lacks; see `PlanTable.update`.

    Raises:
      InputError: no row contains one of the texts `again`, this is not the repository's root, or the recorded plans are
        damaged.
    """
    if not SAMPLING.page.parent.is_dir():
        raise InputError(f"{SAMPLING.page.parent}: expected the folder of the documentation; run in the repository")
    of_run = lambda run: announced_plan(request_of(parser().parse_args(shlex.split(run))))
    SAMPLING.update(planned_samplings(), lambda run: of_run(run).to_json(), again)


def hybrid_blocks(text: str) -> str:
    """An argparse type: "all", "none", or a number of blocks."""
    if text not in ("all", "none") and not (text.isascii() and text.isdigit() and len(text) < 5):
        raise argparse.ArgumentTypeError(f'expected "all", "none" or a number of blocks, found {text!r}')
    return text


def with_hybrid_blocks(wan: WanConfig, asked: str) -> WanConfig:
    """A model some of whose blocks are hybrid, evenly spaced: 15 of 30 are every other one, from the second.

    Raises:
      InputError: the model has fewer blocks.
    """
    count = {"all": wan.num_layers, "none": 0}.get(asked)
    count = int(asked) if count is None else count
    if count > wan.num_layers:
        raise InputError(
            f'--hybrid-blocks {asked}: expected "all", "none" or at most {wan.num_layers}, the model\'s blocks'
        )
    if not count:
        return wan
    blocks = tuple((2 * number + 1) * wan.num_layers // (2 * count) for number in range(count))
    return wan.replace(hybrid_blocks="all" if count == wan.num_layers else blocks, hybrid=HybridConfig())


def parser() -> CommandParser:
    """The parser of the command line, without `--sample` and `--table`."""
    example = "--preset t2v-1.3B --hybrid-blocks all --stream --frames 81 --topology v5e:1x1"
    made = CommandParser("plan --sample", __doc__, example)
    option = made.add_argument
    default = " (default: %(default)s)"
    option("--preset", choices=tuple(COMPANIONS), required=True, help="size of the transformer")
    option("--topology", required=True, help="a slice of TPUs, v5e:1x1 or v6e:2x4, or the GPUs of a host, h100:1")
    option(
        "--hybrid-blocks",
        type=hybrid_blocks,
        metavar="all|N|none",
        default="all",
        help="blocks with hybrid attention; N of them are evenly spaced" + default,
    )
    option("--stream", action="store_true", help="sample part by part, as `sample --stream`; all blocks must be hybrid")
    option("--size", type=size, metavar="480p|720p|HxW", default="480p", help="of the video in pixels" + default)
    option("--frames", type=number(int, 1, 1_000_000), default=81, help="of the video" + default)
    option("--steps", type=number(int, 1, 10_000), default=50, help="of the solver" + default)
    option("--guidance-scale", type=number(float, 0, 1000), default=5.0, help="1 turns guidance off" + default)
    option(
        "--mesh",
        nargs="+",
        type=axis_and_size,
        metavar="AXIS=DEVICES",
        default=[],
        help="shard the transformer along data, fsdp, context or tensor over all devices (default: chosen)",
    )
    numbers = "multiply numbers of 8 bits in the transformer's blocks (default: bfloat16)"
    option("--quantize", choices=get_args(Numbers), help=numbers)
    option("--json", type=Path, metavar="FILE", help="also write all figures")
    return made


def request_of(arguments: argparse.Namespace) -> SamplingRequest:
    """The request of a command line. Raises InputError if its values are not valid together."""
    device_count(arguments.topology)
    if arguments.quantize is not None:
        check_installed(f"--quantize {arguments.quantize}", "qwix")
    return SamplingRequest(
        preset=arguments.preset,
        wan=with_hybrid_blocks(WAN_PRESETS[arguments.preset], arguments.hybrid_blocks),
        video=(arguments.frames, *arguments.size),
        topology=arguments.topology,
        steps=arguments.steps,
        guided=arguments.guidance_scale != 1,
        stream=arguments.stream,
        mesh=tuple(arguments.mesh),
        quantize=arguments.quantize,
    )


def main(argv: Sequence[str]) -> int:
    """Plans with the arguments of `plan`, among them --sample; returns the exit code."""
    argv = [argument for argument in argv if argument != "--sample"]
    if argv[:1] == ["--table"]:
        return report_input_errors(lambda: plan_table(argv[1:]))
    arguments = parser().parse_args(argv)
    code = 0

    def run() -> None:
        nonlocal code
        code = plan(request_of(arguments), arguments.json)

    return report_input_errors(run) or code
