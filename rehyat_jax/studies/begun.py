"""Keeps a study's definition in its workdir, and refuses to continue the study with another one.

Variants and seeds may be added: the runs that were made stay valid. Nothing that was there may change or disappear.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict

from rehyat_jax.files.fingerprint import BLOCKS, fingerprint
from rehyat_jax.studies.definition import Study, stage_config
from rehyat_jax.studies.definition_file import Difference, keep_definition
from rehyat_jax.training.fields import BY_PATH, SAME
from rehyat_jax.weights.load import checkpoint_files

CHECKED_ELSEWHERE = ("seed", "init_from")
"""Fields that `seeds` and `teacher` determine."""


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
    keep_definition(
        workdir,
        describe(file, study),
        differences,
        holds=f"a study that began with another definition than {file}",
    )


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


def differences(saved: dict[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    """Everything that changed. Additions are no changes, nor is a field that only one version of the code knows."""
    rows: list[Difference] = []
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
    return rows
