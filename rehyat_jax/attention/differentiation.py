"""Functions with a backward pass written by hand, which forward mode can differentiate too.

`jax.custom_vjp` replaces a function's backward pass and forbids `jax.jvp`. Here the tangent comes from JAX's own rules,
and only the transpose of that tangent is replaced. One primitive carries both.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

Backward = Callable[[tuple[jax.Array, ...], Any], Sequence[jax.Array]]
"""(inputs, cotangent of the result) -> cotangents of all inputs, in their shapes and dtypes."""


def with_backward(backward: Backward, *, in_kernels: bool = False) -> Callable[[Callable], Callable]:
    """Decorates a function of arrays. Reverse mode uses `backward`; forward mode uses JAX's rules for the function.

    Reverse mode keeps the function's inputs for `backward`, and nothing else.

    Args:
      in_kernels: whether a Pallas TPU kernel calls the function too. Pallas cannot lower JAX's symbolic zeros, so
        forward mode then multiplies real zeros.
    """

    def decorate(function: Callable) -> Callable:
        differentiable = jax.custom_jvp(function)

        def rule(inputs, tangents):
            result = differentiable(*inputs)
            structure = jax.tree.structure(result)
            varies = [not isinstance(tangent, SymbolicZero) for tangent in tangents]
            if not any(varies):
                return result, jax.tree.map(jnp.zeros_like, result)

            def push(*arrays):
                inputs, directions = arrays[: len(varies)], arrays[len(varies) :]
                return jax.tree.leaves(_jvp_of_some(function, inputs, varies, directions))

            def pull(*arrays):
                inputs, cotangents = arrays[: len(varies)], arrays[len(varies) :]
                return _chosen(backward(inputs, structure.unflatten(cotangents)), varies)

            directions = _chosen(tangents, varies)
            leaves = _linear_map.bind(*inputs, *directions, push=push, pull=pull, constants=len(inputs))
            return result, structure.unflatten(leaves)

        differentiable.defjvp(rule, symbolic_zeros=not in_kernels)
        return differentiable

    return decorate


def _chosen(values: Sequence[Any], choice: Sequence[bool]) -> list[Any]:
    return [value for value, is_chosen in zip(values, choice, strict=True) if is_chosen]


def _jvp_of_some(function: Callable, inputs: Sequence[Any], varies: Sequence[bool], directions: Sequence[Any]) -> Any:
    """The tangent of function(*inputs) where those inputs that vary have tangents."""

    def along(*varying):
        varying = iter(varying)
        return function(*(next(varying) if moves else x for x, moves in zip(inputs, varies, strict=True)))

    return jax.jvp(along, _chosen(inputs, varies), list(directions))[1]


_linear_map = Primitive("linear_map")
"""`push`, which is linear in the arrays after the first `constants`, with the transpose `pull`.

push(*constants, *arrays) and pull(*constants, *cotangents) return lists of arrays. JAX's `linear_call` can neither be
batched nor differentiated by its constants.
"""
_linear_map.multiple_results = True


def _run(*arrays, push, pull, constants):
    return push(*arrays)


def _result_types(*types, push, pull, constants):
    return jax.make_jaxpr(push)(*types).out_avals


def _differentiate(arrays, tangents, *, push, pull, constants):
    apply = functools.partial(_linear_map.bind, push=push, pull=pull, constants=constants)
    varies = [not isinstance(tangent, ad.Zero) for tangent in tangents]
    terms = []
    if any(varies[constants:]):
        terms.append(apply(*arrays[:constants], *map(ad.instantiate_zeros, tangents[constants:])))
    if any(varies[:constants]):
        varies = varies[:constants] + [False] * (len(arrays) - constants)
        terms.append(_jvp_of_some(push, arrays, varies, _chosen(tangents, varies)))
    return apply(*arrays), [functools.reduce(jnp.add, leaves) for leaves in zip(*terms, strict=True)]


def _transpose(cotangents, *arrays, push, pull, constants):
    gradients = pull(*arrays[:constants], *map(ad.instantiate_zeros, cotangents))
    wanted = map(ad.is_undefined_primal, arrays[constants:])
    return [None] * constants + [g if is_wanted else None for g, is_wanted in zip(gradients, wanted, strict=True)]


def _batch(arrays, axes, *, push, pull, constants):
    """The cotangent of an array that the whole batch shares is a sum over the batch."""

    def pull_all(*arrays):
        in_axes = (*axes[:constants], *(0 for _ in arrays[constants:]))
        out_axes = [0 if axis is None else axis for axis in axes[constants:]]
        gradients = jax.vmap(pull, in_axes, out_axes)(*arrays)
        return [g.sum(0) if axis is None else g for g, axis in zip(gradients, axes[constants:], strict=True)]

    results = _linear_map.bind(*arrays, push=jax.vmap(push, tuple(axes)), pull=pull_all, constants=constants)
    return results, [0] * len(results)


_linear_map.def_impl(_run)
_linear_map.def_abstract_eval(_result_types)
mlir.register_lowering(_linear_map, mlir.lower_fun(_run, multiple_results=True))
ad.primitive_jvps[_linear_map] = _differentiate
ad.primitive_transposes[_linear_map] = _transpose
batching.primitive_batchers[_linear_map] = _batch
