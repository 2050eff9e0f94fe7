"""Compiled programs that a second start of a command finds on disk."""

import jax

from rehyat_jax.files.caches import cache_folder


def keep_compiled_programs() -> None:
    """Lets JAX keep its compiled programs on disk, unless the user has chosen a folder or this machine is a CPU.

    JAX names a program by its code, its options, the chip and the versions of compiler and JAX, so another shape or
    version is compiled anew. It does not unpickle what it reads. On CPUs nothing is kept: such programs may not run on
    another processor that sees the same home directory.

    The folder is that of JAX_COMPILATION_CACHE_DIR, else `compiled` in `cache_folder`.
    """
    # JAX defines its options at run time.
    chosen = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if chosen is None and jax.default_backend() != "cpu":
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
