"""The step that every stage shares: accumulate gradients, apply the optimizer, average the parameters.

An update that would do harm is left out: where the loss or the gradient is not finite, or the gradient's norm is far
above what it usually is.
"""

from collections.abc import Callable
from typing import Any

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
"""What a step reads but does not change: "frozen" (the teacher's parameters, when distilling) and "null_text"
[L, text_dim] (the embedding of no caption). An argument, not a closure: XLA would bake weights into the program."""

GradFn = Callable[[Params, Context, Batch, jax.Array], tuple[Metrics, Params]]
"""(params, context, batch, key) -> (metrics, gradients)."""

State = dict[str, Any]
"""step: int32 []; params, ema: float32 trees (ema is {} when none is kept); opt_state: the optimizer's. What decides
about skipping: updates and skipped_in_a_row, int32 []; usual_norm, float32 [], of the gradients."""

NORM_DECAY = 0.99
"""Of the running mean of gradient norms; a norm is compared with it once this many updates have formed it:"""
UPDATES_BEFORE_SPIKES = 100


def init_state(params: Params, optimizer: optax.GradientTransformation, *, keep_ema: bool) -> State:
    """State before the first step."""
    return {
        "step": jnp.zeros((), jnp.int32),
        "updates": jnp.zeros((), jnp.int32),
        "skipped_in_a_row": jnp.zeros((), jnp.int32),
        "usual_norm": jnp.zeros((), jnp.float32),
        "params": params,
        "opt_state": optimizer.init(params),
        "ema": jax.tree.map(jnp.copy, params) if keep_ema else {},
    }


def state_specs(abstract: State, specs: Any) -> State:
    """The PartitionSpecs of a state: moments and averages are where their parameters are."""
    return {
        **dict.fromkeys(("step", "updates", "skipped_in_a_row", "usual_norm"), PartitionSpec()),
        "params": specs,
        "opt_state": like_params(abstract["opt_state"], abstract["params"], specs),
        "ema": specs if abstract["ema"] else {},
    }


def accumulate(grad_fn: GradFn, parts: int) -> GradFn:
    """`grad_fn` over `parts` batches [parts, B, ...], one after another; metrics and gradients are means."""
    first_of = lambda batches: jax.tree.map(lambda x: x[0], batches)
    if parts == 1:
        return lambda params, context, batches, key: grad_fn(params, context, first_of(batches), key)

    def accumulated(params: Params, context: Context, batches: Batch, key: jax.Array) -> tuple[Metrics, Params]:
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(grad_fn, params, context, first_of(batches), key)
        )

        def add(total: Any, part: tuple[Batch, jax.Array]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, grad_fn(params, context, *part)), None

        total, _ = jax.lax.scan(add, zeros, (batches, jax.random.split(key, parts)))
        return jax.tree.map(lambda x: x / parts, total)

    return accumulated


def is_useful(state: State, loss: jax.Array, norm: jax.Array, spike_factor: float) -> jax.Array:
    """bool []: whether an update with this loss and gradient norm is to be made.

    Args:
      spike_factor: how many times its usual size a norm may be; 0 for any finite one.
    """
    is_finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    if not spike_factor:
        return is_finite
    is_usual = (state["updates"] < UPDATES_BEFORE_SPIKES) | (norm <= spike_factor * state["usual_norm"])
    return is_finite & is_usual


def make_step(
    grad_fn: GradFn,
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    accumulation_steps: int,
    ema_decay: float,
    spike_factor: float,
) -> Callable[[State, Context, Batch], tuple[State, Metrics]]:
    """(state, context, batches [accumulation_steps, B, ...]) -> (state, metrics).

    A run is a function of its configuration, seed and data, however often it is stopped and resumed. A step that makes
    no useful update (`is_useful`) leaves parameters, average and optimizer as they are.
    """
    grad_fn = accumulate(grad_fn, accumulation_steps)

    def step(state: State, context: Context, batch: Batch) -> tuple[State, Metrics]:
        metrics, grads = grad_fn(state["params"], context, batch, step_key(seed, state["step"]))
        norm = optax.tree.norm(grads)
        useful = is_useful(state, metrics["loss"], norm, spike_factor)
        # In the same pass over memory as the update itself.
        keep = lambda new, old: jax.tree.map(lambda new, old: jnp.where(useful, new, old), new, old)
        updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
        params = keep(optax.apply_updates(state["params"], updates), state["params"])
        ema = state["ema"] and keep(optax.incremental_update(params, state["ema"], 1 - ema_decay), state["ema"])
        # The mean of the norms so far, as long as they are few.
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
