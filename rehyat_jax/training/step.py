"""The update that every stage shares: accumulate gradients, apply the optimizer, average the parameters."""

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
"""step: int32 []; params, ema: float32 trees (ema is {} when none is kept); opt_state: the optimizer's."""


def init_state(params: Params, optimizer: optax.GradientTransformation, *, keep_ema: bool) -> State:
    """State before the first step."""
    return {
        "step": jnp.zeros((), jnp.int32),
        "params": params,
        "opt_state": optimizer.init(params),
        "ema": jax.tree.map(jnp.copy, params) if keep_ema else {},
    }


def state_specs(abstract: State, specs: Any) -> State:
    """The PartitionSpecs of a state: moments and averages are where their parameters are."""
    return {
        "step": PartitionSpec(),
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


def make_step(
    grad_fn: GradFn, optimizer: optax.GradientTransformation, *, seed: int, accumulation_steps: int, ema_decay: float
) -> Callable[[State, Context, Batch], tuple[State, Metrics]]:
    """(state, context, batches [accumulation_steps, B, ...]) -> (state, metrics).

    A run is a function of its configuration, seed and data, however often it is stopped and resumed.
    """
    grad_fn = accumulate(grad_fn, accumulation_steps)

    def step(state: State, context: Context, batch: Batch) -> tuple[State, Metrics]:
        metrics, grads = grad_fn(state["params"], context, batch, step_key(seed, state["step"]))
        updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        ema = optax.incremental_update(params, state["ema"], 1 - ema_decay) if state["ema"] else state["ema"]
        metrics |= {"gradient_norm": optax.tree.norm(grads)}
        return {"step": state["step"] + 1, "params": params, "opt_state": opt_state, "ema": ema}, metrics

    return step
