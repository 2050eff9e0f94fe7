"""Models whose parameters stay on disk until they are needed, so that a conversion holds one parameter at a time."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


@dataclasses.dataclass(frozen=True)
class StreamedArray:
    """An array with a known shape and dtype, whose values `read` loads into memory.

    Attributes:
      shape: shape of the array.
      dtype: float32, float16 or bfloat16.
      read: returns the values as a new numpy array. It may raise InputError, since it sees the values first.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes of the values in memory."""
        return math.prod(self.shape) * self.dtype.itemsize


class StreamedModel(NamedTuple):
    """A model that was opened from, or will be written as, either kind of checkpoint.

    Attributes:
      config: architecture, an instance of one of the classes in `weights.models.MODELS`.
      metadata: names of the model's "codec" and "text_encoder", and maybe "models", the place of their weights.
      params: arrays of the parameter tree by path, keys joined by dots.
    """

    config: Any
    metadata: dict[str, str]
    params: dict[str, StreamedArray]

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters."""
        return sum(array.nbytes for array in self.params.values())
