"""A training step on the mesh in use, with the shardings of its arguments and results."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import ml_collections
import optax
from jax.sharding import PartitionSpec

from rehyat_jax.parallel.sharding import BATCHES, shardings
from rehyat_jax.training.compiler_options import compiler_options
from rehyat_jax.training.step import Context, Params, State, UpdateFn, all_of, init_state, make_step, state_specs


class ShardedStep(NamedTuple):
    """A compiled step and its state.

    Attributes:
      step: (state, context, batches [accumulation_steps, B, ...]) -> (state, metrics); the state is donated.
      initial_state: (parameters, context) -> the state before the first step; the parameters are donated.
      state_shardings: the shardings of a state.
    """

    step: Callable[..., Any]
    initial_state: Callable[[Params, Context], State]
    state_shardings: State


def make_sharded_step(
    update_fn: UpdateFn,
    optimizer: optax.GradientTransformation,
    params: Params,
    specs: Any,
    context: Context,
    config: ml_collections.ConfigDict,
    *,
    start: Callable[[Params, Context], Params] = lambda params, context: params,
    averaged: Callable[[Params], Params] = all_of,
) -> ShardedStep:
    """`make_step` with explicit shardings on the mesh in use.

    Args:
      update_fn: the update of a step.
      optimizer: the optimizer whose state it changes.
      params, context: the trained and the constant arrays, perhaps abstract; context's arrays carry their shardings.
      specs: PartitionSpecs of params.
      config: seed, ema_decay and spike_factor are read.
      start: (params, context) -> the parameters in training, which may have them several times.
      averaged: the parameters in training -> those whose moving average is kept.
    """

    def init(params: Params, context: Context) -> State:
        return init_state(start(params, context), optimizer, keep_ema=config.ema_decay > 0, averaged=averaged)

    state_shardings = shardings(state_specs(jax.eval_shape(init, params, context), start(specs, {}), averaged))
    options = dict(ema_decay=config.ema_decay, spike_factor=config.spike_factor, averaged=averaged)
    step = make_step(update_fn, seed=config.seed, **options)
    context_shardings = jax.tree.map(lambda leaf: leaf.sharding, context)
    return ShardedStep(
        jax.jit(
            step,
            in_shardings=(state_shardings, context_shardings, shardings(BATCHES)),
            out_shardings=(state_shardings, shardings(PartitionSpec())),
            donate_argnums=0,
            compiler_options=compiler_options(),
        ),
        jax.jit(init, in_shardings=(None, context_shardings), out_shardings=state_shardings, donate_argnums=0),
        state_shardings,
    )
