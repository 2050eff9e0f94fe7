"""Recognises a model by its weights, in whatever layout and precision they are stored."""

import hashlib

import ml_dtypes
import numpy as np

from rehyat_jax.weights.streamed import StreamedModel

_VECTORS = ("bias", "scale")


def weights_identity(model: StreamedModel) -> str:
    """SHA-256 of the biases and norms of a transformer, rounded to bfloat16, as 64 hexadecimal digits.

    A converted model, a copy in bfloat16 and a student whose feature maps alone were trained have the identity of their
    teacher. Every optimizer changes biases and norms, so a finetuned model has another one.

    Raises:
      InputError: a file cannot be read.
    """
    found = hashlib.sha256()
    for path in sorted(model.params):
        names = path.split(".")
        if names[0] != "feature_maps" and names[-1] in _VECTORS:
            found.update(path.encode())
            values = np.asarray(model.params[path].read(), np.float32)
            found.update(values.astype(ml_dtypes.bfloat16).view(np.uint16).astype("<u2").tobytes())
    return found.hexdigest()
