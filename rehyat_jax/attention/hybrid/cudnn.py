"""Softmax windows by cuDNN's flash attention, merged with the linear states by XLA: for NVIDIA GPUs."""

import functools

import jax

from rehyat_jax.attention.hybrid.backend import Backend, Request
from rehyat_jax.attention.hybrid.chunks import attend_chunks
from rehyat_jax.attention.hybrid.gpu.cudnn_calls import cudnn_backward, cudnn_forward, why_not_cudnn
from rehyat_jax.attention.hybrid.gpu.flash_merge import merged_forward
from rehyat_jax.attention.hybrid.gpu.fused_window import WindowKernels, attend_window_fused
from rehyat_jax.attention.hybrid.state import HybridState

KERNELS = WindowKernels(functools.partial(merged_forward, cudnn_forward), cudnn_backward)


def run(request: Request) -> tuple[jax.Array, HybridState]:
    """All chunks as a batch of cuDNN's, overlaps last, so that lengths stand for the masks. Exact in both stabilizers.

    "row_max" takes a second pass of cuDNN over the window's scores forward, and none backward.
    """
    return attend_chunks(functools.partial(attend_window_fused, KERNELS), request)


BACKEND = Backend("cudnn", run, why_not=lambda request: why_not_cudnn(request.query))
