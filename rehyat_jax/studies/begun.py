"""Keeps a study's definition in its workdir, and refuses to continue the study with another one.

Variants and seeds may be added: the runs that were made stay valid. Nothing that was there may change or disappear.
"""

import json
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict

from rehyat_jax.errors import InputError
from rehyat_jax.files.fingerprint import BLOCKS, fingerprint
from rehyat_jax.files.json_files import read_json_object
from rehyat_jax.files.write import reported_write_errors, written_whole
from rehyat_jax.studies.definition import Study, stage_config
from rehyat_jax.training.fields import BY_PATH, SAME
from rehyat_jax.training.values import shown_value
from rehyat_jax.weights.load import checkpoint_files

DEFINITION = "definition.json"

CHECKED_ELSEWHERE = ("seed", "init_from")
"""Fields that `seeds` and `teacher` determine."""

LARGEST_TABLE = 20
"""Number of differences that a message shows."""


def check_definition(file: Path, study: Study, workdir: Path) -> None:
    """Writes the definition of a study that begins, or compares it with that of a study that has begun.

    Args:
      file: the study's file.
      study: the study.
      workdir: its directory.

    Raises:
      InputError: the study has begun with another definition; the message has a table of the differences. Or a file
        cannot be read or written.
    """
    record, now = workdir / DEFINITION, describe(file, study)
    if record.exists():
        try:
            rows = differences(read_json_object(record), now)
        except (AttributeError, KeyError, TypeError) as error:
            raise InputError(f"{record}: is damaged ({error!r}); restore it, or give another --workdir") from error
        if rows:
            table = "\n".join(f"  {name}: {before} when it began, {after} now" for name, before, after in rows)
            raise InputError(
                f"{workdir}: holds a study that began with another definition than {file}:\n{table}\n"
                f"put the definition back, or give another --workdir"
            )
    with reported_write_errors(record), written_whole(record) as temporary:
        temporary.write_text(json.dumps(now, indent=1) + "\n")


def describe(file: Path, study: Study) -> dict[str, Any]:
    """Everything that determines the results of a study, for JSON.

    Raises:
      InputError: a configuration or the teacher cannot be read.
    """
    folder, files = checkpoint_files(study.teacher)
    described = {
        "variants": {
            label: {stage.name: _fields(file, study, label, stage) for stage in study.stages_of(label)}
            for label in study.variants
        },
        "seeds": list(study.seeds),
        "measures": list(study.measures),
        "videos": study.videos,
        "teacher": fingerprint(files, folder, blocks=BLOCKS),
    }
    return json.loads(json.dumps(described))


def _fields(file: Path, study: Study, label: str, stage: Any) -> dict[str, Any]:
    config = json.loads(stage_config(file, study, label, stage).to_json())
    fields = flatten_dict(config, sep=".")
    return {name: fields[name] for name in fields if name not in CHECKED_ELSEWHERE and BY_PATH[name].effect != SAME}


def differences(saved: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(name, value when the study began, value now) of everything that changed; additions are not changes.

    A field that only one version of the code knows is no change. At most `LARGEST_TABLE` rows.
    """
    rows = []
    for name in ("measures", "videos", "teacher"):
        if saved.get(name) != now[name]:
            rows.append((name, saved.get(name), now[name]))
    removed = [seed for seed in saved.get("seeds", []) if seed not in now["seeds"]]
    if removed:
        rows.append(("seeds", saved["seeds"], now["seeds"]))
    for label, before in saved.get("variants", {}).items():
        after = now["variants"].get(label)
        if after is None:
            rows.append((f"variant {label!r}", "one of the study's", "none of them"))
        elif list(before) != list(after):
            rows.append((f"stages of variant {label!r}", list(before), list(after)))
        else:
            rows += [
                (f"variant {label!r}, stage {stage!r}, config.{field}", before[stage][field], after[stage][field])
                for stage in before
                for field in before[stage]
                if field in after[stage] and before[stage][field] != after[stage][field]
            ]
    return [(name, shown_value(before), shown_value(after)) for name, before, after in rows[:LARGEST_TABLE]]
