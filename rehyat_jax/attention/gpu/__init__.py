"""Windows attended to by fused attention kernels on NVIDIA GPUs."""
