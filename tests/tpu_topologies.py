"""Compiling for TPUs on a machine that has none, with the compiler in libtpu."""

import os

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# The smallest of each generation.
TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")

# libtpu reads these when it is loaded, by the first topology. They keep it from asking a cloud machine's metadata
# server what it runs on, and let several test processes load it.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


def compiled_for_tpu(topology: str, function, *arguments, quickly: bool = False) -> jax.stages.Compiled:
    """Compiles `function` for one chip of a topology; raises as on a TPU where it does not fit or is not supported.

    Args:
      topology: one of `TOPOLOGIES`, say.
      arguments: trees of anything with a shape and a dtype, `jax.ShapeDtypeStruct` for example.
      quickly: tell XLA not to search for fast code. For tests of what a program computes and keeps.
    """
    chips = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = Mesh(np.array(chips[:1]), ("chip",))
    on_chip = NamedSharding(mesh, PartitionSpec())
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on_chip), arguments)
    # Pallas asks the mesh, not the arguments, what kind of TPU it compiles for.
    with jax.set_mesh(mesh):
        options = {"optimization_level": 9} if quickly else None  # O0, see openxla.org/xla/effort_levels
        return jax.jit(function).lower(*arguments).compile(options)
