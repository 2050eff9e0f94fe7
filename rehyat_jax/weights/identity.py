"""Recognises a model by its weights, in any layout, in float32 or bfloat16."""

import hashlib

import ml_dtypes
import numpy as np

from rehyat_jax.weights.streamed import StreamedModel

_VECTORS = ("bias", "scale")

IDENTITY_VALUES = 64
"""Values of every tensor in a `BaseIdentity`."""


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


class BaseIdentity:
    """Recognises the base of a student, also in PyTorch; `rehyat_torch._identity` computes the same.

    It is the SHA-256 of `IDENTITY_VALUES` values of every tensor with diffusers' name, spread over the tensor and
    rounded to bfloat16. Unlike `weights_identity`, it also reads the kernels, which merged adapters change.
    """

    def __init__(self) -> None:
        self._samples: dict[str, bytes] = {}

    def add(self, name: str, tensor: np.ndarray) -> None:
        """Takes a tensor in diffusers' layout, float32, float16 or bfloat16."""
        chosen = np.arange(IDENTITY_VALUES, dtype=np.int64) * 2654435761 % tensor.size
        values = tensor[np.unravel_index(chosen, tensor.shape)].astype(np.float32)
        self._samples[name] = values.astype(ml_dtypes.bfloat16).view(np.uint16).astype("<u2").tobytes()

    def digest(self) -> str:
        """64 hexadecimal digits."""
        found = hashlib.sha256()
        for name in sorted(self._samples):
            found.update(name.encode() + self._samples[name])
        return found.hexdigest()
