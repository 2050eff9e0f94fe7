"""`dataset.json`, the manifest of a folder of prepared training examples. It is written last."""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

from rehyat_jax.data.records import RANKS
from rehyat_jax.errors import InputError
from rehyat_jax.files.json_files import read_json_object, write_json
from rehyat_jax.files.write import written_whole
from rehyat_jax.weights.config_fields import require_known

MANIFEST = "dataset.json"
NULL_TEXT = "null_text.safetensors"
"""File next to the manifest with `text` [L, text_dim], the embedding of no caption."""

SHARD_SUFFIX = ".array_record"
FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Shard:
    """An ArrayRecord file in the folder."""

    file: str
    examples: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class BucketFiles:
    """The examples of one shape, [T, H, W, C]."""

    latents_shape: tuple[int, int, int, int]
    shards: tuple[Shard, ...]

    @property
    def examples(self) -> int:
        return sum(shard.examples for shard in self.shards)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Description of a data set.

    Attributes:
      kind: a key of `RANKS`: "examples" (clean latents) or "trajectories" (a teacher's noisy latents).
      codec, text_encoder: names of the models that computed latents and text embeddings.
      buckets: one bucket for each shape, in the order of their shapes; no shard is empty.
      teacher: the model that sampled trajectories, see `rehyat_jax.weights.identity`; None if it is not known, as in
        the files of earlier versions.
    """

    kind: str
    codec: str
    text_encoder: str
    buckets: tuple[BucketFiles, ...]
    teacher: str | None = None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes `folder/dataset.json`, complete or not at all."""
    with written_whole(folder / MANIFEST) as temporary:
        fields = dataclasses.asdict(manifest)
        if manifest.teacher is None:
            del fields["teacher"]
        write_json(temporary, {"format_version": FORMAT_VERSION, **fields})


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder, checked against the names and sizes of the files in it.

    Raises:
      InputError: the manifest is missing or damaged, it names a file outside of the folder, or a shard is missing or
        has another size.
    """
    file = folder / MANIFEST
    if not folder.is_dir():
        raise InputError(f"{folder}: expected a folder of prepared examples, found none; check the path")
    if not file.is_file():
        raise InputError(
            f"{file}: expected the manifest of prepared examples, found no file; it is written last: run "
            f"python -m rehyat_jax.prepare again until it is done, or check the path"
        )
    fields = _fields({"teacher": None} | read_json_object(file), f"{file}", ("format_version", *_names(Manifest)))
    if fields["format_version"] != FORMAT_VERSION:
        raise InputError(
            f"{file}: expected format_version {FORMAT_VERSION}, found {fields['format_version']!r}; another version of "
            f"rehyat_jax wrote it: prepare the data again"
        )
    if fields["kind"] not in tuple(RANKS):
        raise InputError(f"{file}: expected a kind of {', '.join(RANKS)}, found {fields['kind']!r}; prepare it again")
    for name in ("codec", "text_encoder"):
        if not isinstance(fields[name], str):
            raise InputError(f"{file}: expected {name} to be a name, found {fields[name]!r}; prepare the data again")
    teacher = fields["teacher"]
    if teacher is not None and not (isinstance(teacher, str) and re.fullmatch("[0-9a-f]{64}", teacher)):
        raise InputError(
            f"{file}: expected teacher to be 64 hexadecimal digits, found {str(teacher)[:100]!r}; prepare it again"
        )
    buckets = tuple(parse_bucket(file, entry) for entry in _list(file, "buckets", fields["buckets"]))
    names = [shard.file for bucket in buckets for shard in bucket.shards]
    if len(set(names)) < len(names) or len({bucket.latents_shape for bucket in buckets}) < len(buckets):
        raise InputError(f"{file}: expected every shape and every shard once, found one twice; prepare the data again")
    for bucket in buckets:
        for shard in bucket.shards:
            check_shard(folder, shard)
    return Manifest(fields["kind"], fields["codec"], fields["text_encoder"], buckets, teacher)


def check_shard(folder: Path, shard: Shard) -> None:
    """Raises InputError unless a shard exists and has its full size."""
    path = folder / shard.file
    found = f"{path.stat().st_size} bytes" if path.is_file() else "no file"
    if found != f"{shard.bytes} bytes":
        raise InputError(
            f"{path}: expected a shard of {shard.bytes} bytes, as {MANIFEST} says, found {found}; copy it again, or "
            f"run the command that prepared it once more"
        )


def parse_bucket(file: Path, entry: Any) -> BucketFiles:
    """The files of a bucket from JSON. Raises InputError, naming the JSON's file, if a value is wrong."""
    fields = _fields(entry, f"{file}: bucket", _names(BucketFiles))
    shape = fields["latents_shape"]
    if not (isinstance(shape, list) and len(shape) == 4 and all(map(_is_count, shape)) and math.prod(shape) < 2**31):
        raise InputError(
            f"{file}: expected a latents_shape of four positive numbers, found {str(shape)[:100]}; prepare it again"
        )
    shards = []
    for entry in _list(file, "shards", fields["shards"]):
        shard = _fields(entry, f"{file}: shard", _names(Shard))
        name = shard["file"]
        if not isinstance(name, str) or not re.fullmatch(r"[^/\\\0]{1,200}" + re.escape(SHARD_SUFFIX), name):
            raise InputError(
                f"{file}: expected shards NAME{SHARD_SUFFIX} in the same folder, found {str(name)[:200]!r}; "
                f"prepare the data again"
            )
        if not _is_count(shard["examples"]) or not _is_count(shard["bytes"]):
            raise InputError(f"{file}: shard {name}: expected positive numbers of examples and bytes, found {shard}")
        shards.append(Shard(**shard))
    return BucketFiles(tuple(shape), tuple(shards))


def _names(cls: type) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(cls))


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def _list(file: Path, name: str, value: Any) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise InputError(f"{file}: expected {name} to be a list that is not empty; prepare the data again")
    return value


def _fields(value: Any, source: str, names: tuple[str, ...]) -> dict[str, Any]:
    """A JSON object with exactly these fields."""
    if not isinstance(value, dict):
        raise InputError(f"{source}: expected an object, found {str(value)[:100]}; prepare the data again")
    for name in value:
        require_known(name, names, source)
    for name in names:
        if name not in value:
            raise InputError(f"{source}: field {name!r} is missing; prepare the data again")
    return value
