"""implementation="cudnn", for NVIDIA GPUs: windows by cuDNN's flash attention, merged with linear states by XLA."""

import functools

import jax

from rehyat_jax.attention.hybrid.backend import Backend, Request
from rehyat_jax.attention.hybrid.chunks import attend_branches, attend_chunks
from rehyat_jax.attention.hybrid.gpu.cudnn_calls import cudnn_backward, cudnn_forward, why_not_cudnn
from rehyat_jax.attention.hybrid.gpu.flash_merge import merged_forward
from rehyat_jax.attention.hybrid.gpu.fused_window import WindowKernels, attend_window_fused
from rehyat_jax.attention.hybrid.state import HybridState

KERNELS = WindowKernels(functools.partial(merged_forward, cudnn_forward), cudnn_backward)


def run(request: Request) -> tuple[jax.Array, HybridState]:
    """Hybrid attention with all chunks as a batch of cuDNN's. Overlaps come last, so that lengths replace masks.

    Both stabilizers are exact. "row_max" takes a second cuDNN pass over the window's scores, in the forward pass only.
    """
    if request.branch_gate is not None:
        return attend_branches(run, request)
    return attend_chunks(functools.partial(attend_window_fused, KERNELS), request)


BACKEND = Backend("cudnn", run, why_not=lambda request: why_not_cudnn(request.query))
