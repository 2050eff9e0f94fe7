"""Finds the videos of a folder and reads their captions."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rehyat_jax.errors import InputError
from rehyat_jax.files.video import SUFFIXES

CSV, JSONL = "captions.csv", "captions.jsonl"


class Captioned(NamedTuple):
    """A video and its caption, one of which may be missing.

    Attributes:
      name: name of the video's file, relative to the folder, with forward slashes.
      size: size of the file in bytes; None if the file does not exist.
      caption: caption of the video, never empty; None if it has no caption.
    """

    name: str
    size: int | None
    caption: str | None


def captioned_videos(folder: Path) -> list[Captioned]:
    """All videos in a folder and its subfolders, and all captions, in the order of their names.

    Captions are UTF-8 text in one of these forms:

      - `captions.csv`, with a header with the columns file and caption
      - `captions.jsonl`, with an object with "file" and "caption" on each line
      - a file NAME.txt next to each video NAME.mp4

    Raises:
      InputError: the folder does not exist or has no video, both lists of captions exist, or a list has a wrong format.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: expected a folder of videos, found none; check the path")
    files = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    if not sizes:
        raise InputError(f"{folder}: expected videos ({', '.join(SUFFIXES)}), found none; check the path")
    lists = [name for name in (CSV, JSONL) if (folder / name).is_file()]
    if len(lists) == 2:
        raise InputError(f"{folder}: expected one list of captions, found {CSV} and {JSONL}; remove one of them")
    if lists:
        captions = read_captions(folder / lists[0])
    else:
        captions = {name: _beside((folder / name).with_suffix(".txt")) for name in sizes}
    return [
        Captioned(name, sizes.get(name), captions.get(name) or None) for name in sorted(sizes.keys() | captions.keys())
    ]


def read_captions(file: Path) -> dict[str, str]:
    """Captions by file name from a CSV or JSONL file. Raises InputError, naming the line, if it is damaged."""
    captions: dict[str, str] = {}
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            for line, name, caption in (_csv_rows if file.suffix == ".csv" else _jsonl_rows)(file, stream):
                if not isinstance(name, str) or not isinstance(caption, str) or not name:
                    raise InputError(
                        f"{file}:{line}: expected a file's name and a caption, found {name!r}, {caption!r}"
                    )
                if name in captions:
                    raise InputError(f"{file}:{line}: expected one caption for {name!r}, found a second; remove one")
                if name.startswith("/") or "\\" in name or "\0" in name or ".." in name.split("/"):
                    raise InputError(
                        f"{file}:{line}: expected a file within {file.parent}, found {name!r}; give it as it is there, "
                        f"with forward slashes"
                    )
                captions[name] = " ".join(caption.split())
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        raise InputError(f"{file}: expected captions in UTF-8, found: {error}; save it again") from error
    return captions


def _csv_rows(file: Path, stream) -> Iterator[tuple[int, str, str]]:
    rows = csv.DictReader(stream, strict=True)
    columns = rows.fieldnames or []
    if not {"file", "caption"} <= set(columns):
        raise InputError(f"{file}:1: expected a header with the columns file and caption, found {columns}; add one")
    for row in rows:
        yield rows.line_num, row["file"], row["caption"]


def _jsonl_rows(file: Path, stream) -> Iterator[tuple[int, str, str]]:
    for line, text in enumerate(stream, start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{file}:{line}: expected a JSON object, found: {error}; correct the line") from error
        if not isinstance(row, dict):
            raise InputError(f'{file}:{line}: expected an object with "file" and "caption", found {text[:100]!r}')
        yield line, row.get("file"), row.get("caption")


def _beside(file: Path) -> str:
    """The caption in a text file next to a video; empty if the file cannot be read."""
    try:
        return " ".join(file.read_text(encoding="utf-8-sig").split())
    except (OSError, UnicodeDecodeError):
        return ""
