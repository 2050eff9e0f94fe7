"""What is saved of a run besides its state, and whether another command may go on with it."""

import functools
import importlib.metadata
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
from flax.traverse_util import flatten_dict

import rehyat_jax
from rehyat_jax.errors import InputError
from rehyat_jax.parallel.mesh import AXES

REFUSED = "refused"
CHANGED = "another run from here on"
ROUNDED = "the same run, to rounding"
SAME = "the same run"

EFFECTS = {
    **dict.fromkeys(("log_every", "checkpoint_every", "keep_checkpoints", "keep_every", "keep_best", "evals"), SAME),
    **dict.fromkeys(("checkpoint_dir", "data.workers", "max_skipped"), SAME),
    **dict.fromkeys(("remat", "attention_implementation", *(f"mesh.{axis}" for axis in AXES)), ROUNDED),
    **dict.fromkeys(("steps", "accumulation_steps", "dtype", "data.path", "data.corrupt", "ema_decay"), CHANGED),
    **dict.fromkeys(("flow_shift", "timestep_sampling", "caption_dropout", "spike_factor"), CHANGED),
    **dict.fromkeys(
        (
            f"optimizer.{name}"
            for name in ("learning_rate", "muon_learning_rate", "warmup_steps", "decay", "weight_decay", "clip_norm")
        ),
        CHANGED,
    ),
}
"""What becomes of a run that goes on with another value of a field. All other fields are refused: they decide what is
trained, or on which examples, and the saved state would be of no use or of another run."""


class Difference(NamedTuple):
    """One row of the table that a user sees."""

    field: str
    saved: Any
    now: Any
    then: str


def describe_run(config: ml_collections.ConfigDict, data: dict[str, int], *, examples: int) -> dict[str, Any]:
    """What is saved with a run's state, for JSON.

    Args:
      data: state of the data's iterator: the position there.
      examples: how many there are.
    """
    return {"config": json.loads(config.to_json()), "data": data, "examples": examples, "code": code_version()}


def check_continuation(saved: dict[str, Any], now: dict[str, Any], step: int, place: str) -> str:
    """A table of what differs between two descriptions of a run, empty where nothing does.

    Args:
      saved: `describe_run`, as it comes back from JSON.
      now: that of the command that is to go on.
      step: after which it is to.
      place: what holds the run, for the message.

    Raises:
      InputError: with the table, when a row of it is refused.
    """
    rows = list(_differences(saved, now, step))
    table = _as_text([Difference("", "saved", "now", "it would be"), *rows]) if rows else ""
    if any(row.then == REFUSED for row in rows):
        raise InputError(
            f"{place}: holds a run that differs from this command in fields that cannot change:\n{table}\n"
            f"give the saved values of what is refused, or start over in another workdir"
        )
    return table


def _differences(saved: dict[str, Any], now: dict[str, Any], step: int) -> Iterator[Difference]:
    old, new = (flatten_dict(run["config"], sep=".") for run in (saved, now))
    for field in sorted(old.keys() | new.keys()):
        # A field that only one version of the code knows is not refused: which code it is stands below.
        before, after = old.get(field, "unknown"), new.get(field, "unknown")
        if before == after:
            continue
        then = EFFECTS.get(field, REFUSED) if field in old and field in new else CHANGED
        if (field == "steps" and after < step) or (field == "ema_decay" and 0 in (before, after)):
            then = REFUSED
        yield Difference(f"config.{field}", before, after, then)
    if saved["examples"] != now["examples"]:
        yield Difference("number of training examples", saved["examples"], now["examples"], REFUSED)
    if saved["code"] != now["code"]:
        yield Difference("version of the code", saved["code"], now["code"], CHANGED)


def _as_text(rows: list[Difference]) -> str:
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join(f"  {line}" for line in lines)


@functools.cache
def code_version() -> str:
    """Version of the package and, where it runs from a Git repository, the commit."""
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
