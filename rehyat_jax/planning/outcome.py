"""The end of a plan: its report, its JSON file, a change that would fit, and the exit code."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from rehyat_jax.files.write import check_place, written_whole

DOES_NOT_FIT = 3
"""The exit code of a plan that does not fit the chips."""


class Planned(Protocol):
    """A plan, of a run or of sampling."""

    @property
    def fits(self) -> bool: ...

    def to_json(self) -> dict[str, Any]: ...


def concluded(
    plan: Callable[[], Planned],
    report: Callable[[Any], str],
    remedy: Callable[[Any], object | None],
    json_file: Path | None,
) -> int:
    """Plans, reports and returns the exit code.

    Args:
      plan: makes the plan, which takes minutes.
      report: the plan as text.
      remedy: a change that would fit, None if there is none; called for a plan that does not fit.
      json_file: file for all figures.

    Raises:
      InputError: the file cannot be written; or an error of `plan`.
    """
    if json_file is not None:
        check_place(json_file)
    found = plan()
    print(report(found), flush=True)
    result = found.to_json()
    _write(json_file, result)
    if found.fits:
        return 0
    would_fit = remedy(found)
    print(f"\nwould fit: {would_fit}" if would_fit else "\nno change of those known here would fit")
    _write(json_file, {**result, "remedy": would_fit and str(would_fit)})
    return DOES_NOT_FIT


def _write(json_file: Path | None, result: dict[str, Any]) -> None:
    if json_file is not None:
        with written_whole(json_file) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n")
