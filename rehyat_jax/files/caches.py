"""The folder of caches: of files that can be made again at any time."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """`rehyat_jax` in XDG_CACHE_HOME, else in ~/.cache. It may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rehyat_jax"
