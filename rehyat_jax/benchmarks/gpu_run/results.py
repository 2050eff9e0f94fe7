"""The results file: a JSON object with a key for each section, complete at any moment."""

import json
import threading
from pathlib import Path
from typing import Any

from rehyat_jax.errors import InputError
from rehyat_jax.files.json_files import read_json_object
from rehyat_jax.files.write import written_whole

COMPLETE, RUNNING, CUT_OFF, FAILED, SKIPPED = "complete", "running", "cut off", "failed", "skipped"


class Results:
    """Sections by name, in a file that is rewritten with every change.

    A section is {"status", "date", "environment", "seconds", "rows", "error"}. The report also shows a "note" added by
    hand.

    Args:
      path: the file; the sections of an existing file stay until they are started again.
    """

    def __init__(self, path: Path):
        self.path = path
        self.sections = read_results(path) if path.exists() else {}
        self._lock = threading.Lock()

    def has_rows(self, name: str) -> bool:
        """True if a section has results already."""
        return bool(self.sections.get(name, {}).get("rows"))

    def start(self, name: str, **fields: Any) -> None:
        """Replaces a section with one without rows."""
        with self._lock:
            self.sections[name] = {"status": RUNNING, "rows": [], **fields}
            self._write()

    def update(self, name: str, **fields: Any) -> None:
        """Sets fields of a section."""
        with self._lock:
            self.sections[name].update(fields)
            self._write()

    def add_row(self, name: str, row: Any) -> None:
        """Appends a row to a section."""
        with self._lock:
            self.sections[name]["rows"].append(row)
            self._write()

    def _write(self) -> None:
        with written_whole(self.path) as temporary:
            temporary.write_text(json.dumps(self.sections, indent=1) + "\n")


def read_results(path: Path) -> dict[str, Any]:
    """The sections of a file. Raises InputError unless `Results` wrote it."""
    if not path.exists():
        raise InputError(f"{path}: expected a file of results, found none; give the FILE of an earlier --json FILE")
    sections = read_json_object(path)
    for name, section in sections.items():
        if not isinstance(section, dict) or not isinstance(section.get("rows"), list) or "status" not in section:
            raise InputError(f"{path}: section {name!r} should have a status and rows; give another file")
    return sections


def rows_of(sections: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """The rows of a section; empty if it was not run."""
    return sections[name]["rows"] if name in sections else []


def first_row(sections: dict[str, Any], name: str) -> dict[str, Any]:
    """The first row of a section; empty if it has none."""
    return next(iter(rows_of(sections, name)), {})


def is_right(section: dict[str, Any]) -> bool:
    """True if the section is complete and no row has a false "right"."""
    return section["status"] == COMPLETE and all(row.get("right", True) for row in section["rows"])
