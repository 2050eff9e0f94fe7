"""Compares libtpu's estimates with a chip's limits: python -m rehyat_jax.benchmarks.xla_estimates [TOPOLOGY ...].

Compiles single operations of a 14B block without a TPU. The table has the compiler's `estimated_cycles` next to the
least cycles of the matrix units and of the memory. `rehyat_jax.plan` computes the fast end of a step's time from them.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rehyat_jax.cli import CommandParser, report_input_errors
from rehyat_jax.cost_model.chips import chip_of
from rehyat_jax.cost_model.hlo_operations import executed_operations
from rehyat_jax.cost_model.tpu_target import topology_devices

TOKENS, WIDTH, HIDDEN, HEADS = 32768, 5120, 13824, 40


def normalized(x: jax.Array) -> jax.Array:
    x32 = x.astype(jnp.float32)
    centered = x32 - x32.mean(-1, keepdims=True)
    return (centered * jax.lax.rsqrt(jnp.square(centered).mean(-1, keepdims=True) + 1e-6)).astype(x.dtype)


def heads_first(x: jax.Array) -> jax.Array:
    return x.reshape(TOKENS, HEADS, WIDTH // HEADS).swapaxes(0, 1)


X, ROW = (TOKENS, WIDTH), (WIDTH,)
CASES = {
    "product, x W": (jnp.matmul, [X, (WIDTH, WIDTH)], 2 * TOKENS * WIDTH**2),
    "product, x W1 of the MLP": (jnp.matmul, [X, (WIDTH, HIDDEN)], 2 * TOKENS * WIDTH * HIDDEN),
    "product, gradient of W": (lambda x, y: x.T @ y, [X, X], 2 * TOKENS * WIDTH**2),
    "sum": (jnp.add, [X, X], 0),
    "broadcast": (lambda row: jnp.broadcast_to(row, X), [ROW], 0),
    "layer norm": (normalized, [X], 0),
    "GELU": (jax.nn.gelu, [(TOKENS, HIDDEN)], 0),
    "heads before tokens": (heads_first, [X], 0),
}
"""Name -> (function, shapes of its arguments, FLOPs)."""


def report(topologies: list[str]) -> None:
    """Prints the table. Raises InputError if a topology is unknown or libtpu is missing."""
    print("| topology | operation | estimate, M cycles | matrix units | memory | estimate / larger |")
    print("|---|---|---|---|---|---|")
    for topology in topologies:
        chip = chip_of(topology)
        here = NamedSharding(Mesh(np.array(topology_devices(topology)[:1]), "x"), PartitionSpec())
        for name, (function, shapes, flops) in CASES.items():
            arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=here) for shape in shapes]
            lowered = jax.jit(function, out_shardings=here).lower(*arguments)
            operations = executed_operations(lowered.compile().as_text())
            estimate = sum(x.estimated_cycles * x.executions for x in operations if x.estimated_cycles is not None)
            arrays = [*arguments, lowered.out_info]
            moved = sum(array.size * array.dtype.itemsize for array in arrays)
            products, memory = flops / chip.flops_per_cycle, moved / chip.hbm_bandwidth * chip.clock
            cells = [f"{cycles / 1e6:.2f}" for cycles in (estimate, products, memory)]
            print(f"| {topology} | {name} | {' | '.join(cells)} | {estimate / max(products, memory):.1f} |", flush=True)


def main() -> int:
    parser = CommandParser("benchmarks.xla_estimates", __doc__, "v5e:2x2")
    parser.add_argument("topologies", nargs="*", default=["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
    topologies = parser.parse_args().topologies
    return report_input_errors(lambda: report(topologies))


if __name__ == "__main__":
    # The operations are compiled for the topologies, not for devices of this machine.
    jax.config.update("jax_platforms", "cpu")
    sys.exit(main())
