"""Prepares training examples from files that were encoded elsewhere, one safetensors file for each example."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from rehyat_jax.data.manifest import NULL_TEXT
from rehyat_jax.data.prepared import read_null_text
from rehyat_jax.data.records import RANKS, CorruptRecord
from rehyat_jax.errors import InputError
from rehyat_jax.files.shown import is_text
from rehyat_jax.generation.opening import get_codec
from rehyat_jax.preparation.units import STORED, Hosts, NotNow, Plan, UnitWriter, prepare
from rehyat_jax.weights.safetensors_file import DTYPES

FLOATS = {**DTYPES, "F64": np.dtype(np.float64)}
"""The dtypes of latents and text, by their names in safetensors."""

LARGEST = 2**28
"""Largest number of elements in a tensor; 30 seconds of 720p have a tenth."""


def prepare_latent_files(
    source: Path,
    destination: Path,
    *,
    codec: str,
    text_encoder: str,
    models: Path | None = None,
    dtype: str,
    unit: int,
    hosts: Hosts,
) -> str:
    """Fills `destination` with the examples in a folder; see `prepare`.

    The folder holds any number of `NAME.safetensors`. Each has the tensors `latents` [T, H, W, C], in the codec's
    normalisation, and `text` [L, text_dim], zero-padded to the same L in all files, both with dtypes of FLOATS. It may
    have the caption as metadata "caption". The folder also holds `null_text.safetensors` with `text` [L, text_dim]
    float32, the embedding of no caption, which caption dropout uses instead of a caption. To write one file:
    `safetensors.numpy.save_file({"latents": latents, "text": text}, "folder/name.safetensors", {"caption": caption})`.

    Args:
      codec, text_encoder: names of the models that computed them, which the model to be trained must name too.
      models: path of the codec's weights, for the contact sheet, if it has some; None for no contact sheet then.
      dtype: a key of STORED.
      unit: number of files in a unit.

    Raises:
      InputError: the folder, its null text or the destination is wrong; or a file cannot be read on this machine now,
        and all others are done. A file with a wrong format gives no example, and the summary names it.
    """
    if not source.is_dir():
        raise InputError(f"{source}: expected a folder of encoded examples, found none; check the path")
    files = sorted(path for path in source.glob("*.safetensors") if path.name != NULL_TEXT)
    if not files:
        raise InputError(f"{source}: expected files NAME.safetensors with latents and text, found none; check the path")
    null_text = read_null_text(source / NULL_TEXT)
    inputs = [(file.name, file.stat().st_size if file.is_file() else None) for file in files]
    plan = Plan("examples", codec, text_encoder, {"dtype": dtype}, inputs, unit)

    def fill(writer: UnitWriter, numbers: range, progress: tqdm) -> None:
        for file in (files[number] for number in numbers):
            try:
                example, caption = _read(file, null_text.shape)
            except CorruptRecord as error:
                writer.reject(file.name, "not an example", str(error))
            except OSError as error:
                raise NotNow(f"{file}: {error}") from error
            else:
                with np.errstate(over="ignore"):  # an infinity is refused next
                    example = {name: tensor.astype(STORED[dtype]) for name, tensor in example.items()}
                try:
                    writer.add(example, {"name": file.name, "caption": caption})
                except CorruptRecord as error:
                    writer.reject(file.name, "not an example", str(error))
            progress.update()

    decoder = lambda: get_codec(codec, models)
    return prepare(destination, plan, fill, lambda: null_text, hosts, item="file", codec=decoder)


def _read(file: Path, text_shape: tuple[int, ...]) -> tuple[dict[str, np.ndarray], str]:
    """(example, caption). Raises CorruptRecord, or OSError if this machine cannot read the file now."""
    if not is_text(file.name):
        raise CorruptRecord("expected a name in UTF-8; rename the file")
    if os.path.lexists(file) and not file.is_file():
        raise CorruptRecord("expected a regular file, found a directory, a device, a pipe or a link to nothing")
    with file.open("rb") as stream:
        try:
            with safe_open(file, framework="numpy") as tensors:  # which checks the header
                names = tensors.keys()
                found = {name: tensors.get_slice(name) for name in names}
                _check(found, text_shape)
                caption = (tensors.metadata() or {}).get("caption", "")
        except SafetensorError as error:
            raise CorruptRecord(f"expected a complete safetensors file, found: {error}") from error
        # safetensors ends the program where memory for a tensor is missing; this raises MemoryError.
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        example = {}
        for name in RANKS["examples"]:
            begin, end = header[name]["data_offsets"]
            stream.seek(8 + length + begin)
            values = np.frombuffer(stream.read(end - begin), FLOATS[header[name]["dtype"]])
            example[name] = values.reshape(header[name]["shape"])
    return example, caption


def _check(found: Mapping[str, Any], text_shape: tuple[int, ...]) -> None:
    """Raises CorruptRecord unless the tensors of a file, not read yet, are those of an example."""
    if missing := sorted(RANKS["examples"].keys() - found.keys()):
        raise CorruptRecord(f"expected the tensors latents and text, found {sorted(found)}; add {missing}")
    for name, rank in RANKS["examples"].items():
        dtype, shape = str(found[name].get_dtype()), tuple(found[name].get_shape())
        if dtype not in FLOATS:
            raise CorruptRecord(f"tensor {name}: expected one of {', '.join(FLOATS)}, found {dtype}; convert it")
        if len(shape) != rank or 0 in shape:
            raise CorruptRecord(f"tensor {name}: expected {rank} axes, without one for a batch, found shape {shape}")
        if math.prod(shape) > LARGEST:
            raise CorruptRecord(f"tensor {name}: expected at most {LARGEST} numbers, found shape {shape}")
    shape = tuple(found["text"].get_shape())
    if shape != text_shape:
        raise CorruptRecord(f"tensor text: expected shape {text_shape} as in {NULL_TEXT}, found {shape}")
