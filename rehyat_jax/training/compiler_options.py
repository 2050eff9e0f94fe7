"""Options of the compiler for large programs."""

from rehyat_jax.attention.platform import target_platform

_LEAST_KIB = 16 * 1024
"""VMEM that the kernels of this package fit (`attention/hybrid/tpu/tiling.py`), and libtpu's smallest default."""


def compiler_options() -> dict[str, str]:
    """Options of `jax.jit` for the platform and chip that a program is compiled for (`target_platform`).

    On TPUs the compiler gives an operation 16 MiB of VMEM (32 on v6e) of 64 to 128, and splits large products into
    tiles that wait for HBM. More VMEM shortens that wait and lengthens compilation. The gradient of a 14B model's MLP
    on v6e (libtpu 0.0.42.1) takes, in million cycles estimated by the compiler and in seconds of compilation:

      - default: 51.9 and 7
      - 3/8 of VMEM: 46.2 and 10
      - 7/16 of VMEM: 44.7 and 12
      - 1/2 of VMEM: 44.0 and 15
    """
    if target_platform() != "tpu":
        return {}
    from jax.experimental.pallas import tpu as pltpu  # nothing for TPUs is imported elsewhere

    try:
        kib = pltpu.get_tpu_info().vmem_capacity_bytes * 7 // 16 // 1024
    except ValueError:  # a TPU that Pallas does not know
        return {}
    return {"xla_tpu_scoped_vmem_limit_kib": str(kib)} if kib > _LEAST_KIB else {}
