"""One training example as safetensors bytes: reading them runs no code and allocates no more than they hold.

A record has the tensors "latents" [T, H, W, C] and "text" [n, text_dim], the caption's embedding without the zero
vectors that pad it to [L, text_dim]. A record of a teacher's trajectory also has "timestep" []. Its metadata describe
the example in JSON under the single key "example", because safetensors does not keep the order of several keys.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors
from safetensors.numpy import save

from rehyat_jax.errors import InputError
from rehyat_jax.weights.safetensors_file import DTYPES

RANKS = {
    "examples": {"latents": 4, "text": 2},
    "trajectories": {"latents": 4, "text": 2, "timestep": 0},
}
"""The tensors of a record and their numbers of axes, by the kind of data set."""


class CorruptRecord(InputError):
    """A record cannot be used as a training example; `data.corrupt` decides what happens then."""


def pack(example: Mapping[str, np.ndarray], description: Mapping[str, Any]) -> bytes:
    """The record of an example; equal examples give equal bytes.

    Args:
      example: "latents", "text" and perhaps "timestep", with dtypes of `DTYPES`; "text" may be padded.
      description: JSON values, which `describe` returns.

    Raises:
      CorruptRecord: a tensor holds NaN or infinity.
    """
    tensors = {name: np.ascontiguousarray(tensor).reshape(tensor.shape) for name, tensor in example.items()}
    for name, tensor in tensors.items():
        _require_finite(name, tensor)
    tokens = np.flatnonzero(tensors["text"].any(-1))
    tensors["text"] = tensors["text"][: tokens[-1] + 1 if len(tokens) else 0]
    return save(tensors, metadata={"example": json.dumps(description, sort_keys=True)})


def unpack(record: bytes, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """The example in a record, as float32.

    Args:
      record: result of `pack`.
      shapes: shape of every required tensor; "text" is padded to its shape.

    Raises:
      CorruptRecord: the bytes are not the record of an example with these shapes, or hold NaN or infinity.
    """
    try:
        stored = dict(safetensors.deserialize(record))
    except safetensors.SafetensorError as error:
        raise CorruptRecord(f"expected a safetensors record, found: {error}") from error
    if stored.keys() != shapes.keys():
        raise CorruptRecord(f"expected the tensors {sorted(shapes)}, found {sorted(stored)}")
    return {name: _tensor(name, stored[name], shape) for name, shape in shapes.items()}


def describe(record: bytes) -> dict[str, Any]:
    """The description of the example in an intact record."""
    header = json.loads(record[8 : 8 + int.from_bytes(record[:8], "little")])
    return json.loads(header["__metadata__"]["example"])


def _tensor(name: str, stored: dict[str, Any], shape: tuple[int, ...]) -> np.ndarray:
    found = tuple(stored["shape"])
    if stored["dtype"] not in DTYPES:
        raise CorruptRecord(f"tensor {name}: expected one of {', '.join(DTYPES)}, found {stored['dtype']}")
    is_padded = name == "text" and len(found) == 2 and found[0] <= shape[0] and found[1] == shape[1]
    if found != shape and not is_padded:
        raise CorruptRecord(f"tensor {name}: expected shape {shape}, found {found}")
    values = np.frombuffer(stored["data"], DTYPES[stored["dtype"]]).reshape(found).astype(np.float32, copy=False)
    _require_finite(name, values)
    if found == shape:
        return values
    tensor = np.zeros(shape, np.float32)
    tensor[: found[0]] = values
    return tensor


def _require_finite(name: str, tensor: np.ndarray) -> None:
    if not np.isfinite(tensor).all():
        raise CorruptRecord(f"tensor {name}: expected finite values, found NaN or infinity")
