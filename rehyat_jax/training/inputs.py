"""Fingerprints of what a run reads, with which a resumed run finds out that they were replaced."""

from pathlib import Path

import ml_collections

from rehyat_jax.data.pipeline import Source
from rehyat_jax.errors import InputError
from rehyat_jax.files.fingerprint import fingerprint
from rehyat_jax.training.stages import STAGES
from rehyat_jax.weights.load import checkpoint_files

BLOCKS = 1024
"""Number of blocks of 64 KiB to read from a model or a data set: seconds on a network disk."""


def input_fingerprints(config: ml_collections.ConfigDict, source: Source) -> dict[str, str]:
    """Fingerprints of the files of the initial model and the training examples, by the field that names them.

    A source that generates its examples has no files, and no fingerprint.

    Raises:
      InputError: the initial model does not exist, or a file cannot be read.
    """
    files = {}
    if STAGES[config.stage].starts_from_model:
        files["init_from"] = checkpoint_files(config.init_from)
    if stored := getattr(source, "files", ()):
        files["data.path"] = (Path(config.data.path), stored)
    try:
        return {field: fingerprint(found, folder, blocks=BLOCKS) for field, (folder, found) in files.items()}
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror}); check its permissions") from error
