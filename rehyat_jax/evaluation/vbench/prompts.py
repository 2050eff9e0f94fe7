"""Reads the prompt lists of VBench and VBench-2.0.

`VBench_full_info.json` and `VBench2_full_info.json` have every prompt with its dimensions, and the benchmarks look for
exactly these prompts in the names of videos. Augmented prompts, from which the videos are made, are in text files: one
a line, in the order of a text file of original prompts.
"""

import sys
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rehyat_jax.errors import InputError
from rehyat_jax.evaluation.vbench.benchmarks import BENCHMARKS, Benchmark
from rehyat_jax.files.json_files import read_json
from rehyat_jax.files.regular import LARGEST_LIST, check_regular_file
from rehyat_jax.files.shown import closest, shown

SHOWN_LINES = 5
"""Most lines that a warning names."""


class Entry(NamedTuple):
    """A prompt of a benchmark.

    Attributes:
      number: its position in the benchmark's list, from 0.
      prompt: the original prompt, which names its videos.
      folder: the folder of its videos in the layout by dimensions.
    """

    number: int
    prompt: str
    folder: str


def read_info(file: Path) -> tuple[Benchmark, list[Entry]]:
    """The benchmark of a `VBench_full_info.json` or `VBench2_full_info.json`, and its prompts.

    Raises:
      InputError: the file is none of these, or a dimension is unknown.
    """
    content = read_json(file)
    what = "expected VBench_full_info.json or VBench2_full_info.json, a list of prompts with their dimensions"
    if not isinstance(content, list) or not content:
        raise InputError(
            f"{file}: {what}; found {shown(type(content).__name__)}; get the file from VBench's repository"
        )
    for number, row in enumerate(content):
        _check_row(row, f"{file}: entry {number}", what)
    first = content[0]["dimension"][0]
    benchmark = next((found for found in BENCHMARKS if first in found.folders), BENCHMARKS[0])
    return benchmark, [
        Entry(number, row["prompt_en"], _folder(row["dimension"], benchmark, f"{file}: entry {number}"))
        for number, row in enumerate(content)
    ]


def read_lines(file: Path) -> list[str]:
    """The lines of a text file, without white space at their ends. Raises InputError if one is empty, or none is there.

    Empty lines at the end of the file are left out.
    """
    check_regular_file(file, largest_bytes=LARGEST_LIST)
    try:
        # Not splitlines: VBench reads with readlines, which does not separate at U+2028 and the like.
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: expected a text file with one prompt a line, found: {error}; check it") from error
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise InputError(f"{file}: expected one prompt a line, found none; get the file again")
    if "" in lines:
        raise InputError(
            f"{file}: line {lines.index('') + 1}: expected a prompt, found an empty line; prompts are matched by their "
            f"lines: get the file again"
        )
    return lines


def augmented_prompts(
    entries: Sequence[Entry], folders: Collection[str], prompts: Path, augmented: Path
) -> tuple[dict[int, str], list[Path]]:
    """The augmented prompts by the numbers of their entries, and the files that were read.

    Args:
      entries: all prompts of a benchmark.
      folders: those whose augmented prompts are needed.
      prompts: original prompts: a text file, or a folder with a text file for each dimension, as "scene.txt".
      augmented: augmented prompts in the same order, in one file or a folder likewise.

    Raises:
      InputError: the numbers of lines differ, or an entry has no line.
    """
    if prompts.is_dir() != augmented.is_dir():
        kinds = ["a folder" if path.is_dir() else "a file" for path in (prompts, augmented)]
        raise InputError(
            f"--augmented {augmented}: expected {kinds[0]}, as --prompts {prompts}, found {kinds[1]}; give two lists "
            f"of the same prompts"
        )
    if not prompts.is_dir():
        return _by_text(entries, prompts, _read_pairs(prompts, augmented)), [prompts, augmented]
    found: dict[int, str] = {}
    files: list[Path] = []
    for folder in dict.fromkeys(entry.folder for entry in entries if entry.folder in folders):
        pair = prompts / f"{folder}.txt", augmented / f"{folder}.txt"
        files += pair
        own = [entry for entry in entries if entry.folder == folder]
        found |= _by_position(own, folder, pair[0], _read_pairs(*pair))
    return found, files


def _check_row(row: Any, place: str, what: str) -> None:
    if not isinstance(row, dict) or not isinstance(row.get("prompt_en"), str) or not row["prompt_en"].strip():
        raise InputError(f"{place}: {what}; found {shown(row)!r} without text in 'prompt_en'; get the file again")
    dimensions = row.get("dimension")
    if not isinstance(dimensions, list) or not dimensions or not all(isinstance(name, str) for name in dimensions):
        raise InputError(f"{place}: {what}; found 'dimension' {shown(dimensions)!r}; get the file again")


def _folder(dimensions: Sequence[str], benchmark: Benchmark, place: str) -> str:
    for dimension in dimensions:
        if dimension not in benchmark.folders:
            nearest = closest(dimension, benchmark.folders)[0]
            raise InputError(
                f"{place}: expected a dimension of {benchmark.name}, found {shown(dimension)!r}; the closest one is "
                f"{nearest!r}"
            )
    folders = dict.fromkeys(benchmark.folders[dimension] for dimension in dimensions)
    if len(folders) > 1:
        raise InputError(
            f"{place}: expected dimensions that are measured on the same videos, found {', '.join(dimensions)}, which "
            f"are measured on those of {' and '.join(folders)}; get the file again"
        )
    return next(iter(folders))


def _read_pairs(prompts: Path, augmented: Path) -> list[tuple[str, str]]:
    """The lines of two files, side by side. Raises InputError if the numbers of lines differ."""
    originals, texts = read_lines(prompts), read_lines(augmented)
    if len(originals) != len(texts):
        shorter, more = (prompts, augmented) if len(originals) < len(texts) else (augmented, prompts)
        raise InputError(
            f"{augmented}: expected {len(originals)} lines, one for each line of {prompts}, found {len(texts)}; line "
            f"{min(len(originals), len(texts)) + 1} of {more} has no partner in {shorter.name}: get both files again"
        )
    return list(zip(originals, texts, strict=True))


def _by_text(entries: Sequence[Entry], prompts: Path, lines: Sequence[tuple[str, str]]) -> dict[int, str]:
    """The augmented prompts of entries. The n-th of several equal entries has the n-th line, or the only one."""
    texts: dict[str, list[str]] = defaultdict(list)
    for original, text in lines:
        texts[original].append(text)
    uses: Counter[str] = Counter()
    found: dict[int, str] = {}
    for entry in entries:
        own, use = texts[entry.prompt], uses[entry.prompt]
        uses[entry.prompt] += 1
        if not own or (use >= len(own) > 1):
            raise InputError(
                f"{prompts}: expected a line for entry {entry.number} of --info, {shown(entry.prompt)!r}, found "
                f"{len(own) or 'none'}; give VBench's own list of original prompts"
            )
        found[entry.number] = own[min(use, len(own) - 1)]
    unknown = [number for number, (original, _) in enumerate(lines, 1) if original not in uses]
    _warn(prompts, unknown, "is no prompt of --info; no video is made of it")
    return found


def _by_position(
    entries: Sequence[Entry], folder: str, prompts: Path, lines: Sequence[tuple[str, str]]
) -> dict[int, str]:
    """The augmented prompts of a dimension's entries, in the order of its lines."""
    if len(lines) != len(entries):
        raise InputError(
            f"{prompts}: expected the {len(entries)} prompts of dimension {folder!r} in --info, found {len(lines)} "
            f"lines; give files of the same version of VBench"
        )
    pairs = list(zip(entries, lines, strict=True))
    # The text files of VBench-2.0 have a word that is corrected in its VBench2_full_info.json.
    different = [number for number, (entry, (original, _)) in enumerate(pairs, 1) if entry.prompt != original]
    if 2 * len(different) > len(entries):
        number = different[0]
        raise InputError(
            f"{prompts}: line {number}: expected {shown(entries[number - 1].prompt)!r}, as in --info, found "
            f"{shown(lines[number - 1][0])!r}; give VBench's own file of this dimension"
        )
    _warn(prompts, different, "differs from its prompt in --info, which names the videos")
    return {entry.number: text for entry, (_, text) in pairs}


def _warn(file: Path, lines: Sequence[int], what: str) -> None:
    if lines:
        more = " and more" if len(lines) > SHOWN_LINES else ""
        print(f"warning: {file}: line {', '.join(map(str, lines[:SHOWN_LINES]))}{more} {what}", file=sys.stderr)
