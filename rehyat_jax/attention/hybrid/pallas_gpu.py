"""implementation="pallas_gpu", for Hopper GPUs (H100, H200): one fused forward kernel, and cuDNN's backward."""

import functools

import jax

from rehyat_jax.attention.hybrid.backend import Backend, Request
from rehyat_jax.attention.hybrid.chunks import attend_branches, attend_chunks
from rehyat_jax.attention.hybrid.gpu.cudnn_calls import cudnn_backward
from rehyat_jax.attention.hybrid.gpu.fused_window import WindowKernels, attend_window_fused
from rehyat_jax.attention.hybrid.gpu.hopper import hopper_window_forward, why_not_hopper
from rehyat_jax.attention.hybrid.state import HybridState

KERNELS = WindowKernels(hopper_window_forward, cudnn_backward)


def run(request: Request) -> tuple[jax.Array, HybridState]:
    """Hybrid attention with all chunks as a batch of a fused kernel. Unlike "cudnn", "row_max" takes no second pass.

    The Mosaic GPU kernel needs warpgroup instructions that only compute capability 9.0 has.
    """
    if request.branch_gate is not None:
        return attend_branches(run, request)
    return attend_chunks(functools.partial(attend_window_fused, KERNELS), request)


BACKEND = Backend(
    "pallas_gpu",
    run,
    why_not=lambda request: why_not_hopper(request.query, request.phi_query),
)
