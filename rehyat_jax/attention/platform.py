"""Which platform a program is being made for."""

import jax


def target_platform() -> str:
    """The platform ("cpu", "gpu", "tpu") of the mesh in use (`jax.set_mesh`), else of the default backend.

    A program compiled ahead of time for TPUs, on a machine that has none, is made under a mesh of their topology.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else jax.default_backend()
