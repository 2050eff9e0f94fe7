"""Static cycles of Wan2.1's VAE: `tpu_static --vae`."""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from rehyat_jax.benchmarks.tpu_cases import Case
from rehyat_jax.cli import not_a_command
from rehyat_jax.cost_model.chips import chip_of
from rehyat_jax.cost_model.hlo_operations import executed_operations
from rehyat_jax.cost_model.memory_bound import memory_bytes
from rehyat_jax.cost_model.static_cycles import StaticProgram
from rehyat_jax.cost_model.tpu_compile import DoesNotFitError, compiled_for_tpu
from rehyat_jax.files.write import written_whole
from rehyat_jax.models.wan_vae.config import WanVaeConfig
from rehyat_jax.models.wan_vae.flops import decode_flops, encode_flops
from rehyat_jax.models.wan_vae.modeling import PIXEL_CHANNELS, WanAutoencoder
from rehyat_jax.models.wan_vae.vae import decode_stream, encode_stream, initial_decoder_state, initial_encoder_state

METHODS = {"decode": decode_flops, "encode": encode_flops}

LAYOUT = ("copy", "pad", "broadcast", "transpose", "reshape", "slice", "concatenate")
"""Operations that only move data."""

_COLUMNS = (
    "TPU | method | size | latent frames a call | M cycles a latent frame | least of the products | ratio | kernels | "
    "other products | layout | rest | s a clip | peak HBM, GiB"
)


def stream_step(method: str, height: int, width: int, steps: int = 1, config: dict[str, Any] | None = None) -> Case:
    """`steps` steps of the streaming form in bfloat16: one latent frame each. `config` is that of `WanVaeConfig`."""
    sizes = WanVaeConfig.from_dict(config or {})
    make = lambda: WanAutoencoder(sizes, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    graphdef, state = nnx.split(nnx.eval_shape(make))
    params = nnx.to_pure_dict(state)
    if method == "encode":
        shape = (1, sizes.time_factor * steps, height, width, PIXEL_CHANNELS)
        stream, initial, sides = encode_stream, initial_encoder_state, (height, width)
    else:
        sides = (height // sizes.space_factor, width // sizes.space_factor)
        shape = (1, steps, *sides, sizes.z_dim)
        stream, initial = decode_stream, initial_decoder_state
    caches = jax.eval_shape(lambda params: initial(graphdef, params, 1, *sides), params)
    step = jax.jit(lambda *arguments: stream(graphdef, *arguments), donate_argnums=2)
    return step, (params, jax.ShapeDtypeStruct(shape, jnp.float32), caches)


def report(topologies: list[str], height: int, width: int, latent_frames: list[int], json_file: Path | None) -> None:
    """Prints the table, and writes its rows: for calls of one latent frame, as sampling makes them, and of a clip.

    Raises:
      InputError: libtpu is missing, or a topology is unknown.
    """
    print(f"| {_COLUMNS} |\n{'|---' * 13}|")
    rows = []
    for topology, method in itertools.product(topologies, METHODS):
        costs = {steps: step_cost(topology, method, height, width, steps=steps) for steps in {1, *latent_frames}}
        for frames in latent_frames:
            for steps in sorted({1, frames}):
                rows.append(row(topology, method, height, width, frames, steps, costs[steps]))
                print(line(rows[-1]), flush=True)
    if json_file:
        with written_whole(json_file) as temporary:
            temporary.write_text(json.dumps(rows, indent=1) + "\n")


def step_cost(
    topology: str, method: str, height: int, width: int, *, steps: int = 1, **keywords: Any
) -> dict[str, Any] | None:
    """The cost of one of the steps of `stream_step`, as a part of `row`; None if they do not fit into memory."""
    function = f"{__name__}:{stream_step.__name__}"
    arguments = {"method": method, "height": height, "width": width, "steps": steps, **keywords}
    try:
        with compiled_for_tpu(function, arguments, topology) as program:
            cost = StaticProgram(program).cost()
    except DoesNotFitError:
        return None
    # Operations with a matrix product are not among these.
    moved = memory_bytes(executed_operations(program.hlo, of_fusions=True))
    cycles_of = {"kernels": cost.kernel_cycles} | dict.fromkeys(("products", "layout", "rest"), 0)
    for operation in cost.xla:
        kind = "products" if operation.name not in moved else "layout" if operation.kind in LAYOUT else "rest"
        cycles_of[kind] += operation.estimated_cycles * operation.executions
    return {
        "cycles": cost.cycles / steps,
        "cycles_of": {kind: cycles / steps for kind, cycles in cycles_of.items()},
        "kernels": [
            {
                "name": kernel.name,
                "cycles": kernel.cycles / steps,
                "matrix_unit_share": kernel.mxu_cycles / kernel.cycles,
            }
            for kernel in cost.kernels
        ],
        "other_traffic_seconds": sum(moved.values()) / steps / chip_of(topology).hbm_bandwidth,
        "peak_bytes": program.peak_bytes,
        "output_bytes": program.output_bytes,
    }


def row(
    topology: str, method: str, height: int, width: int, latent_frames: int, steps: int, cost: dict[str, Any] | None
) -> dict[str, Any]:
    """The cost of one step, and of a clip, as a JSON object.

    A call codes `steps` latent frames. All calls run one program, so they cost the same. `least_cycles` are those of a
    step if the FLOPs of the clip ran at the peak of the matrix units. `cycles_of` divides the cycles of a step among
    Pallas kernels, XLA's operations with matrix products, operations that only move data, and the rest. `kernels` has
    each kernel, in the order of the program. `other_traffic_seconds` is the least time of HBM for the last two kinds.
    `peak_bytes` is the memory of the call.
    """
    config, chip = WanVaeConfig(), chip_of(topology)
    frames = config.time_factor * (latent_frames - 1) + 1
    flops = METHODS[method](config, frames, height, width)
    least = flops / latent_frames / chip.flops_per_cycle
    return {
        "topology": topology,
        "method": method,
        "height": height,
        "width": width,
        "frames": frames,
        "steps": latent_frames,
        "steps_of_a_call": steps,
        "flops": flops,
        "least_cycles": least,
        "ratio": cost and cost["cycles"] / least,
        "seconds": cost and latent_frames * cost["cycles"] / chip.clock,
        **(cost or {"cycles": None}),
    }


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    cells = [row["topology"], row["method"], f"{row['height']}x{row['width']}x{row['frames']}"]
    cells.append(str(row["steps_of_a_call"]))
    if row["cycles"] is None:
        return f"| {' | '.join([*cells, 'does not fit into memory', *[''] * 8])} |"
    millions = lambda cycles: f"{cycles / 1e6:,.1f}"
    cells += [millions(row["cycles"]), millions(row["least_cycles"]), f"{row['ratio']:.2f}"]
    cells += map(millions, row["cycles_of"].values())
    cells += [f"{row['seconds']:.1f}", f"{row['peak_bytes'] / 2**30:.2f}"]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(not_a_command(__doc__, "benchmarks.tpu_static"))
