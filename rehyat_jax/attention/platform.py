"""Which platform a program is being made for, and what its compiler should be told."""

import jax
from jax.experimental.pallas import tpu as pltpu


def target_platform() -> str:
    """The platform ("cpu", "gpu", "tpu") of the mesh in use (`jax.set_mesh`), else of the default backend.

    A program compiled ahead of time for TPUs, on a machine that has none, is made under a mesh of their topology.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else jax.default_backend()


def compiler_options() -> dict[str, str]:
    """Options of `jax.jit` for a large program, by the platform and chip that it is made for.

    On TPUs the compiler gives an operation 16 MiB of VMEM (32 on v6e) of 64 to 128, and cuts large products into tiles
    that wait for HBM. More VMEM spares some of that wait and takes longer to compile. The gradient of a 14B model's MLP
    on v6e, in million cycles by the compiler's estimate and seconds of compilation (libtpu 0.0.42.1): 51.9 and 7 by
    default, 46.2 and 10 with 3/8 of VMEM, 44.7 and 12 with 7/16, 44.0 and 15 with 1/2.
    """
    if target_platform() != "tpu":
        return {}
    vmem = pltpu.get_tpu_info().vmem_capacity_bytes
    return {"xla_tpu_scoped_vmem_limit_kib": str(vmem * 7 // 16 // 1024)}
