"""Windows and linear states in one fused kernel forward, and by cuDNN backward: for Hopper GPUs (H100, H200)."""

import functools

import jax

from rehyat_jax.attention.hybrid.backend import Backend, Request
from rehyat_jax.attention.hybrid.chunks import attend_chunks
from rehyat_jax.attention.hybrid.gpu.cudnn_calls import cudnn_backward
from rehyat_jax.attention.hybrid.gpu.fused_window import WindowKernels, attend_window_fused
from rehyat_jax.attention.hybrid.gpu.hopper import hopper_window_forward, why_not_hopper
from rehyat_jax.attention.hybrid.state import HybridState

KERNELS = WindowKernels(hopper_window_forward, cudnn_backward)


def run(request: Request) -> tuple[jax.Array, HybridState]:
    """All chunks as a batch of a fused kernel, which takes no second pass for "row_max" as "cudnn" does.

    The kernel is Mosaic GPU's and needs warpgroup instructions that only compute capability 9.0 has.
    """
    return attend_chunks(functools.partial(attend_window_fused, KERNELS), request)


BACKEND = Backend("pallas_gpu", run, why_not=lambda request: why_not_hopper(request.query, request.phi_query))
