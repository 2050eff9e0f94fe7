"""The training examples that `rehyat_jax.prepare` wrote: ArrayRecord shards, grouped by shape."""

from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from rehyat_jax.data.array_records import start_reader
from rehyat_jax.data.manifest import MANIFEST, NULL_TEXT, BucketFiles, read_manifest
from rehyat_jax.data.records import RANKS, CorruptRecord, describe, unpack
from rehyat_jax.errors import InputError
from rehyat_jax.files.regular import SMALL, check_regular_file
from rehyat_jax.files.shown import check_path


class PreparedExamples:
    """The source of training examples in a folder; see `rehyat_jax.data.pipeline.Source`.

    Attributes:
      kind, codec, text_encoder, teacher: see `rehyat_jax.data.manifest.Manifest`.
      null_text: [L, text_dim] float32.
      files: all files that are read.
      buckets: one `Bucket` for each shape.

    Raises:
      InputError: the manifest is missing or damaged; a shard is missing, truncated, or its index cannot be read; or the
        null text has another format.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        manifest = read_manifest(folder)
        self.kind, self.codec, self.text_encoder = manifest.kind, manifest.codec, manifest.text_encoder
        self.teacher = manifest.teacher
        self.null_text = read_null_text(folder / NULL_TEXT)
        shards = [shard.file for bucket in manifest.buckets for shard in bucket.shards]
        self.files = [folder / name for name in (MANIFEST, NULL_TEXT, *shards)]
        self.buckets = [Bucket(folder, files, self.kind, self.null_text.shape) for files in manifest.buckets]

    def __len__(self) -> int:
        return sum(map(len, self.buckets))


class Bucket:
    """Grain random-access source of examples of one shape.

    An example is {"latents": [T, H, W, C], "text": [L, text_dim]}; one of a teacher's trajectory also has "timestep"
    []. All are float32. Access to a corrupt record raises `CorruptRecord`, which names the shard and the record in it.

    Attributes:
      latents_shape: (T, H, W, C).

    Raises:
      InputError: a shard's index cannot be read, or has another number of records than the manifest; the folder's path
        is not UTF-8; or the system refuses the reader's threads.
    """

    def __init__(self, folder: Path, files: BucketFiles, kind: str, text_shape: tuple[int, int]):
        self.latents_shape = files.latents_shape
        shapes = {"latents": files.latents_shape, "text": text_shape, "timestep": ()}
        self._shapes = {name: shapes[name] for name in RANKS[kind]}
        import grain  # not at the top: it takes a fifth of the time in which commands start

        # ArrayRecord checks a 64-bit hash of every record: a flipped bit raises an error and never changes a number.
        check_path(folder)
        start_reader()
        self._shards, self._ends, end = [], [], 0
        for shard in files.shards:
            path = folder / shard.file
            try:
                records = grain.sources.ArrayRecordDataSource(str(path))
            except (RuntimeError, ValueError) as error:
                raise InputError(
                    f"{path}: expected an ArrayRecord file, found: {_first_line(error)}; copy it again, or delete it "
                    f"and run the command that prepared it once more"
                ) from error
            if len(records) != shard.examples:
                raise InputError(
                    f"{path}: expected {shard.examples} records, as {MANIFEST} says, found {len(records)}; they are of "
                    f"different data sets: copy the folder again"
                )
            end += len(records)
            self._shards.append((path, records))
            self._ends.append(end)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        path, position, record = self._read(index)
        try:
            return unpack(record, self._shapes)
        except CorruptRecord as error:
            raise _located(path, position, error) from error

    def description(self, index: int) -> dict[str, Any]:
        """The description stored in the record of example `index`; see `rehyat_jax.data.records.pack`."""
        self[index]  # checks it
        return describe(self._read(index)[-1])

    def _read(self, index: int) -> tuple[Path, int, bytes]:
        """(shard, position in it, record)."""
        start_reader()  # again in a data worker, which is another process
        number = int(np.searchsorted(self._ends, index, side="right"))
        path, records = self._shards[number]
        position = int(index) - (self._ends[number] - len(records))
        try:
            return path, position, records[position]
        except RuntimeError as error:
            raise _located(path, position, error) from error


def read_null_text(file: Path) -> np.ndarray:
    """[L, text_dim] float32, the tensor `text` of a file. Raises InputError if the file has another content."""
    if file.exists():
        check_regular_file(file, largest_bytes=SMALL)
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError, KeyError, AttributeError) as error:  # the last for dtypes that numpy lacks
        raise InputError(
            f"{file}: expected a safetensors file with the embedding of no caption, found: {error}; write it again"
        ) from error
    text = tensors.get("text")
    if text is None or text.ndim != 2 or text.dtype != np.float32 or not np.isfinite(text).all():
        raise InputError(
            f"{file}: expected one tensor text, [L, text_dim] float32 and finite, found "
            f"{ {name: f'{tensor.dtype}{list(tensor.shape)}' for name, tensor in tensors.items()} }; write it again"
        )
    return text


def _located(path: Path, position: int, error: Exception) -> CorruptRecord:
    return CorruptRecord(
        f"{path}: record {position}: {_first_line(error)}; copy the shard again, or delete it and run the command that "
        f"prepared it once more"
    )


def _first_line(error: Exception) -> str:
    """The first line of an error's message; in ArrayRecord's messages, C++ source locations follow it."""
    return (str(error).splitlines() or ["no reason given"])[0][:300]
