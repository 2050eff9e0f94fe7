"""One safetensors file: reads its header, and reads and writes single tensors by offset.

The safetensors package maps complete files into memory, and mapped pages count as the process's own until the map is
closed. It also needs all tensors in memory to write a file. Plain reads and writes at offsets keep one tensor in
memory. The format is small: 8 bytes of header length, a JSON header, then the tensors without gaps.
"""

import dataclasses
import json
import math
import os
import re
import shlex
import zipfile
from pathlib import Path
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

from rehyat_jax.errors import InputError
from rehyat_jax.files.regular import check_regular_file
from rehyat_jax.parallel.memory import check_host_memory

DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
"""The dtypes of weights, in the order in which safetensors' own writer places them in a file."""

MAX_HEADER_BYTES = 100_000_000
"""Limit of the reference implementation; a larger header length indicates another kind of file."""


MAX_AXES, MAX_ENTRIES = 16, 2**48
"""Limits above any weights: a tensor that exceeds them is damaged."""


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """The place of a tensor's values: `nbytes` bytes from `offset` of `file`, row-major, little-endian."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name. No values are read.

    Raises:
      InputError: the file can't be read, is not a safetensors file, is truncated, or holds a tensor whose dtype is not
        one of `DTYPES`.
    """
    check_regular_file(file)
    try:
        with open(file, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            start = stream.read(8)
            header_bytes = int.from_bytes(start, "little")
            if len(start) < 8 or not 2 <= header_bytes <= min(MAX_HEADER_BYTES, size - 8):
                _refuse(file, start, f"a header of {header_bytes} bytes does not fit into its {size} bytes")
            header = stream.read(header_bytes)
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}); check the path and its permissions") from error

    try:
        entries = json.loads(header, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        _refuse(file, start, f"its header is not JSON ({error})")
    if not isinstance(entries, dict):
        _refuse(file, start, "its header is not a JSON object")
    entries.pop("__metadata__", None)

    tensors = []
    for name, entry in entries.items():
        begin, dtype, shape = _parse_entry(file, name, entry)
        tensors.append(StoredTensor(name, dtype, shape, file, 8 + header_bytes + begin))
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    end = 8 + header_bytes
    for tensor in tensors:
        if tensor.offset != end:
            raise InputError(
                f"{file}: tensor {tensor.name} should begin at byte {end}, where the one before it ends, but its "
                f"data_offsets say {tensor.offset}; the header is damaged, get the file again"
            )
        end += tensor.nbytes
    if end != size:
        raise InputError(
            f"{file}: expected {end} bytes from its header, found {size}; it is truncated or damaged, get it again"
        )
    return {tensor.name: tensor for tensor in tensors}


def read_tensor(tensor: StoredTensor) -> np.ndarray:
    """The tensor's values.

    Raises:
      InputError: the file can't be read, ends before them, or holds NaN or infinity; or they do not fit into memory.
    """
    check_host_memory(tensor.nbytes, f"{tensor.file}: tensor {tensor.name}", "use a machine with more memory")
    array = np.empty(tensor.shape, tensor.dtype)
    missing = memoryview(array.reshape(-1).view(np.uint8))
    try:
        with open(tensor.file, "rb", buffering=0) as stream:
            stream.seek(tensor.offset)
            # One system call reads at most 2 GiB.
            while count := stream.readinto(missing):
                missing = missing[count:]
    except OSError as error:
        raise InputError(f"{tensor.file}: cannot be read ({error.strerror}); check the disk and the file") from error
    if missing:
        raise InputError(f"{tensor.file}: ends before the end of tensor {tensor.name}; did it change meanwhile?")
    require_finite(array, f"{tensor.file}: tensor {tensor.name}")
    return array


def create_file(file: Path, tensors: dict[str, tuple[np.dtype, tuple[int, ...]]]) -> dict[str, StoredTensor]:
    """Creates a safetensors file with a header for the given dtypes and shapes, and space for the values.

    The header and the order of the tensors (dtype, then name) are those of safetensors' own writer.

    Returns:
      The place of each tensor; fill all of them with `write_tensor`.
    """
    codes = {dtype: code for code, dtype in DTYPES.items()}
    rank = {dtype: index for index, dtype in enumerate(DTYPES.values())}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    placed, end = [], 0
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: (rank[item[1][0]], item[0])):
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": codes[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        placed.append((name, dtype, shape, begin))
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(file, "xb") as stream:
        stream.write(len(encoded).to_bytes(8, "little"))
        stream.write(encoded)
        stream.truncate(8 + len(encoded) + end)
    data = 8 + len(encoded)
    return {name: StoredTensor(name, dtype, shape, file, data + begin) for name, dtype, shape, begin in placed}


def write_tensor(tensor: StoredTensor, array: np.ndarray) -> None:
    """Writes the values of a tensor to its place. Raises InputError if they hold NaN or infinity."""
    if array.shape != tensor.shape or array.dtype != tensor.dtype:
        raise ValueError(f"{tensor.name} is {tensor.dtype}{tensor.shape}, found {array.dtype}{array.shape}")
    require_finite(array, f"tensor {tensor.name}")
    with open(tensor.file, "r+b", buffering=0) as stream:
        stream.seek(tensor.offset)
        remaining = memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        while remaining:
            remaining = remaining[stream.write(remaining) :]


def require_finite(array: np.ndarray, name: str) -> None:
    """Raises InputError if a value is NaN or infinite."""
    if not np.isfinite(array).all():
        count = int(array.size - np.isfinite(array).sum())
        raise InputError(f"{name} has {count} values that are NaN or infinite; the weights are damaged or diverged")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise ValueError("a name occurs twice")
    return entries


def _parse_entry(file: Path, name: str, entry: Any) -> tuple[int, np.dtype, tuple[int, ...]]:
    """(offset after the header, dtype, shape) of one tensor."""
    count = lambda value: type(value) is int and value >= 0
    well_formed = (
        isinstance(entry, dict)
        and isinstance(entry.get("dtype"), str)
        and isinstance(entry.get("shape"), list)
        and len(entry["shape"]) <= MAX_AXES
        and all(map(count, entry["shape"]))
        # Sizes of 0 count as 1: numpy must be able to create empty tensors too.
        and math.prod(max(size, 1) for size in entry["shape"]) < MAX_ENTRIES
        and isinstance(entry.get("data_offsets"), list)
        and len(entry["data_offsets"]) == 2
        and all(map(count, entry["data_offsets"]))
    )
    if not well_formed:
        raise InputError(
            f"{file}: tensor {name} should be described by dtype, shape and data_offsets, found {str(entry)[:200]}; "
            f"the header is damaged, get the file again"
        )
    if entry["dtype"] not in DTYPES:
        raise InputError(
            f"{file}: tensor {name} has dtype {entry['dtype']}, expected one of {', '.join(DTYPES)}; "
            f"convert the checkpoint to one of these first"
        )
    dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    expected = math.prod(shape) * dtype.itemsize
    if end - begin != expected:
        raise InputError(
            f"{file}: tensor {name} of dtype {entry['dtype']} and shape {list(shape)} needs {expected} bytes, but its "
            f"data_offsets hold {end - begin}; the header is damaged, get the file again"
        )
    return begin, dtype, shape


def pickle_remedy(file: Path) -> str:
    """The end of a message about a PyTorch pickle: the command that writes its tensors as safetensors."""
    # Only the newer of torch's two formats, a zip archive, can stay on disk until a tensor is copied.
    mapped = file.is_file() and zipfile.is_zipfile(file)
    code = (
        "import sys, torch; from safetensors.torch import save_file; "
        f"tensors = torch.load(sys.argv[1], map_location='cpu', weights_only=True, mmap={mapped}); "
        "save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, sys.argv[2])"
    )
    paths = f"{shlex.quote(str(file))} {shlex.quote(str(file.with_suffix('.safetensors')))}"
    return f'get the safetensors version of the checkpoint, or make one: python -c "{code}" {paths}'


def _refuse(file: Path, start: bytes, reason: str) -> NoReturn:
    # torch.save writes a zip archive; a bare pickle begins with 0x80 and a protocol number.
    if re.match(rb"PK\x03\x04|\x80[\x02-\x05]", start):
        raise InputError(
            f"{file}: is a PyTorch pickle, expected safetensors; pickles can run any code when opened and are never "
            f"read: {pickle_remedy(file)}"
        )
    raise InputError(
        f"{file}: is not a safetensors file: {reason}; the file is truncated or of another kind, get it again"
    )
