"""The update that every stage shares: accumulate gradients, apply the optimizer, average the parameters."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

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


def accumulate(grad_fn: GradFn, parts: int) -> GradFn:
    """`grad_fn` over `parts` equal parts of the batch, one after another; metrics and gradients are means."""
    if parts == 1:
        return grad_fn

    def accumulated(params: Params, context: Context, batch: Batch, key: jax.Array) -> tuple[Metrics, Params]:
        split = jax.tree.map(lambda x: x.reshape(parts, x.shape[0] // parts, *x.shape[1:]), batch)
        first = jax.tree.map(lambda x: x[0], split)
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(grad_fn, params, context, first, key)
        )

        def add(total: Any, part: tuple[Batch, jax.Array]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, grad_fn(params, context, *part)), None

        total, _ = jax.lax.scan(add, zeros, (split, jax.random.split(key, parts)))
        return jax.tree.map(lambda x: x / parts, total)

    return accumulated


def make_step(
    grad_fn: GradFn, optimizer: optax.GradientTransformation, *, seed: int, accumulation_steps: int, ema_decay: float
) -> Callable[[State, Context, Batch], tuple[State, Metrics]]:
    """(state, context, batch) -> (state, metrics).

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
