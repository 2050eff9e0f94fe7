"""Static cycles of one attention layer on TPUs, none needed: python -m rehyat_jax.benchmarks.tpu_static [options].

Compiles the layer for the TPU ahead of time, and computes its cost from the compiler's listings
(docs/static_cycles.md). Compares hybrid attention (3 frames a chunk, 1 of overlap, with feature maps, bfloat16) with
full softmax attention, by JAX's splash kernels and by this package's. Cycles are issue cycles without stalls: they
show ratios and bottlenecks, not seconds.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from rehyat_jax.attention.hybrid.backend import IMPLEMENTATIONS
from rehyat_jax.benchmarks import tpu_cases, vae_static
from rehyat_jax.benchmarks.splash_blocks import SPLASH_BLOCKS, search, splash_arguments
from rehyat_jax.benchmarks.tpu_report import details, growth, table_head, table_line
from rehyat_jax.cli import CommandParser, report_input_errors
from rehyat_jax.cost_model.static_cycles import SPLASH_DATA, ProgramCost, StaticProgram, assumed_data
from rehyat_jax.cost_model.tpu_bundles import generation_of
from rehyat_jax.cost_model.tpu_compile import CompiledProgram, DoesNotFitError, compiled_for_tpu
from rehyat_jax.cost_model.tpu_target import check_libtpu
from rehyat_jax.errors import InputError
from rehyat_jax.files.write import written_whole
from rehyat_jax.models.wan.config import WAN_PRESETS

PRESETS = {name.lower().removeprefix("t2v-"): preset for name, preset in WAN_PRESETS.items()}

DIRECTIONS = ("forward", "backward", "phi_backward")

RUN_TIME_DATA = {"fixed shift": 0.0, "running maximum": 1.0, "huge": 1e30}
"""Assumed values of numbers that decide control flow but exist only when a kernel runs. In "pallas_tpu" they are the
flags of chunks whose scores may be too large for a fixed shift. The first value holds for models that normalise queries
and keys. Each value with a different cost has its own row."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A program to compile: `function` of `tpu_cases`, its keywords, the topology, and its names in the table."""

    topology: str
    preset: str
    implementation: str
    function: str
    keywords: dict

    @property
    def frames(self) -> int:
        return self.keywords["frames"]

    @property
    def direction(self) -> str:
        return self.keywords["direction"]

    @property
    def is_splash(self) -> bool:
        return self.function == "full_softmax"


@dataclasses.dataclass(frozen=True)
class Result:
    """The cost of a case and its program; both are None if the program does not fit into the chip's memory.

    `run_time_data` is the assumed key of RUN_TIME_DATA, or None if the assumption makes no difference.
    """

    case: Case
    cost: ProgramCost | None
    program: CompiledProgram | None
    run_time_data: str | None = None


def main(argv: list[str] | None = None) -> int:
    return report_input_errors(lambda: run(parse_arguments(argv)))


def run(arguments: argparse.Namespace) -> None:
    """Computes the costs of all cases and prints a table of them, line by line.

    Raises:
      InputError: libtpu is missing, or an argument is wrong.
    """
    if arguments.search:
        for topology in arguments.topology:
            search_blocks(topology, arguments)
        return
    check_libtpu()
    if arguments.vae:
        print(f"{_versions()}; one chip; a step of the stream is one latent frame\n")
        vae_static.report(arguments.topology, arguments.height, arguments.width, arguments.frames, arguments.json)
        return
    print(f"{_versions()}; {arguments.tokens_per_frame} tokens a frame; one chip (tpu7x: one of its two cores)\n")
    print(table_head())
    rows = []
    for group in groups(arguments):
        results = [result for case in group for result in costs(case)]
        for result in results:
            rows.append(row(result, results))
            print(table_line(rows[-1], result.cost), flush=True)
            if arguments.details and result.cost is not None:
                print(f"\n{details(result.cost)}\n", flush=True)
    print("\n".join(["", *growth(rows)]))
    if arguments.json:
        with written_whole(arguments.json) as temporary:
            temporary.write_text(json.dumps(rows, indent=1) + "\n")


def _versions() -> str:
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("libtpu", "jax"))


def groups(arguments: argparse.Namespace) -> Iterator[list[Case]]:
    """The cases that are compared with one another: one topology, preset and length."""
    for topology, preset, frames in itertools.product(arguments.topology, arguments.preset, arguments.frames):
        model = PRESETS[preset]
        shape = {
            "heads": model.num_heads,
            "head_dim": model.head_dim,
            "frames": frames,
            "tokens_per_frame": arguments.tokens_per_frame,
        }
        blocks = SPLASH_BLOCKS[generation_of(topology)]
        splash = [(name, splash_arguments(name, blocks)) for name in ("splash", "splash_fused", "splash_unfused")]
        if arguments.forms is not None:
            for name, direction in itertools.product(chosen_forms(arguments.forms), ("forward", "backward")):
                yield [Case(topology, preset, name, "form", shape | {"name": name, "direction": direction})]
            continue
        hybrid = [
            (name, {"implementation": name, "direction": direction})
            for name, direction in itertools.product(arguments.implementations, DIRECTIONS)
        ]
        softmax = [{"name": "softmax", "direction": direction} for direction in ("forward", "backward")]
        yield [
            *(Case(topology, preset, name, "full_softmax", shape | keywords) for name, keywords in splash),
            *(Case(topology, preset, "softmax", "form", shape | keywords) for keywords in softmax),
            *(Case(topology, preset, name, "hybrid", shape | keywords) for name, keywords in hybrid),
        ]


def chosen_forms(texts: list[str]) -> list[str]:
    """The forms whose names contain one of the texts; all without texts. Raises InputError if there is none."""
    found = [name for name in tpu_cases.FORMS if not texts or any(text in name for text in texts)]
    if not found:
        raise InputError(f"--forms {' '.join(texts)}: expected texts of {', '.join(tpu_cases.FORMS)}; found none")
    return found


def costs(case: Case) -> list[Result]:
    """Compiles a case and computes its cost, once for each of RUN_TIME_DATA that changes it."""
    function = f"rehyat_jax.benchmarks.tpu_cases:{case.function}"
    try:
        with compiled_for_tpu(function, case.keywords, case.topology) as compiled:
            program = StaticProgram(compiled)
    except DoesNotFitError:
        return [Result(case, None, None)]
    if case.is_splash:
        return [Result(case, program.cost(SPLASH_DATA), compiled)]
    if not program.depends_on_data:
        return [Result(case, program.cost(), compiled)]
    assumed: dict[int, tuple[str, ProgramCost]] = {}
    for name, data in RUN_TIME_DATA.items():
        cost = program.cost(functools.partial(assumed_data, others=data))
        assumed.setdefault(cost.cycles, (name, cost))
    return [Result(case, cost, compiled, name if len(assumed) > 1 else None) for name, cost in assumed.values()]


def row(result: Result, compared: list[Result]) -> dict:
    """The result as a JSON object.

    `ratio_to_splash` is splash attention's cycles in the same direction divided by this case's cycles. Backward, it
    uses the faster of splash attention's two variants that fit into memory. Gradients of only the feature maps are
    compared with its backward pass. `mxu_utilization` is the share of matrix unit slots in use in the inner loop of the
    kernel with the most matrix products.
    """
    case, cost = result.case, result.cost
    passes = "forward" if case.direction == "forward" else "backward"
    splash = [r.cost.cycles for r in compared if r.cost and r.case.is_splash and r.case.direction == passes]
    main_kernel = cost and cost.main_kernel
    return {
        "topology": case.topology,
        "preset": case.preset,
        "frames": case.frames,
        "direction": case.direction,
        "implementation": case.implementation
        + (f" ({result.run_time_data})" if result.run_time_data not in (None, next(iter(RUN_TIME_DATA))) else ""),
        "cycles": cost and cost.cycles,
        "ratio_to_splash": min(splash) / cost.cycles if cost and splash else None,
        "mxu_utilization": main_kernel and float(main_kernel.inner_loop.busy[0]),
        "kernel_cycles": cost and cost.kernel_cycles,
        "xla_cycles": cost and cost.xla_cycles,
        "mxu_cycles": cost and round(sum(kernel.mxu_cycles for kernel in cost.kernels)),
        "temporary_bytes": result.program and result.program.temporary_bytes,
        "total_bytes": result.program and result.program.total_bytes,
        "run_time_data": result.run_time_data,
        "tokens_per_frame": case.keywords["tokens_per_frame"],
        "libtpu": importlib.metadata.version("libtpu"),
    }


def search_blocks(topology: str, arguments: argparse.Namespace) -> None:
    """Searches splash attention's block sizes at the first given preset and length, and prints the best."""
    generation = generation_of(topology)
    splash = next(groups(argparse.Namespace(**vars(arguments) | {"topology": [topology]})))[0]

    def cycles(keywords: dict) -> int | None:
        (result,) = costs(dataclasses.replace(splash, keywords=splash.keywords | keywords))
        return result.cost and result.cost.cycles

    print(f'"{generation}": {search(cycles, SPLASH_BLOCKS[generation])}', flush=True)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line; argparse itself exits with code 2 on a wrong one."""
    parser = CommandParser("benchmarks.tpu_static", __doc__, "--topology v5e:2x2 --frames 21 81")
    option = parser.add_argument
    default = " (default: %(default)s)"
    option("--topology", nargs="+", default=["v5e:2x2"], help="v5e:2x2 v5p:2x2x1 v6e:2x2 tpu7x:2x2x1..." + default)
    option("--preset", nargs="+", choices=sorted(PRESETS), default=["1.3b"], help="heads and their width" + default)
    option("--frames", nargs="+", type=int, default=[21], help="latent frames" + default)
    option("--height", type=int, default=480, help="of the video, in pixels" + default)
    option("--width", type=int, default=832, help="of the video, in pixels" + default)
    option("--tokens-per-frame", type=int, help="in place of height and width")
    option(
        "--implementations",
        nargs="+",
        choices=IMPLEMENTATIONS,
        default=["pallas_tpu", "xla"],
        help="of hybrid_attention" + default,
    )
    option("--json", type=Path, metavar="FILE", help="also write the rows there")
    option("--details", action="store_true", help="also print what binds every part of every kernel")
    forms = "compare all forms of attention instead, or those whose names contain a TEXT"
    option("--forms", nargs="*", metavar="TEXT", help=forms)
    option("--vae", action="store_true", help="cost of Wan2.1's VAE instead, decoding and encoding (minutes each)")
    option("--search", action="store_true", help="search splash attention's block sizes instead")
    arguments = parser.parse_args(argv)
    # A token is two by two latent pixels; a latent pixel is eight by eight pixels.
    arguments.tokens_per_frame = arguments.tokens_per_frame or (arguments.height // 16) * (arguments.width // 16)
    if min(*arguments.frames, arguments.tokens_per_frame) < 1:
        parser.error("expected at least one frame of one token")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
