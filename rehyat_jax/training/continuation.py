"""The description of a run that is saved with its state, and the check whether a command may resume the run."""

import functools
import importlib.metadata
import json
import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
from flax.traverse_util import flatten_dict

import rehyat_jax
from rehyat_jax.errors import InputError
from rehyat_jax.training.config import config_from_json
from rehyat_jax.training.fields import BY_PATH, CHANGED, REFUSED, SAME, effect_of_change
from rehyat_jax.training.stages import STAGES


class Difference(NamedTuple):
    """One row of the table that a user sees."""

    field: str
    saved: Any
    now: Any
    then: str


def describe_run(
    config: ml_collections.ConfigDict, data: dict[str, int], *, examples: int, inputs: Mapping[str, str]
) -> dict[str, Any]:
    """The description of a run that is saved with its state, for JSON.

    Args:
      data: state of the data iterator: the position in the data.
      examples: number of training examples.
      inputs: fingerprints of the run's inputs; see `input_fingerprints`.
    """
    described = {"config": json.loads(config.to_json()), "data": data, "examples": examples, "inputs": dict(inputs)}
    return {**described, "code": code_version()}


def check_continuation(saved: dict[str, Any], now: dict[str, Any], step: int, place: str) -> str:
    """A table of the differences between two descriptions of a run; empty if there are none.

    Args:
      saved: result of `describe_run`, read back from JSON.
      now: result of `describe_run` for the command that resumes the run.
      step: number of steps after which it resumes.
      place: location of the run, for the message.

    Raises:
      InputError: a difference is refused; the message has the table.
    """
    rows = list(_differences(saved, now, step))
    table = _as_text([Difference("", "saved", "now", "it would be"), *rows]) if rows else ""
    if any(row.then == REFUSED for row in rows):
        raise InputError(
            f"{place}: holds a run that differs from this command in fields that cannot change:\n{table}\n"
            f"give the saved values of what is refused, put back its files, or start over in another workdir"
        )
    return table


def _differences(saved: dict[str, Any], now: dict[str, Any], step: int) -> Iterator[Difference]:
    old, new = (flatten_dict(run["config"], sep=".") for run in (saved, now))
    for field in sorted(old.keys() | new.keys()):
        # A field that the run's version did not know had the effect of its default. One that only that version knew is
        # not refused: the last row names the versions.
        before = old.get(field, _default(field))
        after = new.get(field, "unknown")
        if before == after:
            continue
        then = effect_of_change(field, before, after, step) if field in new else CHANGED
        inputs = saved.get("inputs", {})
        if field in inputs and inputs[field] == now["inputs"].get(field):
            then = SAME  # the same files at another place
        yield Difference(f"config.{field}", before, after, then)
    # Earlier versions saved no fingerprints.
    for field in sorted(saved.get("inputs", {}).keys() & now["inputs"].keys()):
        before, after = (run["inputs"][field] for run in (saved, now))
        if before != after:
            yield Difference(f"files of config.{field}", _short(before), _short(after), _effect_of_files(field, now))
    if saved["examples"] != now["examples"]:
        yield Difference("number of training examples", saved["examples"], now["examples"], REFUSED)
    if saved["code"] != now["code"]:
        yield Difference("version of the code", saved["code"], now["code"], CHANGED)


def _default(field: str) -> Any:
    """The default of a field, as JSON has it."""
    return json.loads(json.dumps(BY_PATH[field].default)) if field in BY_PATH else "unknown"


def _effect_of_files(field: str, run: dict[str, Any]) -> str:
    """The effect of other files at the same place. The model is read again only for the parameters that are frozen."""
    if field == "init_from":
        config = config_from_json(run["config"])
        return REFUSED if STAGES[config.stage].freezes(config) else SAME
    return CHANGED


def _short(fingerprint: str) -> str:
    """A fingerprint with the first digits of its hash."""
    return re.sub(r"[0-9a-f]{64}$", lambda found: found[0][:12], fingerprint)


def _as_text(rows: list[Difference]) -> str:
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join(f"  {line}" for line in lines)


@functools.cache
def code_version() -> str:
    """Version of the package and, if it runs from a Git repository, the commit."""
    version = importlib.metadata.version("rehyat_jax")
    folder = Path(rehyat_jax.__file__).parent.parent
    if not (folder / ".git").exists():
        return version
    try:
        command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        commit = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return version
    return f"{version} {commit}"
