"""Fills a folder of prepared examples in units, so that the work can be stopped, resumed and shared among hosts.

The inputs are divided into units of consecutive inputs. A unit is written as one shard for each shape in it and then a
report in `.prepare/units`. A unit without its report is prepared again from the start. The content of a unit depends
only on the inputs and the options, so any number of hosts, stopped any number of times, write the same bytes. A host
that finds all units done writes the files of the complete data set, so no host waits for another.
"""

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from safetensors.numpy import save
from tqdm import tqdm

from rehyat_jax.data.array_records import start_reader
from rehyat_jax.data.manifest import (
    NULL_TEXT,
    SHARD_SUFFIX,
    BucketFiles,
    Manifest,
    Shard,
    check_shard,
    parse_bucket,
    read_manifest,
    write_manifest,
)
from rehyat_jax.data.prepared import read_null_text
from rehyat_jax.data.records import pack
from rehyat_jax.errors import InputError
from rehyat_jax.files.json_files import read_json_object, write_json
from rehyat_jax.files.shown import check_path, shown
from rehyat_jax.files.temporary import remove, remove_leftovers
from rehyat_jax.files.write import reported_write_errors, written_whole
from rehyat_jax.generation.codecs import Codec
from rehyat_jax.preparation.contact_sheet import write_contact_sheet
from rehyat_jax.weights.safetensors_file import DTYPES

PLAN, UNITS, TEXT = ".prepare/plan.json", ".prepare/units", ".prepare/text"
SUMMARY = "summary"

MOST_FAILURES = 8
"""Number of units that may fail for reasons of the machine before the command gives up."""

STORED = {str(dtype): dtype for dtype in DTYPES.values()}
"""Dtypes of stored latents and text, by name."""


class Plan(NamedTuple):
    """The data set to prepare; equal on all hosts.

    Attributes:
      kind: see `rehyat_jax.data.manifest.Manifest`.
      codec, text_encoder: names of the models that compute latents and text embeddings.
      options: everything else that decides the result, as JSON values.
      inputs: the inputs in order, as JSON values; the folder only stores their number and hash.
      unit: number of inputs in a unit.
      teacher: see `Manifest`.
    """

    kind: str
    codec: str
    text_encoder: str
    options: Mapping[str, Any]
    inputs: Sequence[Any]
    unit: int
    teacher: str | None = None

    @property
    def units(self) -> list[range]:
        """The inputs of each unit."""
        return [
            range(start, min(start + self.unit, len(self.inputs))) for start in range(0, len(self.inputs), self.unit)
        ]


class Hosts(NamedTuple):
    """The index of this host and the number of hosts; each host prepares its share of the units."""

    host: int = 0
    num_hosts: int = 1


class NotNow(InputError):
    """An input cannot be read on this machine now, which says nothing about the input.

    Its unit is not done, so the next run of the command reads it again.
    """


class UnitWriter:
    """Writes a unit's examples, and collects the reasons why inputs gave none."""

    def __init__(self, folder: Path, number: int, stack: contextlib.ExitStack):
        self._folder, self._number, self._stack = folder, number, stack
        self._writers: dict[tuple[int, ...], ArrayRecordWriter] = {}
        self._examples: Counter[tuple[int, ...]] = Counter()
        self._rejects: list[dict[str, str]] = []
        self._notes: list[dict[str, str]] = []

    def add(self, example: Mapping[str, np.ndarray], description: Mapping[str, Any]) -> None:
        """Appends an example; see `rehyat_jax.data.records.pack`. Raises CorruptRecord if it is not finite."""
        record = pack(example, description)
        shape = example["latents"].shape
        if shape not in self._writers:
            temporary = self._stack.enter_context(written_whole(self._folder / self._file(shape)))
            # One record per chunk, for random access; floating-point numbers hardly compress.
            writer = ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")
            self._stack.callback(writer.close)
            self._writers[shape] = writer
        self._writers[shape].write(record)
        self._examples[shape] += 1

    def reject(self, name: str, reason: str, detail: str = "") -> None:
        """Records that an input gives no example.

        Args:
          name: name of the input.
          reason: a few words, equal for all inputs with the same reason.
          detail: details about this input.
        """
        self._rejects.append({"name": name, "reason": reason, "detail": shown(detail, 1000)})

    def note(self, name: str, note: str, detail: str) -> None:
        """Records something about an example for the summary; arguments as in `reject`."""
        self._notes.append({"name": name, "note": note, "detail": shown(detail, 1000)})

    def _file(self, shape: tuple[int, ...]) -> str:
        return f"{self._number:06d}-{'x'.join(map(str, shape))}{SHARD_SUFFIX}"

    def report(self) -> dict[str, Any]:
        """The report of the unit; called when all of its shards have their final names."""
        shards = []
        for shape in sorted(self._writers):
            file = self._file(shape)
            size = (self._folder / file).stat().st_size
            shards.append(
                {"latents_shape": list(shape), "file": file, "examples": self._examples[shape], "bytes": size}
            )
        return {"shards": shards, "rejects": self._rejects, "notes": self._notes}


Fill = Callable[[UnitWriter, range, tqdm], None]
"""(writer of the examples, indices of the inputs, progress bar to update after each input) -> None."""


def prepare(
    folder: Path,
    plan: Plan,
    fill: Fill,
    null_text: Callable[[], np.ndarray],
    hosts: Hosts,
    *,
    item: str,
    begin: Callable[[list[int]], None] = lambda numbers: None,
    codec: Callable[[], Codec] | None = None,
) -> str:
    """Prepares this host's pending units; if then all units are done, completes the data set.

    Args:
      folder: created if needed. Several hosts use the same one, or copy theirs into one and run the command again.
      plan: plan of the complete data set.
      fill: prepares a unit, or raises NotNow.
      null_text: returns the embedding of no caption, [L, text_dim] float32.
      hosts: selects the units of this host.
      item: word for an input, in messages.
      begin: called once with the indices of the inputs of this host's pending units, if there are any.
      codec: returns the codec that decodes examples for the contact sheet; by default, that of the plan's name.

    Returns:
      A message for the user: the summary of the complete data set, or the number of units left to other hosts.

    Raises:
      InputError: the folder has other files, cannot be written or has a path that is not UTF-8; no input gave an
        example; or some inputs cannot be read on this machine now, and the units of all others are done.
    """
    # Both raise here, before any work: completing the data set needs them.
    check_path(folder)
    start_reader()
    content = _content(plan)
    _open(folder, content)
    for place in (folder, folder / UNITS, (folder / PLAN).parent):
        remove_leftovers(place)
    units = plan.units
    mine = range(hosts.host, len(units), hosts.num_hosts)
    pending = [number for number in mine if not _is_done(folder, number)]
    done = sum(len(units[number]) for number in mine) - sum(len(units[number]) for number in pending)
    total = sum(len(units[number]) for number in mine)
    if pending:
        begin([index for number in pending for index in units[number]])
    failures: list[str] = []
    with tqdm(total=total, initial=done, desc="preparing", unit=item, dynamic_ncols=True, smoothing=0.05) as progress:
        for number in pending:
            before = progress.n
            try:
                _prepare_unit(folder, content, number, fill, units[number], progress)
            except NotNow as error:
                failures.append(str(error))
                progress.n = before
                progress.refresh()
                if len(failures) == MOST_FAILURES:
                    break
    missing = [number for number in range(len(units)) if not _is_done(folder, number)]
    if missing and failures:
        raise InputError(
            f"{shown(folder)}: {len(missing)} of {len(units)} units are not done. These inputs cannot be read on this "
            f"machine now: {'; '.join(shown(failure, 300) for failure in failures)}. Give the same command again to "
            f"read them again, or take them away and begin anew in another folder"
        )
    if missing:
        return f"{shown(folder)}: {len(missing)} of {len(units)} units are left to other hosts"
    with reported_write_errors(folder):
        _complete(folder, plan, null_text, item, codec)
    return (folder / f"{SUMMARY}.txt").read_text(encoding="utf-8").rstrip()


def _prepare_unit(
    folder: Path, content: dict[str, Any], number: int, fill: Fill, numbers: range, progress: tqdm
) -> None:
    """Prepares the inputs of one unit, and writes its report."""
    with reported_write_errors(folder):
        with contextlib.ExitStack() as stack:
            writer = UnitWriter(folder, number, stack)
            fill(writer, numbers, progress)
            # Another command that began at the same moment may have written its own plan over this one.
            _check_plan(folder, content)
        with written_whole(_report(folder, number)) as temporary:
            write_json(temporary, writer.report())


def _content(plan: Plan) -> dict[str, Any]:
    """The plan as it is written."""
    digest = hashlib.sha256(json.dumps(plan.inputs, sort_keys=True).encode()).hexdigest()
    fields = plan._asdict()
    del fields["teacher"]  # the options have more of it
    return json.loads(json.dumps({**fields, "inputs": f"{len(plan.inputs)}, SHA-256 {digest}"}))


def _open(folder: Path, content: dict[str, Any]) -> None:
    """Writes the plan into a new folder, and checks that the folder's plan is equal to this one."""
    file = folder / PLAN
    if not file.exists():
        # Another host may be writing the plan at this moment.
        found = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        if folder.is_file() or found not in ([], [file.parent.name]):
            raise InputError(f"{folder}: expected a new or empty folder, found other files; choose another destination")
        with reported_write_errors(folder), written_whole(file) as temporary:
            write_json(temporary, content)
    _check_plan(folder, content)


def _check_plan(folder: Path, content: dict[str, Any]) -> None:
    """Raises InputError unless the folder's plan has this content."""
    before = read_json_object(folder / PLAN)
    if isinstance(written := before.get("options"), dict):
        # Earlier versions wrote fewer options.
        options = {name: value for name, value in content["options"].items() if name in written}
        content = {**content, "options": options}
    different = [
        f"{name} was {shown(before.get(name), 500)}, is {shown(content[name], 500)}"
        for name in content
        if before.get(name) != content[name]
    ]
    if different:
        raise InputError(
            f"{shown(folder)}: was begun with other inputs or options: {'; '.join(different)}; give the same, or "
            f"another destination"
        )


def _report(folder: Path, number: int) -> Path:
    return folder / UNITS / f"{number:06d}.json"


def _is_done(folder: Path, number: int) -> bool:
    """True if a unit has its report and every shard that the report lists."""
    if not _report(folder, number).is_file():
        return False
    try:
        for bucket in _read_report(_report(folder, number)).buckets:
            for shard in bucket.shards:
                check_shard(folder, shard)
    except InputError:
        return False
    return True


class Report(NamedTuple):
    """The shards of a unit, one for each shape; the inputs that gave no example; notes about others."""

    buckets: list[BucketFiles]
    rejects: list[dict[str, str]]
    notes: list[dict[str, str]]


def _read_report(file: Path) -> Report:
    """The report of a unit. Raises InputError if it is damaged."""
    content = read_json_object(file)
    try:
        shards = [dict(entry) for entry in content["shards"]]
        buckets = [
            parse_bucket(file, {"latents_shape": entry.pop("latents_shape"), "shards": [entry]}) for entry in shards
        ]
        texts = lambda entries, *keys: [{key: str(entry[key]) for key in keys} for entry in entries]
        return Report(
            buckets,
            texts(content["rejects"], "name", "reason", "detail"),
            texts(content.get("notes", []), "name", "note", "detail"),  # earlier versions wrote none
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file}: expected the report of a unit, found another content; delete it") from error


def _complete(
    folder: Path,
    plan: Plan,
    null_text: Callable[[], np.ndarray],
    item: str,
    codec: Callable[[], Codec] | None,
) -> None:
    """Writes the files of the complete data set, the manifest last, unless they exist."""
    reports = [_read_report(_report(folder, number)) for number in range(len(plan.units))]
    shards: dict[tuple[int, int, int, int], list[Shard]] = {}
    for bucket in (bucket for report in reports for bucket in report.buckets):
        shards.setdefault(bucket.latents_shape, []).extend(bucket.shards)
    buckets = tuple(BucketFiles(shape, tuple(shards[shape])) for shape in sorted(shards))
    manifest = Manifest(plan.kind, plan.codec, plan.text_encoder, buckets, plan.teacher)
    for left in folder.glob(f".??????-*{SHARD_SUFFIX}.*.partial"):  # by killed processes of any machine
        left.unlink(missing_ok=True)
    if _is_complete(folder, manifest):
        remove(folder / TEXT)
        return
    rejects = [reject for report in reports for reject in report.rejects]
    notes = [note for report in reports for note in report.notes]
    summary = {
        "inputs": len(plan.inputs),
        "examples": sum(bucket.examples for bucket in buckets),
        "bytes": sum(shard.bytes for bucket in buckets for shard in bucket.shards),
        "buckets": [{"latents_shape": bucket.latents_shape, "examples": bucket.examples} for bucket in buckets],
        "rejected": _counted(reject["reason"] for reject in rejects),
        "rejects": rejects,
        "noted": _counted(note["note"] for note in notes),
        "notes": notes,
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
    sheet = write_contact_sheet(folder, manifest, codec)
    with written_whole(folder / f"{SUMMARY}.txt") as temporary:
        temporary.write_text(_told(folder, summary, item, sheet), encoding="utf-8")
    write_manifest(folder, manifest)
    remove(folder / TEXT)


def _is_complete(folder: Path, manifest: Manifest) -> bool:
    try:
        read_null_text(folder / NULL_TEXT)
        return read_manifest(folder) == manifest and (folder / f"{SUMMARY}.txt").is_file()
    except InputError:
        return False


def _counted(words: Iterable[str]) -> dict[str, int]:
    return dict(Counter(words).most_common())


def _counts(rejected: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in rejected.items()) or "none"


def _told(folder: Path, summary: Mapping[str, Any], item: str, sheet: str) -> str:
    lines = [
        f"{summary['examples']} examples of {summary['inputs']} {item}s, {summary['bytes'] / 1e6:.1f} MB; "
        f"left out: {_counts(summary['rejected'])}"
    ]
    for bucket in summary["buckets"]:
        lines.append(f"  latents {'x'.join(map(str, bucket['latents_shape']))}: {bucket['examples']} examples")
    for note, count in summary["noted"].items():
        lines.append(f"  {note}: {count}, named in {SUMMARY}.json")
    for reject in summary["rejects"][:20]:
        lines.append(
            f"  left out {shown(reject['name'])}: {reject['reason']}"
            f"{reject['detail'] and ': '}{shown(reject['detail'])}"
        )
    if len(summary["rejects"]) > 20:
        lines.append(f"  and {len(summary['rejects']) - 20} more, in {SUMMARY}.json")
    return "\n".join([*lines, sheet]) + "\n"
