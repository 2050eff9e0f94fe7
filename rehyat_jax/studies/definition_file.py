"""Keeps the definition of long work in its workdir, and refuses to continue the work with another one."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from rehyat_jax.errors import InputError
from rehyat_jax.files.json_files import read_json_object
from rehyat_jax.files.write import reported_write_errors, written_whole
from rehyat_jax.training.values import shown_value

DEFINITION = "definition.json"

LARGEST_TABLE = 20
"""Number of differences that a message shows."""

Difference = tuple[str, Any, Any]
"""(name, value when the work began, value now)"""


def keep_definition(
    workdir: Path,
    now: Mapping[str, Any],
    differences: Callable[[dict[str, Any], Mapping[str, Any]], Iterable[Difference]],
    *,
    holds: str,
) -> None:
    """Writes the definition of work that begins, or compares it with that of the work that has begun.

    Args:
      workdir: an existing directory.
      now: the definition, for JSON.
      differences: of a definition that was written and this one, the values that may not differ, but do.
      holds: what the directory holds if there are differences, for the message.

    Raises:
      InputError: there are differences; the message has a table of them. Or a file cannot be read or written.
    """
    record = workdir / DEFINITION
    if record.exists():
        try:
            rows = list(differences(read_json_object(record), now))
        except (AttributeError, KeyError, TypeError) as error:
            raise InputError(f"{record}: is damaged ({error!r}); restore it, or give another --workdir") from error
        if rows:
            table = "\n".join(
                f"  {name}: {shown_value(before)} when it began, {shown_value(after)} now"
                for name, before, after in rows[:LARGEST_TABLE]
            )
            raise InputError(f"{workdir}: holds {holds}:\n{table}\nput the definition back, or give another --workdir")
    with reported_write_errors(record), written_whole(record) as temporary:
        temporary.write_text(json.dumps(now, indent=1) + "\n")


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    """What changed between two flat definitions. A name that only one of them has is no difference."""
    return [(name, before[name], now[name]) for name in before if name in now and before[name] != now[name]]
