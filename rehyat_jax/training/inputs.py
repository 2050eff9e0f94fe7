"""Fingerprints of what a run reads, with which a resumed run finds out that they were replaced."""

import json
from pathlib import Path

import jax
import ml_collections
import numpy as np
from jax.experimental import multihost_utils

from rehyat_jax.data.pipeline import Source
from rehyat_jax.files.fingerprint import BLOCKS, fingerprint
from rehyat_jax.training.stages import STAGES
from rehyat_jax.weights.load import checkpoint_files

MOST_BYTES = 4096
"""Size of the text of all fingerprints that processes exchange."""


def input_fingerprints(config: ml_collections.ConfigDict, source: Source) -> dict[str, str]:
    """Fingerprints of the files of initial model, teacher and training examples, by the field that names them.

    A source that generates its examples has no files, and no fingerprint. The first process reads the files for all.

    Raises:
      InputError: the initial model does not exist, or a file cannot be read.
    """
    found = json.dumps(_fingerprints(config, source) if jax.process_index() == 0 else {})
    if jax.process_count() == 1:
        return json.loads(found)
    text = np.frombuffer(found.encode().ljust(MOST_BYTES), np.uint8)
    return json.loads(multihost_utils.broadcast_one_to_all(text).tobytes())


def _fingerprints(config: ml_collections.ConfigDict, source: Source) -> dict[str, str]:
    files = {}
    if STAGES[config.stage].starts_from_model:
        files["init_from"] = checkpoint_files(config.init_from)
    if teacher := STAGES[config.stage].teacher_path(config):
        files["velocity.teacher"] = checkpoint_files(teacher)
    if stored := getattr(source, "files", ()):
        files["data.path"] = (Path(config.data.path), stored)
    return {field: fingerprint(found, folder, blocks=BLOCKS) for field, (folder, found) in files.items()}
