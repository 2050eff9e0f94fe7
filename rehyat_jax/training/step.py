"""The step that every stage shares: propose an update, make it if it is useful, average the parameters.

A harmful update is skipped: one whose loss or gradient is not finite, or whose gradient norm is far above its running
mean.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from rehyat_jax.parallel.sharding import like_params
from rehyat_jax.training.keys import step_key

Params = Any
Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
Context = dict[str, Any]
"""Arrays that a step reads but does not change: "null_text" [L, text_dim] (the embedding of no caption), "frozen" (the
parameters that are not in training), "teacher" (the parameters of a teacher of its own). They are an argument because
XLA would bake a closure's weights into the program. In an update there is also "step", int32 [], the number of steps
made."""

GradFn = Callable[[Params, Context, Batch, jax.Array], tuple[Metrics, Params]]
"""(params, context, batch, key) -> (metrics, gradients)."""


class Proposal(NamedTuple):
    """An update that a step may make.

    Attributes:
      metrics: "loss" and others.
      norm: float32 [], norm of the gradient, which decides about skipping.
      params, opt_state: the parameters and the optimizer's state after the update.
    """

    metrics: Metrics
    norm: jax.Array
    params: Params
    opt_state: Any


UpdateFn = Callable[[Params, Any, Context, Batch, jax.Array], Proposal]
"""(params, opt_state, context, batches [accumulation_steps, B, ...], key) -> the update."""

State = dict[str, Any]
"""The fields are:

  - step: int32 [], number of steps made
  - params, ema: float32 trees; ema is {} if no average is kept, and may be of a part of params
  - opt_state: state of the optimizer
  - updates, skipped_in_a_row: int32 [], number of updates made, and of skipped ones up to the last step
  - usual_norm: float32 [], running mean of the gradient norm, which decides about skipping
"""

NORM_DECAY = 0.99
"""Decay of the running mean of gradient norms."""
UPDATES_BEFORE_SPIKES = 100
"""Number of updates that the running mean needs before a norm is compared with it."""


def all_of(params: Params) -> Params:
    """The part of the parameters that is averaged in most stages."""
    return params


def init_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    *,
    keep_ema: bool,
    averaged: Callable[[Params], Params] = all_of,
) -> State:
    """State before the first step; `averaged` is the part of the parameters whose average is kept."""
    return {
        "step": jnp.zeros((), jnp.int32),
        "updates": jnp.zeros((), jnp.int32),
        "skipped_in_a_row": jnp.zeros((), jnp.int32),
        "usual_norm": jnp.zeros((), jnp.float32),
        "params": params,
        "opt_state": optimizer.init(params),
        "ema": jax.tree.map(jnp.copy, averaged(params)) if keep_ema else {},
    }


def state_specs(abstract: State, specs: Any, averaged: Callable[[Params], Params] = all_of) -> State:
    """The PartitionSpecs of a state: moments and averages are sharded like their parameters."""
    return {
        **dict.fromkeys(("step", "updates", "skipped_in_a_row", "usual_norm"), PartitionSpec()),
        "params": specs,
        "opt_state": like_params(abstract["opt_state"], abstract["params"], specs),
        "ema": averaged(specs) if abstract["ema"] else {},
    }


def accumulate(grad_fn: GradFn, parts: int) -> GradFn:
    """`grad_fn` over `parts` batches [parts, B, ...], one after another; metrics and gradients are means."""
    first_of = lambda batches: jax.tree.map(lambda x: x[0], batches)
    if parts == 1:
        return lambda params, context, batches, key: grad_fn(params, context, first_of(batches), key)
    grad_fn = jax.jit(grad_fn, inline=True)  # traced once, for its shapes and for the scan

    def accumulated(params: Params, context: Context, batches: Batch, key: jax.Array) -> tuple[Metrics, Params]:
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(grad_fn, params, context, first_of(batches), key)
        )

        def add(total: Any, part: tuple[Batch, jax.Array]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, grad_fn(params, context, *part)), None

        total, _ = jax.lax.scan(add, zeros, (batches, jax.random.split(key, parts)))
        return jax.tree.map(lambda x: x / parts, total)

    return accumulated


def gradient_update(grad_fn: GradFn, optimizer: optax.GradientTransformation) -> UpdateFn:
    """One update of the optimizer; `grad_fn` takes all batches of a step, see `accumulate`."""

    def update(params: Params, opt_state: Any, context: Context, batches: Batch, key: jax.Array) -> Proposal:
        metrics, grads = grad_fn(params, context, batches, key)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return Proposal(metrics, optax.tree.norm(grads), optax.apply_updates(params, updates), opt_state)

    return update


def is_useful(state: State, loss: jax.Array, norm: jax.Array, spike_factor: float) -> jax.Array:
    """bool []: true if an update with this loss and gradient norm should be made.

    Args:
      spike_factor: largest allowed ratio of a norm to its running mean; 0 allows any finite norm.
    """
    is_finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    if not spike_factor:
        return is_finite
    is_usual = (state["updates"] < UPDATES_BEFORE_SPIKES) | (norm <= spike_factor * state["usual_norm"])
    return is_finite & is_usual


def make_step(
    update_fn: UpdateFn,
    *,
    seed: int,
    ema_decay: float,
    spike_factor: float,
    averaged: Callable[[Params], Params] = all_of,
) -> Callable[[State, Context, Batch], tuple[State, Metrics]]:
    """(state, context, batches [accumulation_steps, B, ...]) -> (state, metrics).

    A run depends only on its configuration, seed and data, even if it is stopped and resumed. A step without a useful
    update (`is_useful`) changes neither parameters nor average nor optimizer.
    """

    def step(state: State, context: Context, batch: Batch) -> tuple[State, Metrics]:
        key = step_key(seed, state["step"])
        context = {**context, "step": state["step"]}
        metrics, norm, params, opt_state = update_fn(state["params"], state["opt_state"], context, batch, key)
        useful = is_useful(state, metrics["loss"], norm, spike_factor)
        # XLA selects in the same pass over memory as the update itself.
        keep = lambda new, old: jax.tree.map(lambda new, old: jnp.where(useful, new, old), new, old)
        params = keep(params, state["params"])
        average = lambda: optax.incremental_update(averaged(params), state["ema"], 1 - ema_decay)
        ema = state["ema"] and keep(average(), state["ema"])
        # The plain mean of the norms while they are few.
        weight = jnp.maximum(1 - NORM_DECAY, 1 / (state["updates"] + 1))
        usual_norm = state["usual_norm"] + weight * (norm - state["usual_norm"])
        skipped_in_a_row = jnp.where(useful, 0, state["skipped_in_a_row"] + 1)
        metrics |= {"gradient_norm": norm, "skipped_in_a_row": skipped_in_a_row}
        return {
            "step": state["step"] + 1,
            "updates": state["updates"] + useful,
            "skipped_in_a_row": skipped_in_a_row,
            "usual_norm": keep(usual_norm, state["usual_norm"]),
            "params": params,
            "opt_state": keep(opt_state, state["opt_state"]),
            "ema": ema,
        }, metrics

    return step
