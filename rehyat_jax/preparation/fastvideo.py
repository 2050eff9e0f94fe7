"""The Parquet files of latents that FastVideo's preprocessing writes and its trainer reads.

The only version that is read is the schema `pyarrow_schema_t2v`, of text to video, in
github.com/hao-ai-lab/FastVideo, fastvideo/dataset/dataloader/schema.py. Its earlier form with a mask of the text is
read too. The schemas of other tasks hold other things under the same names.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from rehyat_jax.data.records import CorruptRecord
from rehyat_jax.errors import InputError
from rehyat_jax.files.shown import shown

if TYPE_CHECKING:
    import pyarrow as pa

VERSION = "pyarrow_schema_t2v"

LATENTS, TEXT, MASK = "vae_latent", "text_embedding", "text_attention_mask"
"""Tensors of a row. Each has three columns: its bytes, its shape and its dtype."""

PARTS = ("bytes", "shape", "dtype")

OTHERS = {
    "clip_feature_bytes": "pyarrow_schema_i2v",
    "first_frame_latent_bytes": "pyarrow_schema_i2v",
    "pil_image_bytes": "pyarrow_schema_i2v",
    "trajectory_latents_bytes": "pyarrow_schema_ode_trajectory",
    "text_embedding_2_bytes": "a schema with two text encoders",
}
"""Columns that only other schemas have, and the names of those."""

FLOATS = {
    **{name: np.dtype(name) for name in ("float16", "float32", "float64")},
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
"""The dtypes of latents and text that a row may name."""

MASKS = {name: np.dtype(name) for name in ("bool", "int8", "uint8", "int32", "int64", "float32")}

LARGEST = 2**28
"""Largest number of elements in a tensor; 30 seconds of 720p have a tenth."""


def columns(name: str) -> list[str]:
    """The columns of a tensor."""
    return [f"{name}_{part}" for part in PARTS]


def is_fastvideo(names: Sequence[str]) -> bool:
    """True if a table with these columns is one of FastVideo's."""
    return f"{LATENTS}_bytes" in names or any(name in OTHERS for name in names)


def check_schema(source: Path, names: Sequence[str]) -> None:
    """Raises InputError unless these columns are those of `VERSION`."""
    for name in names:
        if other := OTHERS.get(name):
            raise InputError(
                f"{source}: expected FastVideo's {VERSION}, found column {name!r} of {other}; prepare text-to-video "
                f"latents, or convert the rows to safetensors files"
            )
    if missing := [name for name in [*columns(LATENTS), *columns(TEXT)] if name not in names]:
        raise InputError(
            f"{source}: expected the columns of FastVideo's {VERSION}, found {shown(', '.join(names), 500)}, without "
            f"{', '.join(missing)}; it is of another version"
        )


def tensor(row: Mapping[str, "pa.Scalar"], name: str, rank: int, dtypes: Mapping[str, np.dtype] = FLOATS) -> np.ndarray:
    """A tensor of a row. Raises CorruptRecord if its bytes, shape and dtype do not agree."""
    content, shape, dtype = (row[column] for column in columns(name))
    found = shape.as_py() if shape.is_valid else None
    if not isinstance(found, list) or len(found) != rank or not all(type(n) is int and n >= 0 for n in found):
        raise CorruptRecord(f"{name}_shape: expected {rank} numbers, found {shown(found)}")
    kind = dtype.as_py() if dtype.is_valid else None
    if kind not in dtypes:
        raise CorruptRecord(f"{name}_dtype: expected one of {', '.join(dtypes)}, found '{shown(kind)}'")
    count = int(np.prod(found, dtype=object))
    stored = memoryview(content.as_buffer()) if content.is_valid else memoryview(b"")
    if count > LARGEST or len(stored) != count * dtypes[kind].itemsize:
        raise CorruptRecord(
            f"{name}_bytes: expected {kind} of shape {shown(found)}, at most {LARGEST} numbers, found {len(stored)} "
            f"bytes"
        )
    return np.frombuffer(stored, dtypes[kind]).reshape(found)


def text(row: Mapping[str, "pa.Scalar"]) -> np.ndarray:
    """The text embedding of a row, [n, text_dim], zero where its mask is, if it has one. Raises CorruptRecord."""
    embedding = tensor(row, TEXT, 2)
    if f"{MASK}_bytes" not in row:
        return embedding
    mask = tensor(row, MASK, 1, MASKS)
    if len(mask) != len(embedding):
        raise CorruptRecord(f"{MASK}: expected one number for each of {len(embedding)} tokens, found {len(mask)}")
    return np.where(mask[:, None] != 0, embedding, embedding.dtype.type(0))
