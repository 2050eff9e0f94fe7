"""The record of a study, `study.json`: its definition in words, and the figures of every run."""

import dataclasses
import datetime
import importlib.metadata
import json
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rehyat_jax.errors import InputError
from rehyat_jax.files.json_files import read_json_object
from rehyat_jax.files.shown import is_text, shown
from rehyat_jax.files.write import reported_write_errors, written_whole
from rehyat_jax.studies.definition import Study, Trend
from rehyat_jax.studies.measure import BY_BLOCK, METRICS
from rehyat_jax.studies.running import FIGURES, SECONDS, TEACHER, run_folder

RECORD = "study.json"

FIGURE = ".4f"
"""The format of figures on pages."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One variant with one seed.

    Attributes:
      variant: its label.
      seed: its seed.
      values: figures by name, a scalar or a list for each; empty if the run has not finished.
      seconds: seconds that its processes took, over all attempts.
      hardware: machine on which it was measured, with versions of Python and JAX.
      code: version of the package and, in a Git repository, the commit.
      failure: reason why it failed; empty if it did not.
    """

    variant: str
    seed: int
    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    hardware: str = ""
    code: str = ""
    failure: str = ""


@dataclasses.dataclass(frozen=True)
class Record:
    """A study with its results.

    Attributes:
      name: name of the study's file, without ".py".
      title, question, published, headline: see `Study`.
      trends: published scores, see `Study`.
      variants: label -> the fields that differ, in words.
      runs: the runs of every variant with every seed.
      teacher: figures of the teacher itself; empty if it was not measured.
      command: the command that runs the study.
      versions: versions of the packages that were installed when the record was written.
      date: the day on which the record was written.
    """

    name: str
    title: str
    question: str
    published: str
    headline: str
    trends: tuple[Trend, ...]
    variants: dict[str, str]
    runs: tuple[Run, ...]
    teacher: dict[str, Any]
    command: str
    versions: dict[str, str]
    date: str

    def values(self, label: str, metric: str) -> dict[int, float]:
        """Seed -> value of a scalar, for the finished runs of a variant."""
        of_variant = (run for run in self.runs if run.variant == label and metric in run.values)
        return {run.seed: float(run.values[metric]) for run in of_variant}

    def metrics(self) -> list[str]:
        """Names of the scalars that runs have, the headline first."""
        found = [name for name in METRICS if any(name in run.values for run in self.runs)]
        return sorted(found, key=lambda name: name != self.headline)


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Mean, standard deviation (divided by count - 1; 0 for one value) and range of a variant's values over seeds."""

    mean: float
    deviation: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:{FIGURE}} ± {self.deviation:{FIGURE}}"


def statistics(values: Mapping[int, float]) -> Statistics:
    """Statistics of at least one value by seed."""
    array = np.array(list(values.values()))
    deviation = float(array.std(ddof=1)) if len(array) > 1 else 0.0
    return Statistics(float(array.mean()), deviation, float(array.min()), float(array.max()), len(array))


def collect(file: Path, study: Study, workdir: Path, failures: Mapping[str, str]) -> Record:
    """The record of a study from the figures that its runs have written.

    Args:
      file: the study's file.
      study: the study.
      workdir: its directory.
      failures: result of `run_study`.

    Raises:
      InputError: a file of figures is damaged.
    """
    runs = []
    for label in study.variants:
        for seed in study.seeds:
            found, seconds = _figures(run_folder(workdir, label, seed))
            failure = failures.get(f"{label}, seed {seed}", "")
            runs.append(Run(label, seed, seconds=seconds, failure=failure, **found))
    teacher, _ = _figures(workdir / TEACHER)
    return Record(
        name=file.stem,
        title=study.title,
        question=study.question,
        published=study.published,
        headline=study.headline,
        trends=study.trends,
        variants={label: _differences(study, label) for label in study.variants},
        runs=tuple(runs),
        teacher=teacher.get("values", {}),
        command=f"python -m rehyat_jax.study {file}",
        versions={"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("rehyat_jax", "jax", "flax", "optax", "numpy")},
        date=datetime.date.today().isoformat(),
    )


def _figures(folder: Path) -> tuple[dict[str, Any], float]:
    """(values, hardware and code of a finished run, or nothing; seconds of its processes)."""
    figures, seconds = folder / FIGURES, folder / SECONDS
    spent = read_json_object(seconds) if seconds.exists() else {}
    found = read_json_object(figures) if figures.exists() else {}
    if not found.keys() <= {"values", "hardware", "code"} or not _are_figures(found.get("values", {})):
        raise InputError(f"{figures}: expected the figures of a run, found others; delete it, and run the study again")
    return found, round(sum(filter(_is_number, spent.values())), 1)


def _differences(study: Study, label: str) -> str:
    """The changes of a variant in words: "chunk_frames = 5", "stages finetune, blocks = all", or "kind = linear"."""
    variant = study.variants[label]
    words = [f"stages {' and '.join(variant.stages)}"] if variant.stages else []
    for field, value in variant.changes.items():
        if field == "forms":
            words += [text for entry in value for text in _entry_words(entry)]
        else:
            words.append(f"{field.removeprefix('hybrid.')} = {value}")
    return ", ".join(words) or "none"


def _entry_words(entry: Mapping[str, Any]) -> list[str]:
    """An entry of `config.forms` in words; blocks are named unless it is of all."""
    return [f"{field} = {value}" for field, value in entry.items() if (field, value) != ("blocks", "all")]


def write_record(record: Record, file: Path) -> None:
    """Writes a record as JSON. Raises InputError if that fails."""
    with reported_write_errors(file), written_whole(file) as temporary:
        temporary.write_text(json.dumps(dataclasses.asdict(record), indent=1) + "\n", encoding="utf-8")


def read_record(file: Path) -> Record:
    """A record that `write_record` wrote. Raises InputError for another file."""
    fields = read_json_object(file)
    try:
        trends = tuple(Trend(**trend) for trend in fields.pop("trends"))
        runs = tuple(Run(**run) for run in fields.pop("runs"))
        record = Record(**fields, trends=trends, runs=runs)
        if wrong := _wrong_part(record):
            raise ValueError(f"a wrong value in {wrong}")
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        found = shown(error)
        raise InputError(f"{file}: expected the record of a study, found {found}; give a study.json") from error
    return record


def _wrong_part(record: Record) -> str:
    """The first part of a record whose values cannot be what `collect` made; "" if there is none."""
    texts = ("name", "title", "question", "published", "command", "date")
    lengths: dict[tuple[str, str], set[int]] = {}
    for run in record.runs:
        are_texts = all(isinstance(text, str) for text in (run.hardware, run.code, run.failure))
        are_figures = _are_figures(run.values) and _is_number(run.seconds)
        if run.variant not in record.variants or not are_texts or not are_figures:
            return f"the run of {run.variant!r}, seed {run.seed}"
        for name, value in run.values.items():
            lengths.setdefault((run.variant, name), set()).add(len(value) if isinstance(value, list) else -1)
    are_text = all(isinstance(getattr(record, name), str) for name in texts) and all(
        isinstance(text, str) for part in (record.variants, record.versions) for item in part.items() for text in item
    )
    checks = {
        "its texts": are_text and is_text(json.dumps(dataclasses.asdict(record), ensure_ascii=False)),
        "headline": record.headline in METRICS,
        "variants": bool(record.variants),
        "versions": "rehyat_jax" in record.versions,
        "the lengths of its lists": all(len(found) == 1 for found in lengths.values()),
        "the teacher's figures": _are_figures(record.teacher),
        "trends": all(
            trend.scores.keys() <= record.variants.keys() and all(map(_is_number, trend.scores.values()))
            for trend in record.trends
        ),
    }
    return next((part for part, holds in checks.items() if not holds), "")


def _are_figures(values: Any) -> bool:
    """True for a dictionary of scalars, and lists under the names of `METRICS` with the end `BY_BLOCK`."""
    lists = {name + BY_BLOCK for name in METRICS}
    return isinstance(values, dict) and all(
        isinstance(value, list) and len(value) > 0 and all(map(_is_number, value))
        if name in lists
        else name in METRICS and _is_number(value)
        for name, value in values.items()
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < sys.float_info.max
