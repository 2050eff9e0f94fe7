"""Tests run on CPUs, eight virtual ones. With libtpu installed, which they compile with, JAX would look for a TPU."""

import atexit
import gc
import importlib.metadata
import os
import shutil
import signal
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# XLA makes as many threads as this says there are processors. Devices wait for one another in threads, and
# interpreted kernels call back into Python from further ones: with few, a test of several devices can stand still.
os.environ.setdefault("NPROC", "32")

# Compiling for CPUs is most of what the tests cost, so compile fast rather than well: a third of the time. Programs are
# small, so their parts are not compiled in parallel. libtpu makes the same programs with these flags. Later versions of
# XLA lack the last flag.
FLAGS = ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
if importlib.metadata.version("jaxlib") < "0.11":
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])

# The line of the source of every operation, which no test reads, is a twentieth of the cost.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")

# Test processes, and the processes that they start, take from here what another one has compiled.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    compiled = tempfile.mkdtemp(prefix="rehyat_jax_tests_")
    atexit.register(shutil.rmtree, compiled, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

# Plans that tests make are not kept among the user's.
caches = tempfile.mkdtemp(prefix="rehyat_jax_caches_")
atexit.register(shutil.rmtree, caches, ignore_errors=True)
os.environ["XDG_CACHE_HOME"] = caches

# Tests press Ctrl-C in processes that they start, which ignore it if a shell started the tests in the background.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

# Not in the environment, from which processes that tests start would have them too.
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="module")
def programs_compiled_once():
    """Compiles without the cache of compiled programs: storing one costs a tenth of compiling it."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


def pytest_collection_finish():
    """Imported modules hold a million objects, which need no search for garbage. Tracing creates many more."""
    gc.freeze()
    gc.set_threshold(200_000, 20, 100)
