"""A run's configuration: its defaults, its checks, and the file that keeps it in the workdir.

`rehyat_jax/training/fields.py` has the table of all fields.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_collections
from flax import traverse_util

from rehyat_jax.attention.form import FORMS, make_form
from rehyat_jax.attention.forms.base import Form
from rehyat_jax.attention.forms.hybrid import HybridConfig
from rehyat_jax.errors import InputError
from rehyat_jax.files.json_files import read_json_object
from rehyat_jax.files.shown import closest
from rehyat_jax.files.write import reported_write_errors, written_whole
from rehyat_jax.training.fields import BY_PATH, ENTRIES, FIELDS, GROUPS, Field
from rehyat_jax.training.stages import STAGES, lora_config
from rehyat_jax.training.values import Entry, shown_value


def default_config() -> ml_collections.ConfigDict:
    """Defaults shared by all stages; a file in `configs/` changes the fields of its experiment.

    The result is locked. An unknown field, in a file or on the command line, is an error that names the closest field.
    """
    config = ml_collections.ConfigDict(
        traverse_util.unflatten_dict({field.path: field.default for field in FIELDS}, sep=".")
    )
    # Without this, the type of the default None would be the only one.
    config.hybrid.blocks = ml_collections.config_dict.placeholder(object)
    return config.lock()


def check_config(config: ml_collections.ConfigDict) -> None:
    """Raises InputError, naming the field, unless the values are valid together."""
    check_known(_paths(config))
    for field in FIELDS:
        field.allowed.check(_lookup(config, field.path), f"config.{field.path}")
    for number, entry in enumerate(config.forms):
        _check_form(entry, f"config.forms[{number}]")
    for number, entry in enumerate(config.evals):
        _check_evaluator(entry, f"config.evals[{number}]")
    for number in range(len(config.forms)):
        hybrid_config(config, number)
    if config.hybrid.blocks or not config.forms:
        hybrid_config(config)
    if config.batch_size % config.accumulation_steps:
        raise InputError(
            f"config.batch_size ({config.batch_size}) must be a multiple of config.accumulation_steps "
            f"({config.accumulation_steps})"
        )
    if config.optimizer.warmup_steps >= config.steps:
        raise InputError(
            f"config.optimizer.warmup_steps ({config.optimizer.warmup_steps}) must be less than config.steps "
            f"({config.steps}); lower it"
        )
    if config.profile and (len(config.profile) != 2 or config.profile[0] > config.profile[1]):
        raise InputError(
            f"config.profile must be empty or the first and the last step of a trace, as (10, 12), found "
            f"{shown_value(tuple(config.profile))}"
        )
    stage = STAGES[config.stage]
    if stage.updates_per_step(config) > 1:
        needed = {"optimizer.name": "adamw", "optimizer.clip_norm": 0, "accumulation_steps": 1}
        for path, value in needed.items():
            if _lookup(config, path) != value:
                raise InputError(
                    f"config.distill.updates_per_batch ({config.distill.updates_per_batch}) needs config.{path} = "
                    f"{value!r}, found {shown_value(_lookup(config, path))}: the blocks make their updates one after "
                    f"another. config.distill.clip_norm clips each block"
                )
    if stage.starts_from_model and not config.init_from:
        raise InputError(f"config.init_from is empty; stage {config.stage!r} starts from a model: give its path")
    _check_lora(config)
    _check_noise(config)
    if stage.learns_guidance and config.velocity.guidance_scale <= 1:
        raise InputError(
            f"config.velocity.guidance_scale must be above 1 in stage {config.stage!r}, found "
            f"{config.velocity.guidance_scale}: it is the guidance that the student learns"
        )
    if stage.teacher_weight(config) and not stage.freezes(config) and not stage.teacher_path(config):
        raise InputError(
            f"config.velocity.teacher is empty; with config.velocity.teacher_weight = {config.velocity.teacher_weight} "
            f"stage {config.stage!r} learns the velocity of a softmax model: give its path"
        )
    if stage.converts and not config.hybrid.blocks and not config.forms:
        raise InputError(
            f'config.hybrid.blocks is unset; stage "{config.stage}" needs the blocks to convert: "all" or indices'
        )


def _check_lora(config: ml_collections.ConfigDict) -> None:
    if not config.lora.rank:
        return
    if not STAGES[config.stage].takes_lora:
        able = " and ".join(f'"{name}"' for name, stage in STAGES.items() if stage.takes_lora)
        raise InputError(
            f"config.lora.rank is {config.lora.rank}, but only stages {able} train adapters, and config.stage is "
            f"{config.stage!r}; set it to 0, or choose another stage"
        )
    if config.optimizer.name == "muon":
        raise InputError(
            f'config.optimizer.name must be "adamw" with config.lora.rank = {config.lora.rank}, found "muon": Muon '
            f"updates the blocks' kernels, which are frozen then"
        )
    try:
        lora_config(config)
    except ValueError as error:
        raise InputError(f"config.lora: {error}") from error


def _check_noise(config: ml_collections.ConfigDict) -> None:
    stage = STAGES[config.stage]
    if config.teacher_forcing and (not config.noise_by_chunk or stage.own_videos):
        raise InputError(
            f"config.teacher_forcing must be False in stage {config.stage!r} with config.noise_by_chunk = "
            f"{config.noise_by_chunk}: it is for chunks with their own noise levels, after those of a real video"
        )
    if not config.noise_by_chunk:
        return
    if not stage.noises_by_chunk:
        able = ", ".join(f'"{name}"' for name, stage in STAGES.items() if stage.noises_by_chunk)
        raise InputError(
            f"config.noise_by_chunk is True, but only stages {able} draw a noise level for every chunk, and "
            f"config.stage is {config.stage!r}, which learns from a softmax model that knows one level for all frames; "
            f"set it to False, or choose another stage"
        )
    if config.mesh.context != 1 and (stage.own_videos or config.teacher_forcing):
        raise InputError(
            f"config.mesh.context must be 1 with config.noise_by_chunk = True in stage {config.stage!r}"
            f"{' and with config.teacher_forcing = True' * config.teacher_forcing}, found {config.mesh.context}: one "
            f"chunk comes after another; shard along the other axes"
        )
    if stage.own_videos:
        return  # scores judge complete videos, with one level
    if stage.own_teacher:
        if config.velocity.teacher:
            raise InputError(
                f"config.velocity.teacher must be empty with config.noise_by_chunk = True in stage {config.stage!r}, "
                f"found {config.velocity.teacher!r}: a softmax model knows one noise level for all frames; the student "
                f"learns from its own initial model"
            )
    elif weight := stage.teacher_weight(config):
        raise InputError(
            f"config.velocity.teacher_weight must be 0 with config.noise_by_chunk = True, found {weight}: the teacher "
            f"knows one noise level for all frames; learn from the videos alone"
        )


def check_known(paths: Iterable[str]) -> None:
    """Raises InputError, with the closest field, if one of these is no path of a field or a group of fields."""
    for path in paths:
        if path not in BY_PATH and path not in GROUPS:
            raise InputError(
                f"{shown_value(f'config.{path}')} is not a field; did you mean config.{closest(path, BY_PATH)[0]}?"
            )


def _paths(config: ml_collections.ConfigDict, group: str = "") -> Iterator[str]:
    """Paths of the fields of a configuration, also of those that are unknown."""
    for name, value in config.items():
        path = f"{group}{name}"
        if path in GROUPS and isinstance(value, ml_collections.ConfigDict):
            yield from _paths(value, f"{path}.")
        else:
            yield path


def _lookup(config: ml_collections.ConfigDict, path: str) -> Any:
    value: Any = config
    for name in path.split("."):
        if not isinstance(value, ml_collections.ConfigDict) or name not in value:
            group = path.rpartition(".")[0]
            raise InputError(f"config.{path} is missing; give config.{group or path}'s fields one by one")
        value = value[name]
    return value


def _check_form(entry: Mapping[str, Any], place: str) -> None:
    rows: dict[str, Field | None] = {field.path: field for field in ENTRIES["forms"]}
    kind = entry.get("kind", HybridConfig.kind)
    rows["kind"].allowed.check(kind, f"{place}.kind")
    rows["blocks"].allowed.check(entry.get("blocks"), f"{place}.blocks")
    rows |= {field.name: None for field in dataclasses.fields(FORMS[kind])}
    rows |= {name: field for name, field in _group("hybrid").items() if name in rows and name != "blocks"}
    _check_entry(entry, rows, place)
    if "feature_map" in rows and "feature_map" in entry:
        Entry().check(entry["feature_map"], f"{place}.feature_map")
        _check_entry(entry["feature_map"], _group("hybrid.feature_map"), f"{place}.feature_map")


def _check_evaluator(entry: Mapping[str, Any], place: str) -> None:
    rows = {field.path: field for field in ENTRIES["evals"]}
    for name in ("type", "every"):
        rows[name].allowed.check(entry.get(name), f"{place}.{name}")
    # `make_evaluators` knows the options of each type.
    _check_entry(entry, dict.fromkeys(entry) | rows, place)


def _group(path: str) -> dict[str, Field]:
    """The fields of a group, without those of groups in it, by their names there."""
    return {field.path.rpartition(".")[2]: field for field in FIELDS if field.path.rpartition(".")[0] == path}


def _check_entry(entry: Mapping[str, Any], rows: Mapping[str, Field | None], place: str) -> None:
    """Raises InputError unless all fields of an entry are known and have allowed values, where a row has them."""
    for name, value in entry.items():
        if name not in rows:
            raise InputError(
                f"{shown_value(f'{place}.{name}')} is not a field; did you mean {closest(str(name), rows)[0]!r}?"
            )
        if (row := rows[name]) is not None:
            row.allowed.check(value, f"{place}.{name}")


def hybrid_config(config: ml_collections.ConfigDict, number: int | None = None) -> Form:
    """The form that `config.hybrid` describes, with the changes of entry `number` of `config.forms`.

    Raises InputError for an unknown field or a wrong value.
    """
    place, entry = ("config.hybrid", {}) if number is None else (f"config.forms[{number}]", config.forms[number])
    fields = config.hybrid.to_dict()
    changes = {name: value for name, value in entry.items() if name != "blocks"}
    kind = changes.pop("kind", HybridConfig.kind)
    known = {field.name for field in dataclasses.fields(FORMS[kind])}
    if "feature_map" in known:
        changes["feature_map"] = {**fields["feature_map"], **changes.get("feature_map", {})}
    fields = {name: value for name, value in fields.items() if name in known} | changes
    try:
        return make_form(kind, fields)
    except (TypeError, ValueError) as error:
        raise InputError(f"{place}: {error}") from error


def save_config(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Writes `workdir/config.json`."""
    path = workdir / "config.json"
    with reported_write_errors(path), written_whole(path) as temporary:
        temporary.write_text(config.to_json(indent=2) + "\n")


def load_config(workdir: Path) -> ml_collections.ConfigDict:
    """The configuration of the run in `workdir`. Raises InputError if there is none, or a damaged one."""
    path = workdir / "config.json"
    if not path.exists():
        raise InputError(f"{path}: expected the configuration of a training run, found no file; check the folder")
    fields = read_json_object(path)
    try:
        return config_from_json(fields)
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise InputError(
            f"{path}: expected the fields of a configuration, found {str(error)[:200]}; correct it, or "
            f"start the run again"
        ) from error


def config_from_json(fields: dict[str, Any]) -> ml_collections.ConfigDict:
    """The configuration that `ConfigDict.to_json` wrote."""
    config = default_config()
    config.update(fields)
    return config
