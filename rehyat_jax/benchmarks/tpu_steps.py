"""Static cycles and memory of a model's steps on a TPU, none needed: python -m rehyat_jax.benchmarks.tpu_steps.

Compiles two programs of a complete transformer for each choice of its blocks, and counts as `plan` does (docs/plan.md):

- train: forward and backward pass for the gradients of all parameters, of one video a device. Parameters are float32,
  products are bfloat16, and every block keeps only its input. There is no optimizer.
- sample: one step of the solver with guidance, as `plan --sample` compiles it. `--quantize` also compiles it with
  products of 8 bits.

Cycles are issue cycles without stalls, and the compiler's estimates for its own operations.
"""

import argparse
import dataclasses
import importlib.metadata
import itertools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from rehyat_jax.cli import CommandParser, progress, report_input_errors
from rehyat_jax.cost_model.chips import chip_of, device_count
from rehyat_jax.cost_model.hlo_operations import executed_operations
from rehyat_jax.cost_model.memory_bound import memory_bytes
from rehyat_jax.cost_model.tpu_compile import DoesNotFitError, compiled_for_tpu
from rehyat_jax.errors import InputError
from rehyat_jax.extras import check_installed
from rehyat_jax.files.write import written_whole
from rehyat_jax.generation.codecs import WanVaeLatents
from rehyat_jax.generation.options import number, size
from rehyat_jax.models.wan.config import WAN_PRESETS, WanConfig
from rehyat_jax.models.wan.flops import forward_flops, training_flops
from rehyat_jax.models.wan.modeling import WanTransformer, apply_model
from rehyat_jax.models.wan.quantized import Numbers
from rehyat_jax.parallel.mesh import AXES, BATCH
from rehyat_jax.parallel.sharding import abstract_arrays, param_specs, shardings
from rehyat_jax.planning.estimate import cycles_of_kernels, program_cost
from rehyat_jax.planning.sampling import programs
from rehyat_jax.planning.sampling.command import with_hybrid_blocks
from rehyat_jax.training.compiler_options import compiler_options

BLOCKS = {"softmax": "none", "mixed": "half", "hybrid": "all"}
"""Choices of a model's hybrid blocks: none of them, every other one, all."""


@dataclasses.dataclass(frozen=True)
class Step:
    """A step to compile, for one video a device.

    Attributes:
      direction: "train" or "sample".
      blocks: key in `BLOCKS`.
      wan: the model, with these blocks.
      latents: frames, height and width of a video's latents.
      quantize: numbers of the products in sampling, see `SamplingOptions`; None for bfloat16.
    """

    direction: str
    blocks: str
    wan: WanConfig
    latents: tuple[int, int, int]
    quantize: Numbers | None = None

    @property
    def flops(self) -> int:
        """Operations of matrix products for one video, recomputed ones included."""
        if self.direction == "train":
            return sum(training_flops(self.wan, self.latents, remat="block", trains_weights=True)[:2])
        count = forward_flops(self.wan, self.latents)
        return 2 * (count.outside + count.blocks)

    def case(self, devices: int) -> tuple[str, dict[str, Any]]:
        """The function and its arguments for `compiled_for_tpu`."""
        mesh = dict.fromkeys(AXES, 1)
        model = {"model": self.wan.to_dict(), "latents": list(self.latents)}
        if self.direction == "train":
            return f"{__spec__.name}:lowered_gradient", model | {"mesh": mesh | {"fsdp": devices}}
        sampling = {"part": "transformer", "guided": True, "stream": False, "quantize": self.quantize}
        return f"{programs.__name__}:lowered", model | sampling | {"mesh": mesh | {"tensor": devices}}


def lowered_gradient(
    devices: Sequence[jax.Device], *, model: dict[str, Any], latents: Sequence[int], mesh: dict[str, int]
) -> jax.stages.Lowered:
    """Loss and gradients of all parameters of a model, for one video a device."""
    wan = WanConfig.from_dict(model)
    with jax.set_mesh(programs.mesh_of(devices, mesh)):
        make = lambda: WanTransformer(wan, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, remat="block")
        graphdef, params = nnx.split(nnx.eval_shape(make))
        specs = param_specs(params)
        arguments = [abstract_arrays(nnx.to_pure_dict(params), shardings(specs))]
        videos = mesh["fsdp"]
        for shape in ((*latents, wan.in_channels), (), (wan.text_length, wan.text_dim)):
            batch = jax.ShapeDtypeStruct((videos, *shape), jnp.float32, sharding=shardings(PartitionSpec(BATCH)))
            arguments.append(batch)

        def loss(params, *inputs):
            return jnp.square(apply_model(graphdef)(params, *inputs)).mean()

        step = jax.jit(
            jax.value_and_grad(loss),
            out_shardings=(shardings(PartitionSpec()), shardings(specs)),
            compiler_options=compiler_options(),
        )
        return step.lower(*arguments)


def measured(step: Step, topology: str, devices: int, *, details: int = 0) -> dict[str, Any]:
    """A row of the result. Compiling takes minutes.

    Args:
      details: number of the dearest kernels and operations to print.
    """
    start = time.monotonic()
    row: dict[str, Any] = {"direction": step.direction, "blocks": step.blocks, "topology": topology}
    row["products"] = step.quantize or "bfloat16"
    try:
        with compiled_for_tpu(*step.case(devices), topology, for_all_devices=True) as program:
            row["compile_seconds"] = round(time.monotonic() - start, 1)
            static = program_cost(program, step.wan)
            moved = memory_bytes(list(executed_operations(program.hlo, of_fusions=True)))
            row["cycles"] = cycles_of_kernels(static, moved, chip_of(topology)) + static.xla_cycles
            row["peak_bytes"] = program.peak_bytes + program.code_bytes
            row |= {"kernel_cycles": row["cycles"] - static.xla_cycles, "temporary_bytes": program.temporary_bytes}
            for line in _dearest(static, details):
                print(line, flush=True)
    except DoesNotFitError as error:
        row |= {"compile_seconds": round(time.monotonic() - start, 1), "cycles": None, "peak_bytes": None}
        print(f"{step.direction} {step.blocks}: does not fit: {error}")
    return row | {"flops": step.flops, "devices": devices, "libtpu": importlib.metadata.version("libtpu")}


def _dearest(static: Any, count: int) -> list[str]:
    costs = [(kernel.cycles, f"kernel {kernel.name}, {kernel.calls} times") for kernel in static.kernels]
    for operation in static.xla:
        cycles = operation.estimated_cycles * operation.executions
        costs.append((cycles, f"{operation.name}, {operation.executions} times, {operation.source}"))
    return [f"  {float(cycles) / 1e6:9.1f}  {what}" for cycles, what in sorted(costs, key=lambda c: -c[0])[:count]]


def run(arguments: argparse.Namespace) -> None:
    """Compiles all steps, and prints a table of them, line by line.

    Raises:
      InputError: libtpu is missing, the topology is unknown or has fewer devices, or a size is wrong.
    """
    if arguments.devices > device_count(arguments.topology):
        raise InputError(
            f"--devices {arguments.devices}: expected at most {device_count(arguments.topology)}, the devices of "
            f"{arguments.topology}"
        )
    if arguments.quantize != ["none"]:
        check_installed("--quantize", "qwix")
    preset = WAN_PRESETS[arguments.preset]
    latents = WanVaeLatents().latent_shape(arguments.frames, *arguments.size)[:3]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("libtpu", "jax"))
    print(f"{arguments.preset}, {arguments.frames} frames, {arguments.topology}, {versions}\n", flush=True)
    print(
        "| direction | blocks | products | M cycles | of kernels | peak GiB | TFLOP | compile s |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    rows = []
    for direction in arguments.only:
        products = arguments.quantize if direction == "sample" else ["none"]
        for blocks, quantize in itertools.product(arguments.blocks, products):
            count = {"half": str(preset.num_layers // 2)}.get(BLOCKS[blocks], BLOCKS[blocks])
            numbers = None if quantize == "none" else quantize
            step = Step(direction, blocks, with_hybrid_blocks(preset, count), latents, numbers)
            with progress(f"compiling {direction}, {blocks}, {numbers or 'bfloat16'}"):
                rows.append(measured(step, arguments.topology, arguments.devices, details=arguments.details))
            print(_line(rows[-1]), flush=True)
            if arguments.json:
                with written_whole(arguments.json) as temporary:
                    temporary.write_text(json.dumps(rows, indent=1) + "\n")


def _line(row: dict[str, Any]) -> str:
    cells = [row["direction"], row["blocks"], row["products"]]
    if row["cycles"] is None:
        cells += ["does not fit", "", ""]
    else:
        cells += [f"{row[name] / 1e6:,.0f}" for name in ("cycles", "kernel_cycles")]
        cells.append(f"{row['peak_bytes'] / 2**30:.1f}")
    cells += [f"{row['flops'] / 1e12:.0f}", f"{row['compile_seconds']:.0f}"]
    return f"| {' | '.join(cells)} |"


def main(argv: list[str] | None = None) -> int:
    parser = CommandParser(
        "benchmarks.tpu_steps", __doc__, "--topology v5p:2x2x1 --devices 1 --only train --json rows.json"
    )
    option = parser.add_argument
    default = " (default: %(default)s)"
    option("--topology", default="v5p:2x2x1", help="v5e:2x2 v5p:2x2x1 v6e:2x2 tpu7x:2x2x1..." + default)
    option("--devices", type=number(int, 1, 1_000), default=1, help="of the topology" + default)
    option("--preset", choices=sorted(WAN_PRESETS), default="t2v-1.3B", help="size of the transformer" + default)
    option("--size", type=size, default="480p", metavar="480p|720p|HxW", help="of the video in pixels" + default)
    option("--frames", type=number(int, 1, 1_000_000), default=81, help="of the video" + default)
    option("--only", nargs="+", choices=("train", "sample"), default=["train", "sample"], help="steps to compile")
    option("--blocks", nargs="+", choices=tuple(BLOCKS), default=list(BLOCKS), help="kinds of blocks")
    products = "numbers of the products in sampling; several are compiled in turn (default: none)"
    option("--quantize", nargs="+", choices=("none", *get_args(Numbers)), default=["none"], help=products)
    option("--details", type=int, default=0, metavar="N", help="also list the N dearest kernels and operations")
    option("--json", type=Path, metavar="FILE", help="also write the rows there")
    return report_input_errors(lambda: run(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
