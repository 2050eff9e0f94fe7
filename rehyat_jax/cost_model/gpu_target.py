"""GPUs to compile for on machines without one: JAX's CUDA plugin needs neither GPU nor driver for that."""

import jax
from jax.experimental import topologies

from rehyat_jax.errors import InputError
from rehyat_jax.extras import install_command

# XLA's GpuTargetConfigProto of an H100 SXM.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84978434048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
runtime_version { major: 12 minor: 9 }
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

TARGETS = {
    "h100": _H100,
    # The same chip with other memory: 143,771 MiB at 4.8 TB/s.
    "h200": _H100.replace("84978434048", "150754820096")
    .replace("3352320000000", "4800000000000")
    .replace("H100 80GB HBM3", "H200"),
}


def gpu_devices(gpu: str, count: int) -> list[jax.Device]:
    """GPUs of one host. Raises InputError if the plugin is missing."""
    try:
        return topologies.get_topology_desc("", "cuda", target_config=TARGETS[gpu], topology=f"1x1x{count}").devices
    except NotImplementedError as error:
        raise InputError(
            f"expected JAX's CUDA plugin, found none; run {install_command('cuda')} (no GPU is needed)"
        ) from error
