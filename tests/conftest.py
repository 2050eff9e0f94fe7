"""Tests run on CPUs. With libtpu installed, which they compile with, JAX would look for a TPU at first."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
