"""Models whose parameters stay on disk until they are needed, so that a conversion holds one parameter at a time."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rehyat_jax.diffusion.solver_options import SolverOptions
from rehyat_jax.errors import InputError

MODELS_PLACE, NOISE_LEVELS, SAMPLING = "models", "noise_levels", "sampling"
OPTIONAL = (MODELS_PLACE, NOISE_LEVELS, SAMPLING)
"""Names that a model's metadata may have: the pipeline with the weights of its codec and text encoder; the noise levels
that it was trained with, `BY_CHUNK`, or one for all frames; and, of a model of few steps, its `SolverOptions`."""

BY_CHUNK = "by_chunk"


def check_metadata(metadata: Mapping[str, Any], file: Path) -> None:
    """Raises InputError, naming the file, unless a model's metadata are names, and perhaps `SolverOptions`."""
    for name, value in metadata.items():
        if name == SAMPLING:
            try:
                SolverOptions.from_json(value)
            except ValueError as error:
                raise InputError(f"{file}: {name}: {error}; correct it, or remove it") from error
        elif not isinstance(value, str):
            raise InputError(f"{file}: {name} should be a name, found {value!r}; correct it")
    if (levels := metadata.get(NOISE_LEVELS, BY_CHUNK)) != BY_CHUNK:
        raise InputError(f"{file}: {NOISE_LEVELS} should be {BY_CHUNK!r}, found {levels!r}; correct it, or remove it")


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
      metadata: names of the model's "codec" and "text_encoder", and maybe those of `OPTIONAL`.
      params: arrays of the parameter tree by path, keys joined by dots.
    """

    config: Any
    metadata: dict[str, Any]
    params: dict[str, StreamedArray]

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters."""
        return sum(array.nbytes for array in self.params.values())
