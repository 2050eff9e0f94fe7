"""What importing the package loads."""

import subprocess
import sys

LOADED = """
import sys, rehyat_jax, rehyat_jax.train
kernels = ("rehyat_jax.attention.tpu", "rehyat_jax.attention.gpu", "rehyat_jax.attention.splash", "jax.experimental.pallas")
print([name for name in sys.modules if name.startswith(kernels)])
"""


def test_kernels_are_imported_where_they_are_used():
    assert subprocess.check_output([sys.executable, "-c", LOADED], text=True).strip() == "[]"
