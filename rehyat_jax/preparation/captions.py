"""Finds the videos of a folder and reads their captions."""

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from rehyat_jax.errors import InputError
from rehyat_jax.files.regular import LARGEST_LIST, check_regular_file
from rehyat_jax.files.shown import shown
from rehyat_jax.files.video import SUFFIXES

CSV, JSONL = "captions.csv", "captions.jsonl"

LONGEST_LINE, LONGEST_NAME = 2**20, 4096
"""Largest number of characters in a line of such a list, and in the name of a file; systems allow no longer path."""


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
      InputError: the folder does not exist or has no video, both lists of captions exist, a list has a wrong format, or
        captions cannot be read.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: expected a folder of videos, found none; check the path")
    files = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    if not sizes:
        raise InputError(f"{folder}: expected videos ({', '.join(SUFFIXES)}), found none; check the path")
    lists = [name for name in (CSV, JSONL) if os.path.lexists(folder / name)]
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
    check_regular_file(file, largest_bytes=LARGEST_LIST)
    captions: dict[str, str] = {}
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            for line, name, caption in (_csv_rows if file.suffix == ".csv" else _jsonl_rows)(file, stream):
                if not isinstance(name, str) or not isinstance(caption, str) or not 0 < len(name) <= LONGEST_NAME:
                    raise InputError(
                        f"{file}:{line}: expected a file's name and a caption, found '{shown(name)}', "
                        f"'{shown(caption)}'; correct the line"
                    )
                if name in captions:
                    raise InputError(
                        f"{file}:{line}: expected one caption for '{shown(name)}', found a second; remove one"
                    )
                if name.startswith("/") or "\\" in name or "\0" in name or ".." in name.split("/"):
                    raise InputError(
                        f"{file}:{line}: expected a file within {file.parent}, found '{shown(name)}'; give it as it is "
                        f"there, with forward slashes"
                    )
                captions[name] = " ".join(caption.split())
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{file}: expected captions in UTF-8, found: {error}; save it again") from error
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}); check its permissions and the disk") from error
    return captions


def _lines(file: Path, stream: TextIO) -> Iterator[str]:
    """The lines of a list of captions. Raises InputError for one that is too long to be read into memory."""
    number = 0
    while text := stream.readline(LONGEST_LINE + 1):
        number += 1
        if len(text) > LONGEST_LINE:
            raise InputError(
                f"{file}:{number}: expected a line of at most {LONGEST_LINE:,} characters, found a longer one; it is "
                f"damaged or of another kind"
            )
        yield text


def _csv_rows(file: Path, stream: TextIO) -> Iterator[tuple[int, Any, Any]]:
    rows = csv.DictReader(_lines(file, stream), strict=True)
    columns = rows.fieldnames or []
    if not {"file", "caption"} <= set(columns):
        raise InputError(
            f"{file}:1: expected a header with the columns file and caption, found {shown(columns)}; add one"
        )
    for row in rows:
        yield rows.line_num, row["file"], row["caption"]


def _jsonl_rows(file: Path, stream: TextIO) -> Iterator[tuple[int, Any, Any]]:
    for line, text in enumerate(_lines(file, stream), start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{file}:{line}: expected a JSON object, found: {error}; correct the line") from error
        if not isinstance(row, dict):
            raise InputError(
                f"{file}:{line}: expected an object with 'file' and 'caption', found '{shown(text)}'; correct the line"
            )
        yield line, row.get("file"), row.get("caption")


def _beside(file: Path) -> str:
    """The caption in a text file next to a video; empty if there is no such file, or if it holds something else.

    Raises InputError if the file cannot be read, which says nothing about the caption.
    """
    try:
        if not file.is_file():
            return ""
        with file.open(encoding="utf-8-sig") as stream:
            text = stream.read(LONGEST_LINE + 1)
    except UnicodeDecodeError:
        return ""
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}); check its permissions and the disk") from error
    return " ".join(text.split()) if len(text) <= LONGEST_LINE else ""
