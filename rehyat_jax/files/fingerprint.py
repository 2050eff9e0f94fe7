"""Fingerprints of files that take too long to read completely, such as a model's or a data set's."""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

from rehyat_jax.errors import InputError

SAMPLED_BYTES = 2**16
"""Size of the blocks that a fingerprint reads."""

BLOCKS = 1024
"""Number of blocks to read from a model or a data set: seconds on a network disk."""

MOST_BLOCKS = 16
"""Largest number of blocks that a fingerprint reads from one file."""


def fingerprint(files: Sequence[Path], folder: Path, *, blocks: int | None = None) -> str:
    """Identifies files, wherever their folder is, from their names, their sizes and sampled blocks.

    Other bytes between the blocks of a file of the same size go unnoticed.

    Args:
      files: files below `folder`.
      folder: names are relative to it.
      blocks: number of blocks to read from all files together. Every file has up to `MOST_BLOCKS`, evenly spaced, or
        only some of the files have blocks. None reads the beginning and the end of every file.

    Raises:
      InputError: a file cannot be read.
    """
    digest, files = hashlib.sha256(), sorted(files)
    blocks = blocks or 2 * len(files)
    in_file = max(2, min(MOST_BLOCKS, blocks // max(1, len(files))))
    every = max(1, math.ceil(in_file * len(files) / blocks)) if blocks else 1
    try:
        for number, path in enumerate(files):
            size = path.stat().st_size
            digest.update(f"{path.relative_to(folder)} {size}\n".encode())
            if number % every:
                continue
            with path.open("rb") as file:
                for block in range(in_file):
                    file.seek(max(0, size - SAMPLED_BYTES) * block // (in_file - 1))
                    digest.update(file.read(SAMPLED_BYTES))
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror}); check its permissions") from error
    return f"{len(files)} files, SHA-256 {digest.hexdigest()}"
