"""Mosaic GPU kernels on a CPU, in Pallas' interpreter of threads, barriers and asynchronous copies."""

import contextlib
from unittest import mock

import jax
import numpy as np
from jax._src.pallas.mosaic.interpret.utils import to_range
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams, force_gpu_interpret_mode
from jax._src.state.types import TransposeTransform


def _wgmma(
    *,
    token,
    device_id,
    thread_id,
    acc_allocation_key_as_array,
    acc_transforms,
    acc_dtype,
    a_allocation_key_as_array,
    a_transforms,
    b_allocation_key_as_array,
    b_transforms,
    **_,
):
    """accumulator += a @ b, as the interpreter has it, but also with `a` in registers and `b` transposed."""
    memory = gpu_callbacks._get_shared_memory()
    thread = memory.get_global_thread_id(int(device_id), int(thread_id))

    def locate(key, transforms):
        transforms = jax.tree.map(int, gpu_callbacks._remove_noop_transforms(transforms))
        return gpu_callbacks.HostAllocationKey.from_array(key), to_range(transforms)

    def read(key, transforms):
        if transforms and isinstance(transforms[-1], TransposeTransform):
            return read(key, transforms[:-1]).T
        return memory.get_buffer_content(*locate(key, transforms), thread)[0]

    in_registers = np.shape(a_allocation_key_as_array) != (5,)
    a = a_allocation_key_as_array if in_registers else read(a_allocation_key_as_array, a_transforms)
    b = read(b_allocation_key_as_array, b_transforms)
    accumulator = read(acc_allocation_key_as_array, acc_transforms)
    result = accumulator + np.matmul(np.asarray(a, acc_dtype), np.asarray(b, acc_dtype))
    memory.store_buffer_content(*locate(acc_allocation_key_as_array, acc_transforms), result, thread)
    return token


@contextlib.contextmanager
def interpreted_kernels():
    """Within it, Mosaic GPU kernels are traced for the interpreter. Memory that nobody wrote holds NaNs."""
    with mock.patch.object(gpu_callbacks, "wgmma", _wgmma), force_gpu_interpret_mode(InterpretGPUParams()):
        try:
            yield
        except BaseException:
            gpu_callbacks.reset_gpu_interpret_mode_state()
            raise
