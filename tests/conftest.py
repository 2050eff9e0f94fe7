"""Tests run on CPUs, eight virtual ones. With libtpu installed, which they compile with, JAX would look for a TPU."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# XLA makes as many threads as this says there are processors. Devices wait for one another in threads, and
# interpreted kernels call back into Python from further ones: with few, a test of several devices can stand still.
os.environ.setdefault("NPROC", "32")

import jax

# Not in the environment, from which processes that tests start would have them too.
jax.config.update("jax_num_cpu_devices", 8)
