"""The videos of a benchmark: their names, folders and seeds."""

import dataclasses
import os
from collections.abc import Collection, Sequence
from pathlib import Path

from rehyat_jax.errors import InputError
from rehyat_jax.evaluation.vbench.benchmarks import Benchmark
from rehyat_jax.evaluation.vbench.prompts import Entry
from rehyat_jax.files.shown import closest, shown
from rehyat_jax.files.temporary import LONGEST_NAME

SEEDS_OF_A_PROMPT = 100_000
"""Distance of the seeds of two successive prompts. VBench's team sampled Wan2.1 with seed 100000 * i + j for video j of
prompt i (github.com/Vchitect/VBench/issues/163)."""


@dataclasses.dataclass(frozen=True)
class Video:
    """A video of a benchmark.

    Attributes:
      entry: its prompt.
      index: its number among the videos of the prompt, from 0.
      name: its path below the folder of the model.
    """

    entry: Entry
    index: int
    name: Path

    @property
    def seed(self) -> int:
        """Seed of its noise, the same for every model."""
        return SEEDS_OF_A_PROMPT * self.entry.number + self.index


def chosen_entries(benchmark: Benchmark, entries: Sequence[Entry], dimensions: Collection[str]) -> list[Entry]:
    """The prompts of some dimensions, or of all if none is given. Raises InputError if one is unknown."""
    for dimension in dimensions:
        if dimension not in benchmark.folders:
            raise InputError(
                f"--dimensions {shown(dimension)}: expected dimensions of {benchmark.name}, the benchmark of --info; "
                f"the closest one is {closest(dimension, benchmark.folders)[0]!r}; all of them: "
                f"{', '.join(benchmark.folders)}"
            )
    folders = {benchmark.folders[dimension] for dimension in dimensions}
    return [entry for entry in entries if not folders or entry.folder in folders]


def list_videos(
    benchmark: Benchmark, entries: Sequence[Entry], chosen: Sequence[Entry], *, flat: bool = False
) -> list[Video]:
    """The videos of chosen prompts. Prompts that give the same file share it: the first one in `entries` makes it.

    Args:
      benchmark: the benchmark.
      entries: all its prompts.
      chosen: those whose videos are wanted.
      flat: whether all videos are in one folder; otherwise each is in the folder of its dimension.

    Raises:
      InputError: a prompt makes no name of a file.
    """
    makers: dict[Path, Video] = {}
    wanted: set[Path] = set()
    numbers = {entry.number for entry in chosen}
    for entry in entries:
        for index in range(benchmark.videos_of(entry.folder)):
            name = f"{entry.prompt[: benchmark.name_characters]}-{index}.mp4"
            path = Path(name) if flat else Path(entry.folder) / name
            makers.setdefault(path, Video(entry, index, path))
            if entry.number in numbers:
                _check_name(name, entry)
                wanted.add(path)
    return [video for path, video in makers.items() if path in wanted]


def check_case(folder: Path, videos: Sequence[Video]) -> None:
    """Raises InputError if names differ only in their case, and the file system of `folder` makes no difference."""
    seen: dict[str, Path] = {}
    for video in videos:
        other = seen.setdefault(str(video.name).casefold(), video.name)
        if other != video.name and _ignores_case(folder):
            raise InputError(
                f"{folder}: expected a file system that distinguishes 'A' and 'a', because VBench has the videos "
                f"{shown(other)!r} and {shown(video.name)!r}; choose another --out"
            )


def foreign_files(folder: Path, videos: Sequence[Video]) -> list[Path]:
    """Files in the folders of the videos that are none of them, without hidden ones.

    VBench takes the suffix of all videos from the first name that the system lists, so one other file can hide them.
    """
    known = {folder / video.name for video in videos}
    return sorted(
        path
        for place in {path.parent for path in known}
        if place.is_dir()
        for path in place.iterdir()
        if path.is_file() and path not in known and not path.name.startswith(".") and path.suffix != ".mp4"
    )


def _check_name(name: str, entry: Entry) -> None:
    place = f"entry {entry.number} of --info"
    forbidden = [character for character in ("/", "\0", "\n") if character in name]
    if forbidden:
        raise InputError(
            f"{place}: {shown(entry.prompt)!r} cannot be the name of a file, because it has {forbidden[0]!r}; VBench "
            f"looks for videos under the names of its own prompts: get its list again"
        )
    size = len(os.fsencode(name))
    if size > LONGEST_NAME:
        raise InputError(
            f"{place}: {shown(entry.prompt)!r}: expected the name of a file of at most {LONGEST_NAME} bytes, found "
            f"{size}; VBench looks for videos under the names of its own prompts: get its list again"
        )


def _ignores_case(folder: Path) -> bool:
    probe = folder / f".case-{os.getpid()}-a"
    try:
        probe.touch()
        return probe.with_name(probe.name[:-1] + "A").exists()
    finally:
        probe.unlink(missing_ok=True)
