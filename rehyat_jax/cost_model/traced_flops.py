"""Floating-point operations of a traced function's matrix products and convolutions: a multiply-add is two."""

import math

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, jaxprs_in_params


def traced_flops(traced: ClosedJaxpr | Jaxpr) -> int:
    """FLOPs of a function; loops count with their trips, and the largest branch of a conditional counts.

    Args:
      traced: as in `jax.jit(function).trace(*arguments).jaxpr`. Kernels in it count as nothing.

    Raises:
      ValueError: a loop has no known number of trips.
    """
    jaxpr = traced.jaxpr if isinstance(traced, ClosedJaxpr) else traced
    return sum(map(_flops, jaxpr.eqns))


def _flops(equation: JaxprEqn) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval
        return 2 * math.prod(left.shape[axis] for axis in contracted) * equation.outvars[0].aval.size
    if name == "conv_general_dilated":
        kernel, out_channels = equation.invars[1].aval, params["dimension_numbers"].rhs_spec[0]
        return 2 * kernel.size // kernel.shape[out_channels] * equation.outvars[0].aval.size
    if name == "while":
        raise ValueError("expected loops of known length, as jax.lax.scan makes, found jax.lax.while_loop")
    inner = [traced_flops(jaxpr) for jaxpr in jaxprs_in_params(params)] if name != "pallas_call" else []
    if name == "cond":
        return max(inner)
    return sum(inner) * (params["length"] if name == "scan" else 1)
