"""A fused kernel for Hopper GPUs (Pallas, Mosaic GPU): a window, its linear state and their joint normalisation.

The kernel follows FlashAttention-3 (arXiv 2407.08608). Two warpgroups of 64 queries each alternate between tensor cores
and exponentials, while a third one keeps a ring of buffers full. The linear branch adds steps to the same ring. After
the window's keys and values come tiles of phi_query in place of keys, and tiles of the state in place of values.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from rehyat_jax.attention.hybrid.parts import LOWEST_LINEAR_SHIFT
from rehyat_jax.attention.hybrid.state import LinearState

HEAD_DIM = 128
_WARPGROUPS, _ROWS = 2, 64  # compute warpgroups of a block, and queries of each
_BLOCK = 128  # keys, or features, of a step
_SMEM_TILE_ROWS = 8  # rows of a tile of shared memory that wgmma reads
_STAGES = 2
_ROW_LAYOUT = plgpu.Layout.WGMMA.reduce(1)  # one number for each row of a product
_LOG2_E = math.log2(math.e)


def hopper_window_forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    num_keys: jax.Array,
    phi_query: jax.Array,
    linear: LinearState,
    *,
    stabilizer: str,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The forward of `WindowKernels` (fused_window.py) in one kernel, for either stabilizer.

    If the number of tokens is not a multiple of 8, the arrays are copied to pad them. Wan's chunks need no padding.

    Args:
      query, key, value: bfloat16 or float16, head_dim 128.
      phi_query: features in query's dtype, their number a multiple of 128.
    """
    windows, num_queries, heads, head_dim = query.shape
    tile = _WARPGROUPS * _ROWS
    query, phi_query = _pad_tokens(query, tile), _pad_tokens(phi_query, tile)
    key, value = _pad_tokens(key, _BLOCK), _pad_tokens(value, _BLOCK)
    mass = jnp.swapaxes(jnp.sum(phi_query * linear.normalizer[:, None], axis=-1), 1, 2)

    statistics = jax.ShapeDtypeStruct(mass.shape, jnp.float32)
    kernel = plgpu.kernel(
        functools.partial(_kernel, stabilizer=stabilizer, scale=head_dim**-0.5),
        out_type=(jax.ShapeDtypeStruct(query.shape, query.dtype), statistics, statistics),
        grid=(pl.cdiv(query.shape[1], tile), heads, windows),
        grid_names=("tile", "head", "window"),
        num_threads=_WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=dict(
            query_smem=plgpu.SMEM((_WARPGROUPS, _ROWS, head_dim), query.dtype),
            left_smem=plgpu.SMEM((_STAGES, _BLOCK, head_dim), query.dtype),
            right_smem=plgpu.SMEM((_STAGES, _BLOCK, head_dim), query.dtype),
            statistic_smem=plgpu.SMEM((_WARPGROUPS, 2, _ROWS), jnp.float32),
            query_arrived=plgpu.Barrier(num_arrivals=2, num_barriers=_WARPGROUPS),
            left_arrived=plgpu.Barrier(num_barriers=_STAGES),
            right_arrived=plgpu.Barrier(num_barriers=_STAGES),
            left_consumed=plgpu.Barrier(num_arrivals=_WARPGROUPS, num_barriers=_STAGES),
            right_consumed=plgpu.Barrier(num_arrivals=_WARPGROUPS, num_barriers=_STAGES),
            turn=plgpu.Barrier(num_arrivals=_WARPGROUPS),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )
    state = linear.state.astype(phi_query.dtype)
    output, log_sum_exp, linear_weight = kernel(num_keys, query, key, value, phi_query, state, mass)
    return output[:, :num_queries], log_sum_exp[..., :num_queries], linear_weight[..., :num_queries]


def _pad_tokens(array: jax.Array, least: int) -> jax.Array:
    """Pads the tokens [n, tokens, ...] with zeros to a multiple of 8, and to at least `least`.

    The last tile or block of an array is moved back to end with the array, so the array must hold at least one. Tiles
    of shared memory have 8 rows, so a copy must start at a multiple of 8: otherwise layout inference finds no solution.
    """
    tokens = array.shape[1]
    padded = max(least, pl.cdiv(tokens, _SMEM_TILE_ROWS) * _SMEM_TILE_ROWS)
    return jnp.pad(array, [(0, 0), (0, padded - tokens)] + [(0, 0)] * (array.ndim - 2))


def _kernel(
    num_keys_ref,
    query_ref,
    key_ref,
    value_ref,
    phi_ref,
    state_ref,
    mass_ref,
    output_ref,
    log_sum_exp_ref,
    linear_weight_ref,
    *,
    stabilizer,
    scale,
    query_smem,
    left_smem,
    right_smem,
    statistic_smem,
    query_arrived,
    left_arrived,
    right_arrived,
    left_consumed,
    right_consumed,
    turn,
):
    head, window = lax.axis_index("head"), lax.axis_index("window")
    warpgroup = lax.axis_index("warpgroup")
    rows, keys, features = query_ref.shape[1], key_ref.shape[1], phi_ref.shape[3]
    # The last tile is moved back to end with the last query. Rows that two tiles compute have equal results.
    tile_start = jnp.minimum(lax.axis_index("tile") * (_WARPGROUPS * _ROWS), rows - _WARPGROUPS * _ROWS)
    num_keys = num_keys_ref[window]
    key_steps = pl.cdiv(num_keys, _BLOCK)
    linear_steps = features // _BLOCK

    @pl.when(warpgroup == _WARPGROUPS)
    def _load():
        plgpu.set_max_registers(40, action="decrease")

        def load(step):
            slot = lax.rem(step, _STAGES)

            @pl.when(step < key_steps)
            def _window():
                block = (window, pl.ds(jnp.minimum(step * _BLOCK, keys - _BLOCK), _BLOCK), head)
                plgpu.copy_gmem_to_smem(key_ref.at[block], left_smem.at[slot], left_arrived.at[slot])
                plgpu.copy_gmem_to_smem(value_ref.at[block], right_smem.at[slot], right_arrived.at[slot])

            @pl.when(step >= key_steps)
            def _linear():
                block = pl.ds((step - key_steps) * _BLOCK, _BLOCK)
                tile = (window, pl.ds(tile_start, _WARPGROUPS * _ROWS), head, block)
                plgpu.copy_gmem_to_smem(phi_ref.at[tile], left_smem.at[slot], left_arrived.at[slot])
                plgpu.copy_gmem_to_smem(state_ref.at[window, head, block], right_smem.at[slot], right_arrived.at[slot])

        for step in range(_STAGES):
            load(jnp.int32(step))

        # Wait until all steps are consumed, not only loaded: a barrier must not outlive its last phase.
        @pl.loop(_STAGES, key_steps + linear_steps + _STAGES)
        def _refill(step):
            slot = lax.rem(step, _STAGES)
            plgpu.barrier_wait(left_consumed.at[slot])
            plgpu.barrier_wait(right_consumed.at[slot])
            pl.when(step < key_steps + linear_steps)(lambda: load(step))

    @pl.when(warpgroup < _WARPGROUPS)
    def _compute():
        plgpu.set_max_registers(232, action="increase")
        start = tile_start + warpgroup * _ROWS
        my_rows = (window, pl.ds(start, _ROWS), head)
        my_query, my_statistic = query_smem.at[warpgroup], statistic_smem.at[warpgroup]
        plgpu.copy_gmem_to_smem(query_ref.at[my_rows], my_query, query_arrived.at[warpgroup])
        plgpu.copy_gmem_to_smem(
            mass_ref.at[window, head, pl.ds(start, _ROWS)], my_statistic.at[0], query_arrived.at[warpgroup]
        )
        plgpu.barrier_wait(query_arrived.at[warpgroup])
        mass = my_statistic[0]

        per_row = lambda statistic, array: lax.broadcast_in_dim(statistic, array.shape, [0])

        def take_turns():
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        def softmax_step(step, carry, mask=False):
            """Adds a block of keys; scores are in base 2, and weights are relative to the maximum so far."""
            maximum, total, accumulated = carry
            slot = lax.rem(step, _STAGES)
            plgpu.barrier_wait(left_arrived.at[slot])

            def compute_scores(accumulator):
                plgpu.wgmma(accumulator, my_query, left_smem.at[slot].transpose((1, 0)))
                take_turns()
                return accumulator[...]

            scores = pl.run_scoped(compute_scores, plgpu.ACC((_ROWS, _BLOCK), jnp.float32))
            plgpu.barrier_arrive(left_consumed.at[slot])
            scores = scores * (scale * _LOG2_E)
            if mask:
                # The last block is moved back too: its first keys may have been seen.
                first = jnp.minimum(step * _BLOCK, keys - _BLOCK)
                index = first + lax.broadcasted_iota(jnp.int32, scores.shape, 1)
                scores = jnp.where((index >= step * _BLOCK) & (index < num_keys), scores, -jnp.inf)
            new_maximum = jnp.maximum(maximum, scores.max(axis=1))
            rescale = jnp.exp2(maximum - new_maximum)
            weights = jnp.exp2(scores - per_row(new_maximum, scores))
            total = total * rescale + weights.sum(axis=1)
            accumulated = accumulated * per_row(rescale, accumulated)
            narrow = weights.astype(query_ref.dtype)
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(right_arrived.at[slot])
            plgpu.barrier_wait(turn)

            def add_values(accumulator):
                plgpu.wgmma(accumulator, narrow, right_smem.at[slot])

            accumulated = pl.run_state(add_values)(plgpu.ACC.init(accumulated))
            plgpu.barrier_arrive(right_consumed.at[slot])
            return new_maximum, total, accumulated

        pl.when(warpgroup == 1)(take_turns)
        # Constants have no layout of their own; a loop's carry needs one.
        statistic = lambda value: plgpu.layout_cast(jnp.full((_ROWS,), value, jnp.float32), _ROW_LAYOUT)
        accumulated = plgpu.layout_cast(jnp.zeros((_ROWS, HEAD_DIM), jnp.float32), plgpu.Layout.WGMMA)
        carry = statistic(-jnp.inf), statistic(0.0), accumulated
        full_steps = lax.div(num_keys, _BLOCK)
        carry = lax.fori_loop(0, full_steps, softmax_step, carry)
        carry = lax.fori_loop(full_steps, key_steps, functools.partial(softmax_step, mask=True), carry)
        maximum, total, accumulated = carry
        pl.when(warpgroup == 0)(take_turns)

        def linear_values(accumulator):
            for i in range(linear_steps):
                slot = lax.rem(key_steps + i, _STAGES)
                plgpu.barrier_wait(left_arrived.at[slot])
                plgpu.barrier_wait(right_arrived.at[slot])
                my_phi = left_smem.at[slot, pl.ds(warpgroup * _ROWS, _ROWS)]
                plgpu.wgmma(accumulator, my_phi, right_smem.at[slot])
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(left_consumed.at[slot])
                plgpu.barrier_arrive(right_consumed.at[slot])
            return accumulator[...]

        linear = pl.run_scoped(linear_values, plgpu.ACC((_ROWS, HEAD_DIM), jnp.float32))

        # The formula of window.py, in base 2. The softmax branch is relative to `maximum` so far.
        if stabilizer == "row_max":
            shift, linear_scale = maximum, jnp.ones_like(mass)
        else:
            shift = jnp.maximum(maximum + jnp.log2(total), jnp.log2(mass))
            linear_scale = jnp.exp2(-jnp.maximum(shift, LOWEST_LINEAR_SHIFT * _LOG2_E))
        softmax_scale = jnp.exp2(maximum - shift)
        all_mass = softmax_scale * total + linear_scale * mass
        softmax_weight, linear_weight = softmax_scale / all_mass, linear_scale / all_mass
        output = per_row(softmax_weight, accumulated) * accumulated + per_row(linear_weight, linear) * linear

        my_query[...] = output.astype(query_ref.dtype)
        my_statistic[0] = (shift + jnp.log2(all_mass)) / _LOG2_E
        my_statistic[1] = linear_weight
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(my_query, output_ref.at[my_rows])
        my_columns = (window, head, pl.ds(start, _ROWS))
        plgpu.copy_smem_to_gmem(my_statistic.at[0], log_sum_exp_ref.at[my_columns])
        plgpu.copy_smem_to_gmem(my_statistic.at[1], linear_weight_ref.at[my_columns])
        plgpu.wait_smem_to_gmem(0)


def why_not_hopper(query: jax.Array, phi_query: jax.Array) -> str | None:
    """The reason why the kernel cannot take these arrays, and the remedy; None if it can."""
    if query.dtype not in (jnp.bfloat16, jnp.float16) or phi_query.dtype != query.dtype:
        return (
            f"the Hopper kernel takes queries and features of one dtype, bfloat16 or float16, found {query.dtype} and "
            f'{phi_query.dtype}: cast them, or use implementation="xla"'
        )
    if query.shape[-1] != HEAD_DIM or phi_query.shape[-1] % _BLOCK:
        return (
            f"the Hopper kernel takes head_dim {HEAD_DIM} and a multiple of {_BLOCK} features, found "
            f'{query.shape[-1]} and {phi_query.shape[-1]}: use implementation="cudnn"'
        )
    return None
