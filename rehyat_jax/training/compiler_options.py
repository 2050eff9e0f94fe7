"""What the compiler is told about large programs."""

from rehyat_jax.attention.platform import target_platform

_LEAST_KIB = 16 * 1024
"""What kernels here are made to fit (`attention/hybrid/tpu/tiling.py`), and the least of libtpu's defaults."""


def compiler_options() -> dict[str, str]:
    """Options of `jax.jit` for the platform and chip that a program is made for (`target_platform`).

    On TPUs the compiler gives an operation 16 MiB of VMEM (32 on v6e) of 64 to 128, and cuts large products into tiles
    that wait for HBM. More VMEM spares some of that wait and takes longer to compile. The gradient of a 14B model's MLP
    on v6e, in million cycles by the compiler's estimate and seconds of compilation (libtpu 0.0.42.1): 51.9 and 7 by
    default, 46.2 and 10 with 3/8 of VMEM, 44.7 and 12 with 7/16, 44.0 and 15 with 1/2.
    """
    if target_platform() != "tpu":
        return {}
    from jax.experimental.pallas import tpu as pltpu  # nothing for TPUs is imported elsewhere

    try:
        kib = pltpu.get_tpu_info().vmem_capacity_bytes * 7 // 16 // 1024
    except ValueError:  # a TPU that Pallas does not know
        return {}
    return {"xla_tpu_scoped_vmem_limit_kib": str(kib)} if kib > _LEAST_KIB else {}
