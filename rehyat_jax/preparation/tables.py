"""Rows of Parquet files, and of the folders that `Dataset.save_to_disk` of Hugging Face's `datasets` makes.

pyarrow reads both. `save_to_disk` writes Arrow's stream format, which is mapped into memory. Of Parquet files, only the
needed columns of two row groups are in memory at a time. Nothing is unpickled.
"""

import bisect
import contextlib
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tqdm import tqdm

from rehyat_jax.errors import InputError
from rehyat_jax.extras import check_installed
from rehyat_jax.files.fingerprint import BLOCKS, fingerprint
from rehyat_jax.files.json_files import read_json_object
from rehyat_jax.files.regular import check_regular_file
from rehyat_jax.files.shown import closest, shown
from rehyat_jax.preparation.captions import LONGEST_LINE, Captioned

if TYPE_CHECKING:
    import pyarrow as pa

PARQUET, ARROW = ".parquet", ".arrow"
STATE, SPLITS = "state.json", "dataset_dict.json"
"""Files of a folder that `save_to_disk` made, for a data set and for its splits."""

LARGEST_GROUP = 2**32
"""Largest size in bytes of the needed columns in a row group, which is in memory as a whole."""

LISTING = 16
"""Number of files to open at a time while rows are listed, since a network disk takes its time for each."""


class Damaged(Exception):
    """A file or a row is damaged, on every machine."""


class Group(NamedTuple):
    """Rows that are read together: a row group of a Parquet file, or an Arrow file.

    Attributes:
      file: number of the file.
      index: number of the row group in it.
      captions: the caption of each row; None if it has none.
      too_long: rows whose captions are too long.
    """

    file: int
    index: int
    captions: list[str | None]
    too_long: list[int]


def has_table(source: Path) -> bool:
    """True if a path is a file with a table, or a folder with some."""
    if source.is_file():
        return source.suffix in (PARQUET, ARROW)
    return (
        any((source / name).is_file() for name in (STATE, SPLITS))
        or next(source.rglob(f"*{PARQUET}"), None) is not None
    )


class Table:
    """The rows of all files, in the order of their names.

    Args:
      source: a Parquet file; a folder of them, subfolders included; or a folder that `save_to_disk` made.
      caption: column of captions.

    Attributes:
      schema: the schema of the first file that can be read.
      inputs: the damaged files, and then the rows, with their captions.
      faults: (reason, detail) by the number of an input, for those that give no example.
      options: JSON values that identify the files.

    Raises:
      InputError: pyarrow is not installed; the path has no table, or has splits, of which one must be chosen; no file
        can be read, or none has a column of captions.
    """

    schema: "pa.Schema"

    def __init__(self, source: Path, caption: str):
        check_installed("reading Parquet and Arrow files", "pyarrow")
        self._folder = source if source.is_dir() else source.parent
        self._files, self._caption = _files(source), caption
        self._groups: list[Group] = []
        self._loaded: dict[tuple[int, tuple[str, ...]], pa.Table] = {}
        self._lock = threading.Lock()
        damaged = self._list()
        self.inputs = [Captioned(name, 0, None) for name in damaged]
        self.faults = {number: ("damaged file", reason) for number, reason in enumerate(damaged.values())}
        self._ends: list[int] = []
        """The number after the last row of each group."""
        for group in self._groups:
            begin = len(self.inputs)
            self.inputs += [
                Captioned(self._row_name(group, row), 0, caption) for row, caption in enumerate(group.captions)
            ]
            reason = "caption refused", f"expected at most {LONGEST_LINE:,} characters"
            self.faults |= {begin + row: reason for row in group.too_long}
            self._ends.append(len(self.inputs))
        self.options = {"caption": caption, "source_files": fingerprint(self._files, self._folder, blocks=BLOCKS)}

    def require(self, columns: Sequence[str], remedy: str) -> None:
        """Raises InputError unless the table has these columns."""
        for column in columns:
            if column not in self.schema.names:
                raise InputError(
                    f"{self._folder}: expected a column {column!r}, found "
                    f"{shown(', '.join(closest(column, self.schema.names)), 500)}; {remedy}"
                )

    def row(self, number: int, columns: Sequence[str]) -> dict[str, "pa.Scalar"]:
        """The values of an input that is a row, in some columns.

        Raises:
          Damaged: the file is damaged there.
          OSError: this machine cannot read it now.
        """
        group = bisect.bisect_right(self._ends, number)
        row = number - (self._ends[group] - len(self._groups[group].captions))
        with self._lock:  # one thread reads a row group, others wait for it
            table = self._load(group, tuple(columns))
        with _named_damage():
            return {column: table.column(column)[row] for column in columns}

    def _row_name(self, group: Group, row: int) -> str:
        """The name of a row: its file, and its number in its row group."""
        return f"{self._name(group.file)}{f' group {group.index}' if group.index else ''} row {row}"

    def _load(self, group: int, columns: tuple[str, ...]) -> "pa.Table":
        """The columns of a row group; the two groups used last stay in memory."""
        key = group, columns
        if key in self._loaded:
            self._loaded[key] = self._loaded.pop(key)
        else:
            found = self._groups[group]
            self._loaded[key] = _read(self._files[found.file], found.index, columns)
            if len(self._loaded) > 2:
                del self._loaded[next(iter(self._loaded))]
        return self._loaded[key]

    def _name(self, file: int) -> str:
        return self._files[file].relative_to(self._folder).as_posix()

    def _list(self) -> dict[str, str]:
        """Lists all groups. Returns (name, reason) of each file that is damaged or has another schema."""
        damaged: dict[str, str] = {}
        for file in self._files:
            check_regular_file(file)
        schemas: list[pa.Schema] = []
        bar: dict[str, Any] = dict(desc="listing", unit="file", total=len(self._files), dynamic_ncols=True)
        pool = ThreadPoolExecutor(LISTING)
        try:
            listed = pool.map(self._list_file, range(len(self._files)))
            for number, (schema, groups) in enumerate(tqdm(listed, **bar)):
                name = self._name(number)
                if isinstance(groups, str):
                    damaged[name] = groups
                elif schemas and not schemas[0].equals(schema):
                    damaged[name] = "its columns are not those of the first file"
                else:
                    schemas.append(schema)
                    self._groups += groups
        finally:
            pool.shutdown(cancel_futures=True)  # so that Ctrl-C does not wait for all files
        if not schemas:
            name, reason = next(iter(damaged.items()))
            raise InputError(f"{self._folder / name}: expected a table, found: {reason}; or get the file again")
        self.schema = schemas[0]
        return damaged

    def _list_file(self, number: int) -> tuple["pa.Schema | None", list[Group] | str]:
        """(schema, its groups or the reason why it is damaged)."""
        file = self._files[number]
        try:
            with _named_damage():
                schema, rows = _shape(file)
            if self._caption not in schema.names:
                found = shown(", ".join(closest(self._caption, schema.names)), 500)
                raise Damaged(f"columns {found}, and none of captions, {self._caption!r}; name it: --caption NAME")
            groups = []
            for index, count in enumerate(rows):
                column = _read(file, index, (self._caption,)).column(self._caption)
                with _named_damage():
                    values = column.to_pylist()
                captions = [_caption(value) for value in values]
                if len(captions) != count:
                    raise Damaged(f"expected {count} rows, found {len(captions)}")
                too_long = [row for row, caption in enumerate(captions) if caption and len(caption) > LONGEST_LINE]
                for row in too_long:
                    captions[row] = None
                groups.append(Group(number, index, captions, too_long))
            return schema, groups
        except Damaged as error:
            return None, str(error)
        except OSError as error:
            raise InputError(f"{file}: cannot be read ({error}); check its permissions and the disk") from error


def _files(source: Path) -> list[Path]:
    """The files of a table. Raises InputError if there are none, or if there are splits."""
    if source.is_file():
        return [source]
    if (source / SPLITS).is_file():
        splits = read_json_object(source / SPLITS).get("splits")
        raise InputError(f"{source}: has the splits {shown(splits)}; give the folder of one of them")
    if not (source / STATE).is_file():
        return sorted(source.rglob(f"*{PARQUET}"))
    entries = read_json_object(source / STATE).get("_data_files")
    names = [entry.get("filename") if isinstance(entry, dict) else None for entry in entries or []]
    if not names or not all(isinstance(name, str) and Path(name).name == name and "\0" not in name for name in names):
        raise InputError(f"{source / STATE}: expected the names of data files in the folder; save the data set again")
    return [source / str(name) for name in names]


def _caption(value: Any) -> str | None:
    """A caption on one line; None if there is none. Raises Damaged if it is no text."""
    if value is not None and not isinstance(value, str):
        raise Damaged(f"captions that are no text, {shown(type(value).__name__)}; name their column: --caption NAME")
    return " ".join((value or "").split()) or None


def _shape(file: Path) -> tuple["pa.Schema", list[int]]:
    """(schema, number of rows in each group)."""
    if file.suffix != PARQUET:
        table = _mapped(file)
        return table.schema.remove_metadata(), [len(table)]
    with _opened(file) as parquet:
        groups = [parquet.metadata.row_group(index) for index in range(parquet.num_row_groups)]
        return parquet.schema_arrow.remove_metadata(), [group.num_rows for group in groups]


def _read(file: Path, index: int, columns: Sequence[str]) -> "pa.Table":
    """Some columns of a row group. Raises Damaged, or OSError if this machine cannot read it now."""
    with _named_damage():
        if file.suffix != PARQUET:
            table = _mapped(file).select(columns)
        else:
            with _opened(file) as parquet:
                group = parquet.metadata.row_group(index)
                used = (group.column(number) for number in range(group.num_columns))
                size = sum(c.total_uncompressed_size for c in used if c.path_in_schema.split(".")[0] in columns)
                if size > LARGEST_GROUP:
                    raise Damaged(
                        f"row group {index} has {size:,} bytes, expected at most {LARGEST_GROUP:,}; write it again "
                        f"with fewer rows in a group"
                    )
                table = parquet.read_row_group(index, columns=list(columns), use_threads=False)
        table.validate(full=True)  # otherwise a wrong offset would read memory of others
        return table


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A Parquet file. Python reads it, so that an error of the disk has its number."""
    import pyarrow.parquet as pq

    with file.open("rb") as stream, pq.ParquetFile(stream, page_checksum_verification=True) as parquet:
        yield parquet


def _mapped(file: Path) -> "pa.Table":
    """An Arrow file, in Arrow's stream format, mapped into memory."""
    import pyarrow as pa

    with pa.memory_map(str(file)) as stream, pa.ipc.open_stream(stream) as batches:
        return batches.read_all()


@contextlib.contextmanager
def _named_damage() -> Iterator[None]:
    """Turns the errors of pyarrow about a file's content into Damaged. OSError with a number is the machine's."""
    import pyarrow as pa

    try:
        yield
    except MemoryError:  # also pyarrow's
        raise
    except OSError as error:
        if error.errno is not None:
            raise
        raise Damaged(shown(error, 500)) from error
    except (pa.ArrowException, ValueError, KeyError) as error:
        raise Damaged(shown(error, 500)) from error
