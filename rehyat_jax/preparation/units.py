"""Filling a folder of prepared examples in units, so that it can be stopped, gone on with and shared among hosts.

The inputs are cut into units of neighbours. A unit becomes one shard for each shape in it, and last of all a report in
`.prepare/units`; one without its report is done again from the start. What a unit holds depends on the inputs and the
options alone, not on who does it or when, so any number of hosts, stopped any number of times, make the same bytes.
Whoever finds all units done writes what is about the whole: that needs no one to wait for another.
"""

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from safetensors.numpy import save
from tqdm import tqdm

from rehyat_jax.data.manifest import (
    NULL_TEXT,
    SHARD_SUFFIX,
    BucketFiles,
    Manifest,
    Shard,
    check_shard,
    read_manifest,
    write_manifest,
)
from rehyat_jax.data.prepared import read_null_text
from rehyat_jax.data.records import pack
from rehyat_jax.errors import InputError
from rehyat_jax.files.json_files import read_json_object, write_json
from rehyat_jax.files.write import reported_write_errors, written_whole
from rehyat_jax.preparation.contact_sheet import write_contact_sheet
from rehyat_jax.weights.safetensors_file import DTYPES

PLAN, UNITS = ".prepare/plan.json", ".prepare/units"
SUMMARY = "summary"

STORED = {str(dtype): dtype for dtype in DTYPES.values()}
"""Dtypes to store latents and text in, by name."""


class Plan(NamedTuple):
    """What is to be prepared; the same on all hosts.

    Attributes:
      kind: see `rehyat_jax.data.manifest.Manifest`.
      codec, text_encoder: names of what makes latents and text embeddings.
      options: everything else that decides what comes out, as JSON values.
      inputs: one after another, as JSON values; only whether they are the same is kept.
      unit: inputs of a unit.
    """

    kind: str
    codec: str
    text_encoder: str
    options: Mapping[str, Any]
    inputs: Sequence[Any]
    unit: int

    @property
    def units(self) -> list[range]:
        """The inputs of each unit."""
        return [
            range(start, min(start + self.unit, len(self.inputs))) for start in range(0, len(self.inputs), self.unit)
        ]


class Hosts(NamedTuple):
    """Which of how many hosts this is; each does its share of the units."""

    host: int = 0
    num_hosts: int = 1


class UnitWriter:
    """Takes a unit's examples and the reasons why there is none."""

    def __init__(self, folder: Path, number: int, stack: contextlib.ExitStack):
        self._folder, self._number, self._stack = folder, number, stack
        self._writers: dict[tuple[int, ...], ArrayRecordWriter] = {}
        self._examples: Counter[tuple[int, ...]] = Counter()
        self._rejects: list[dict[str, str]] = []

    def add(self, example: Mapping[str, np.ndarray], description: Mapping[str, Any]) -> None:
        """Appends an example, see `rehyat_jax.data.records.pack`. Raises CorruptRecord if it is not finite."""
        record = pack(example, description)
        shape = example["latents"].shape
        if shape not in self._writers:
            temporary = self._stack.enter_context(written_whole(self._folder / self._file(shape)))
            # One record a chunk, for access in any order; floating-point numbers hardly compress.
            writer = ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")
            self._stack.callback(writer.close)
            self._writers[shape] = writer
        self._writers[shape].write(record)
        self._examples[shape] += 1

    def reject(self, name: str, reason: str, detail: str = "") -> None:
        """Notes that an input gives no example.

        Args:
          name: of the input.
          reason: a few words, the same for all inputs that share it.
          detail: about this one.
        """
        self._rejects.append({"name": name, "reason": reason, "detail": detail})

    def _file(self, shape: tuple[int, ...]) -> str:
        return f"{self._number:06d}-{'x'.join(map(str, shape))}{SHARD_SUFFIX}"

    def report(self) -> dict[str, Any]:
        """Of the unit, once all of its shards have their names."""
        shards = []
        for shape in sorted(self._writers):
            file = self._file(shape)
            size = (self._folder / file).stat().st_size
            shards.append(
                {"latents_shape": list(shape), "file": file, "examples": self._examples[shape], "bytes": size}
            )
        return {"shards": shards, "rejects": self._rejects}


Fill = Callable[[UnitWriter, range, tqdm], None]
"""(where to put examples, which inputs, what to tell when one is done)."""


def prepare(
    folder: Path, plan: Plan, fill: Fill, null_text: Callable[[], np.ndarray], hosts: Hosts, *, item: str
) -> str:
    """Does this host's units that are not done, and if then all are, completes the data set.

    Args:
      folder: created if needed. Several hosts see the same one, or copy theirs into one and run again.
      plan: of the whole.
      fill: makes a unit.
      null_text: makes the embedding of no caption, [L, text_dim] float32.
      hosts: which units are this host's.
      item: what an input is called.

    Returns:
      What to tell the user: the summary of the complete data set, or what is left to other hosts.

    Raises:
      InputError: the folder has something else in it or cannot be written, or no input gave an example.
    """
    _open(folder, plan)
    units = plan.units
    mine = range(hosts.host, len(units), hosts.num_hosts)
    pending = [number for number in mine if not _is_done(folder, number)]
    done = sum(len(units[number]) for number in mine) - sum(len(units[number]) for number in pending)
    total = sum(len(units[number]) for number in mine)
    with tqdm(total=total, initial=done, desc="preparing", unit=item, dynamic_ncols=True, smoothing=0.05) as progress:
        for number in pending:
            with reported_write_errors(folder):
                for left in folder.glob(f".{number:06d}-*.partial"):
                    left.unlink()
                with contextlib.ExitStack() as stack:
                    writer = UnitWriter(folder, number, stack)
                    fill(writer, units[number], progress)
                with written_whole(_report(folder, number)) as temporary:
                    write_json(temporary, writer.report())
    missing = [number for number in range(len(units)) if not _is_done(folder, number)]
    if missing:
        return f"{folder}: {len(missing)} of {len(units)} units are left to other hosts"
    with reported_write_errors(folder):
        _complete(folder, plan, null_text, item)
    return (folder / f"{SUMMARY}.txt").read_text(encoding="utf-8").rstrip()


def _open(folder: Path, plan: Plan) -> None:
    """Writes the plan into a new folder, and checks that what is there is the same."""
    digest = hashlib.sha256(json.dumps(plan.inputs, sort_keys=True).encode()).hexdigest()
    content = json.loads(json.dumps({**plan._asdict(), "inputs": f"{len(plan.inputs)}, SHA-256 {digest}"}))
    file = folder / PLAN
    if not file.exists():
        # Another host may just be writing the plan.
        found = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        if folder.is_file() or found not in ([], [file.parent.name]):
            raise InputError(f"{folder}: expected a new or empty folder, found other files; choose another destination")
        with reported_write_errors(folder), written_whole(file) as temporary:
            write_json(temporary, content)
    before = read_json_object(file)
    different = [
        f"{name} was {before.get(name)}, is {content[name]}" for name in content if before.get(name) != content[name]
    ]
    if different:
        raise InputError(
            f"{folder}: was begun with other inputs or options: {'; '.join(different)}; give the same, or another "
            f"destination"
        )


def _report(folder: Path, number: int) -> Path:
    return folder / UNITS / f"{number:06d}.json"


def _is_done(folder: Path, number: int) -> bool:
    """Whether a unit has its report and all that it tells of."""
    if not _report(folder, number).is_file():
        return False
    try:
        for shard in _shards(_report(folder, number)):
            check_shard(folder, shard[1])
    except InputError:
        return False
    return True


def _shards(report: Path) -> Iterator[tuple[tuple[int, ...], Shard]]:
    for entry in read_json_object(report)["shards"]:
        shape = tuple(entry.pop("latents_shape"))
        yield shape, Shard(**entry)


def _complete(folder: Path, plan: Plan, null_text: Callable[[], np.ndarray], item: str) -> None:
    """Writes what is about the whole, the manifest last, unless it is there."""
    reports = [_report(folder, number) for number in range(len(plan.units))]
    shards: dict[tuple[int, ...], list[Shard]] = {}
    for shape, shard in (pair for report in reports for pair in _shards(report)):
        shards.setdefault(shape, []).append(shard)
    buckets = tuple(BucketFiles(shape, tuple(shards[shape])) for shape in sorted(shards))
    manifest = Manifest(plan.kind, plan.codec, plan.text_encoder, buckets)
    if _is_complete(folder, manifest):
        return
    rejects = [reject for report in reports for reject in read_json_object(report)["rejects"]]
    summary = {
        "inputs": len(plan.inputs),
        "examples": sum(bucket.examples for bucket in buckets),
        "bytes": sum(shard.bytes for bucket in buckets for shard in bucket.shards),
        "buckets": [{"latents_shape": bucket.latents_shape, "examples": bucket.examples} for bucket in buckets],
        "rejected": dict(Counter(reject["reason"] for reject in rejects).most_common()),
        "rejects": rejects,
    }
    with written_whole(folder / f"{SUMMARY}.json") as temporary:
        write_json(temporary, summary)
    if not buckets:
        raise InputError(
            f"{folder}: none of {len(plan.inputs)} inputs gave an example ({_counts(summary['rejected'])}); "
            f"{SUMMARY}.json has the reasons"
        )
    with written_whole(folder / NULL_TEXT) as temporary:
        temporary.write_bytes(save({"text": null_text()}))
    sheet = write_contact_sheet(folder, manifest)
    with written_whole(folder / f"{SUMMARY}.txt") as temporary:
        temporary.write_text(_told(folder, summary, item, sheet), encoding="utf-8")
    write_manifest(folder, manifest)


def _is_complete(folder: Path, manifest: Manifest) -> bool:
    try:
        read_null_text(folder / NULL_TEXT)
        return read_manifest(folder) == manifest and (folder / f"{SUMMARY}.txt").is_file()
    except InputError:
        return False


def _counts(rejected: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in rejected.items()) or "none left out"


def _told(folder: Path, summary: Mapping[str, Any], item: str, sheet: str) -> str:
    lines = [
        f"{summary['examples']} examples of {summary['inputs']} {item}s, {summary['bytes'] / 1e6:.1f} MB; "
        f"left out: {_counts(summary['rejected'])}"
    ]
    for bucket in summary["buckets"]:
        lines.append(f"  latents {'x'.join(map(str, bucket['latents_shape']))}: {bucket['examples']} examples")
    for reject in summary["rejects"][:20]:
        lines.append(f"  left out {reject['name']}: {reject['reason']}{reject['detail'] and ': '}{reject['detail']}")
    if len(summary["rejects"]) > 20:
        lines.append(f"  and {len(summary['rejects']) - 20} more, in {SUMMARY}.json")
    return "\n".join([*lines, sheet]) + "\n"
