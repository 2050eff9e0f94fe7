"""What importing the package loads."""

import subprocess
import sys

LOADED = """
import sys, rehyat_jax
print("jax" in sys.modules)
from rehyat_jax import *
print("orbax" in sys.modules)
import rehyat_jax.evaluate, rehyat_jax.plan, rehyat_jax.prepare, rehyat_jax.sample
print([name for name in ("grain", "matplotlib.figure", "torch", "transformers") if name in sys.modules])
import rehyat_jax.train
ours = tuple("rehyat_jax.attention." + name for name in ("tpu", "hybrid.tpu", "hybrid.gpu", "softmax.tpu"))
print([name for name in sys.modules if name.startswith((*ours, "jax.experimental.pallas"))])
"""


def test_jax_kernels_orbax_grain_and_matplotlib_are_imported_where_they_are_used():
    assert subprocess.check_output([sys.executable, "-c", LOADED], text=True) == "False\nFalse\n[]\n[]\n"
