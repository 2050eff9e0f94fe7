"""The Hopper kernel on a CPU, in Pallas' interpreter of warpgroups, barriers and asynchronous copies."""

import contextlib
import dataclasses
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams, force_gpu_interpret_mode
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from rehyat_jax.attention.hybrid.gpu import hopper


class _Accumulator:
    """Registers that products are added to."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype):
        self.value = lax.full(shape, 0, dtype)

    @staticmethod
    def init(array: jax.Array) -> "_Accumulator":
        accumulator = _Accumulator(array.shape, array.dtype)
        accumulator.value = array
        return accumulator

    def __getitem__(self, _) -> jax.Array:
        return self.value


def _run_scoped(function, *kinds, **options):
    if len(kinds) == 1 and isinstance(kinds[0], _Accumulator):
        return function(kinds[0])
    return pl.run_scoped(function, *kinds, **options)


def _run_state(function):
    def run(accumulator):
        function(accumulator)
        return accumulator.value

    return run


def _wgmma(accumulator, left, right):
    left, right = (operand if isinstance(operand, jax.Array) else _read(operand) for operand in (left, right))
    accumulator.value += lax.dot(left.astype(jnp.float32), right.astype(jnp.float32))


def _read(ref) -> jax.Array:
    if ref.transforms and type(ref.transforms[-1]).__name__ == "TransposeTransform":
        return _read(dataclasses.replace(ref, transforms=ref.transforms[:-1])).T
    return ref[...]


@contextlib.contextmanager
def interpreted_kernel():
    """Within it, the Hopper kernel is traced for the interpreter. Shared memory that nobody wrote holds NaNs.

    The interpreter knows neither operands of wgmma in registers nor transposed ones, so products are plain ones here.
    Layouts of registers mean nothing to it.
    """
    products = dict(wgmma=_wgmma, wgmma_wait=lambda _: None, ACC=_Accumulator, layout_cast=lambda array, _: array)
    scopes = dict(run_scoped=_run_scoped, run_state=_run_state)
    with (
        mock.patch.object(hopper, "plgpu", types.SimpleNamespace(**(vars(plgpu) | products))),
        mock.patch.object(hopper, "pl", types.SimpleNamespace(**(vars(pl) | scopes))),
        force_gpu_interpret_mode(InterpretGPUParams()),
    ):
        yield
