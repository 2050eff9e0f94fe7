"""Models whose parameters stay on disk until they are needed, so that a conversion holds one of them at a time."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


@dataclasses.dataclass(frozen=True)
class StreamedArray:
    """An array known by shape and dtype; `read` brings its values into memory.

    Attributes:
      shape: of the array.
      dtype: float32, float16 or bfloat16.
      read: returns the values as a new numpy array. May raise InputError: the values are only seen now.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes of the values in memory."""
        return math.prod(self.shape) * self.dtype.itemsize


class StreamedModel(NamedTuple):
    """What both kinds of checkpoint are opened as, and written from.

    Attributes:
      config: architecture, of one of the classes in `weights.models.MODELS`.
      metadata: names of the model's "codec" and "text_encoder".
      params: arrays of the parameter tree by path, keys joined by dots.
    """

    config: Any
    metadata: dict[str, str]
    params: dict[str, StreamedArray]

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters."""
        return sum(array.nbytes for array in self.params.values())
