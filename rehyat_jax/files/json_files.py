"""Reads and writes small JSON files."""

import json
from pathlib import Path
from typing import Any

from rehyat_jax.errors import InputError
from rehyat_jax.files.regular import SMALL, check_regular_file


def read_json(file: Path) -> Any:
    """The value in a JSON file of at most `SMALL` bytes.

    Raises:
      InputError: the file can't be read, is no regular file, is too large, or is not JSON.
    """
    check_regular_file(file, largest_bytes=SMALL)
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}); check the path and its permissions") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: is not JSON ({error}); the file is damaged, get it again") from error


def read_json_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises InputError as `read_json`, and if the file holds something else."""
    content = read_json(file)
    if not isinstance(content, dict):
        raise InputError(f"{file}: expected a JSON object, found a {type(content).__name__}; get the file again")
    return content


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Writes JSON in the style of PyTorch libraries: two spaces of indentation, sorted keys, a final newline."""
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
