"""Videos in WebDataset's tar shards. The headers are read once; a video is read where its header says.

A shard is never unpacked or decoded: `webdataset` only groups the files by their keys, so nothing is unpickled and no
name in a shard becomes a path.
"""

import contextlib
import io
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from rehyat_jax.errors import InputError
from rehyat_jax.extras import check_installed
from rehyat_jax.files.fingerprint import BLOCKS, fingerprint
from rehyat_jax.files.regular import check_regular_file
from rehyat_jax.files.shown import shown
from rehyat_jax.files.video import SUFFIXES
from rehyat_jax.preparation.captions import LONGEST_LINE, LONGEST_NAME, Captioned
from rehyat_jax.preparation.video_sources import LARGEST_VIDEO, Rejected, copied

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")

LARGEST_HEADER = 2**20
"""Largest number of bytes that a header with a long name or other fields may have."""

PIECE = 2**22
"""Number of bytes to copy at a time."""


class Member(NamedTuple):
    """The place of a file in a shard, in bytes."""

    begin: int
    size: int


def find_shards(source: Path) -> list[Path]:
    """The tar files of a folder and its subfolders, in the order of their names, or a tar file itself.

    Raises InputError if there are only compressed ones, which cannot be read in parts.
    """
    files = [source] if source.is_file() else sorted(source.rglob("*.tar"))
    shards = [file for file in files if file.suffix == ".tar"]
    others = [source] if source.is_file() else source.rglob("*")
    if not shards and (compressed := next((file for file in others if file.name.endswith(COMPRESSED)), None)):
        raise InputError(
            f"{compressed}: expected a tar shard without compression, which can be read in parts; unpack it"
        )
    return shards


class TarShards:
    """The samples of tar shards that have a video; see `VideoSource`.

    A sample is the consecutive files with the same key, as in WebDataset: `KEY.mp4` (or another of `SUFFIXES`), with
    `KEY.txt`, or else the field `caption` of the JSON object in `KEY.json`.

    Args:
      source: the folder of the shards, or a shard.
      shards: result of `find_shards`.
      caption: the field.

    Raises:
      InputError: webdataset is not installed, or a shard cannot be read on this machine now. A shard from its first
        damaged header on is one fault.
    """

    def __init__(self, source: Path, shards: list[Path], caption: str):
        check_installed("reading tar shards", "webdataset")
        folder = source if source.is_dir() else source.parent
        self.videos: list[Captioned] = []
        self.faults: dict[int, tuple[str, str]] = {}
        self._places: dict[int, tuple[Path, Member]] = {}
        for shard in tqdm(shards, desc="listing", unit="shard", dynamic_ncols=True):
            check_regular_file(shard)
            name = shard.relative_to(folder).as_posix()
            try:
                self._list(shard, name, caption)
            except (tarfile.TarError, ValueError) as error:
                self.faults[len(self.videos)] = "damaged shard", f"the rest of it is left out: {error.args[0]}"
                self.videos.append(Captioned(name, shard.stat().st_size, None))
            except OSError as error:
                raise InputError(f"{shard}: cannot be read ({error.strerror}); check the disk") from error
        self.options: dict[str, Any] = {"caption": caption, "source_files": fingerprint(shards, folder, blocks=BLOCKS)}

    @contextlib.contextmanager
    def file(self, number: int) -> Iterator[Path]:
        shard, member = self._places[number]
        if member.size > LARGEST_VIDEO:
            raise Rejected("too large", f"{member.size:,} bytes, expected at most {LARGEST_VIDEO:,}")
        with shard.open("rb") as stream, copied(_pieces(stream, member)) as path:
            yield path

    def _list(self, shard: Path, name: str, caption: str) -> None:
        from webdataset.tariterators import group_by_keys  # which takes seconds where PyTorch is installed

        damage: list[tarfile.TarError] = []
        with shard.open("rb") as stream:
            for sample in group_by_keys(_until_damage(_members(shard), damage)):
                suffix = next((suffix for suffix in SUFFIXES if suffix[1:] in sample), None)
                if suffix is None:
                    continue
                number, member = len(self.videos), sample[suffix[1:]]
                fault = None
                try:
                    text = _caption(stream, sample, caption)
                except Rejected as error:
                    text, fault = None, error.args
                self.videos.append(Captioned(f"{name}/{sample['__key__']}{suffix}", member.size, text))
                self._places[number] = shard, member
                if fault:
                    self.faults[number] = fault
        for error in damage:
            raise error


def _until_damage(members: Iterator[dict[str, Any]], damage: list[tarfile.TarError]) -> Iterator[dict[str, Any]]:
    """The files before the damage, which is appended; `group_by_keys` would lose the sample before an exception."""
    try:
        yield from members
    except tarfile.TarError as error:
        damage.append(error)


def _members(shard: Path) -> Iterator[dict[str, Any]]:
    """The files of a shard as `group_by_keys` takes them, with their places instead of their content."""
    length = shard.stat().st_size
    with _Headers(shard) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
        while header := tar.next():
            tar.members.clear()  # which would keep every header
            if not header.isreg() or header.issparse() or header.name.startswith("__"):
                continue
            if header.offset_data + header.size > length:
                raise tarfile.ReadError(f"expected {header.size:,} bytes of {shown(header.name)}, found fewer")
            if len(header.name) > LONGEST_NAME:
                raise tarfile.ReadError(f"expected names of at most {LONGEST_NAME} characters, found a longer one")
            yield {"fname": header.name, "data": Member(header.offset_data, header.size), "__url__": ""}


class _Headers(io.FileIO):
    """A file of which only short pieces are read: a header of a hostile shard may name any length."""

    def read(self, size: int = -1, /) -> bytes:
        if not 0 <= size <= LARGEST_HEADER:
            raise tarfile.ReadError(f"expected headers of at most {LARGEST_HEADER:,} bytes, found {size:,}")
        return super().read(size)


def _caption(stream: io.BufferedReader, sample: dict[str, Any], field: str) -> str | None:
    """The caption of a sample, None if it has none. Raises Rejected if it is damaged."""
    member = sample.get("txt") or sample.get("json")
    if member is None:
        return None
    if member.size > 4 * LONGEST_LINE:
        raise Rejected("caption refused", f"expected at most {4 * LONGEST_LINE:,} bytes, found {member.size:,}")
    try:
        text = b"".join(_pieces(stream, member)).decode("utf-8-sig")
        if "txt" not in sample:
            content = json.loads(text)
            text = content.get(field, "") if isinstance(content, dict) else None
    except (ValueError, RecursionError) as error:
        raise Rejected("caption refused", f"expected UTF-8 text or a JSON object, found: {error}") from error
    if not isinstance(text, str):
        raise Rejected("caption refused", f"expected a JSON object with a text as its field '{shown(field)}'")
    return " ".join(text.split()) or None


def _pieces(stream: io.BufferedReader, member: Member) -> Iterator[bytes]:
    stream.seek(member.begin)
    left = member.size
    while left:
        piece = stream.read(min(left, PIECE))
        if not piece:
            raise OSError(f"{os.fspath(stream.name)}: ends early; it was longer when it was listed")
        left -= len(piece)
        yield piece
