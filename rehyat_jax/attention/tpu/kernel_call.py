"""The call of a TPU kernel with named operands."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from rehyat_jax.attention.tpu.blocks import HeadBlocks

Operands = Mapping[str, tuple[Any, Any] | None]


def call_kernel(
    name: str,
    kernel: Callable[[dict, dict, dict], None],
    grid: tuple[int, ...],
    inputs: Operands,
    outputs: Operands,
    scratch: dict[str, Any] | None = None,
    *,
    parallel: int,
    aliases: dict[str, str] | None = None,
    vmem_bytes: int | None = None,
) -> dict[str, jax.Array]:
    """Runs `kernel(inputs, outputs, scratch)`, three dictionaries of references, over a grid.

    Args:
      inputs: name -> (array or tuple of arrays, BlockSpec or tuple of them); None is skipped.
      outputs: name -> (ShapeDtypeStruct or tuple, BlockSpec or tuple).
      scratch: name -> memory.
      parallel: number of leading grid axes that carry nothing from step to step; the others run in order.
      aliases: output name -> name of the input whose memory it reuses; blocks that are never written keep their values.
      vmem_bytes: VMEM that the kernel may use, if more than the compiler's limit for kernels.

    Returns: name -> array or tuple of arrays, as `outputs`.
    """
    inputs = {key: value for key, value in inputs.items() if value is not None}
    arrays, in_specs = ({key: value[n] for key, value in inputs.items()} for n in range(2))
    shapes, out_specs = ({key: value[n] for key, value in outputs.items()} for n in range(2))
    run = pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[in_specs],
        out_specs=[out_specs],
        out_shape=[shapes],
        scratch_shapes=[scratch or {}],
        input_output_aliases={
            _leaf(arrays, source): _leaf(shapes, target) for target, source in (aliases or {}).items()
        },
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * parallel + ("arbitrary",) * (len(grid) - parallel),
            vmem_limit_bytes=vmem_bytes,
        ),
        name=name,
    )
    # Mosaic has only one product of 16-bit matrices, which is exact anyway.
    is_short = any(leaf.dtype.itemsize == 2 for leaf in jax.tree.leaves(arrays))
    with jax.default_matmul_precision("default" if is_short else "highest"):
        (results,) = run(arrays)
    return results


def _leaf(tree: dict[str, Any], name: str) -> int:
    """The position of the array tree[name] among the leaves of `tree`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return next(n for n, (path, _) in enumerate(leaves) if path[0].key == name)


def token_blocks(array: jax.Array, rows: int, index: Callable[..., jax.Array]) -> tuple[jax.Array, pl.BlockSpec]:
    """An input [batch, tokens, heads, width] of which a step reads `rows` tokens; see `HeadBlocks.spec`."""
    blocks = HeadBlocks.of(array)
    return blocks.view(array), blocks.spec(rows, index)


def new_rows(batch: int, heads: int, blocks: int, rows: int, index: Callable[..., jax.Array]):
    """An output of one float32 a token, [batch, heads, blocks, 1, rows]: `rows` tokens lie along a register's lanes."""
    spec = pl.BlockSpec((None, None, None, 1, rows), lambda b, h, *step: (b, h, index(*step), 0, 0))
    return jax.ShapeDtypeStruct((batch, heads, blocks, 1, rows), jnp.float32), spec


def row_blocks(values: jax.Array, rows: int, index: Callable[..., jax.Array]) -> tuple[jax.Array, pl.BlockSpec]:
    """An input in the layout of `new_rows`, `rows` tokens a step. Its own blocks may be a multiple of these."""
    batch, heads = values.shape[:2]
    values = values.reshape(batch, heads, -1, 1, rows)
    return values, new_rows(batch, heads, values.shape[2], rows, index)[1]


def per_head(matrices: tuple[jax.Array, ...]) -> tuple[tuple[jax.Array, ...], tuple[pl.BlockSpec, ...]]:
    """Inputs [heads, rows, columns]; a step reads the matrix of its head."""
    specs = tuple(pl.BlockSpec((None, *matrix.shape[1:]), lambda b, h, *_: (h, 0, 0)) for matrix in matrices)
    return matrices, specs


def weight_gradients(matrices: tuple[jax.Array, ...], batch: int):
    """Outputs [batch, heads, rows, columns], float32, that stay in VMEM while the grid walks over one head's tokens."""
    shapes = tuple(jax.ShapeDtypeStruct((batch, *matrix.shape), jnp.float32) for matrix in matrices)
    specs = tuple(pl.BlockSpec((None, None, *shape.shape[2:]), lambda b, h, *_: (b, h, 0, 0)) for shape in shapes)
    return shapes, specs


def state_block(states: Any, index: Callable[..., jax.Array]) -> tuple[Any, pl.BlockSpec]:
    """One head's matrix of [states, batch, heads, rows, columns]; `index` as in `HeadBlocks.spec`."""
    return states, pl.BlockSpec((None, None, None, *states.shape[-2:]), lambda b, h, *step: (index(*step), b, h, 0, 0))


def scalars(values: jax.Array | None) -> tuple[jax.Array, pl.BlockSpec] | None:
    """An input in scalar memory that every step can read completely."""
    return None if values is None else (values, pl.BlockSpec(memory_space=pltpu.SMEM))
