"""Reads a model's configuration from JSON and checks every field before it is used."""

import dataclasses
import math
import types
import typing
from collections.abc import Iterable
from typing import Any, NoReturn

from rehyat_jax.attention.form import FORM_FIELDS, FORMS
from rehyat_jax.attention.forms.hybrid import HybridConfig
from rehyat_jax.errors import InputError
from rehyat_jax.files.shown import closest
from rehyat_jax.models.wan_vae.config import Real

CURRENT = max(FORM_FIELDS)
"""The format version that is written."""

LARGEST = 2**20
"""Largest integer of a configuration, far above the sizes of models."""

MOST_LAYERS = 2**12
"""Largest number of blocks; tables of parameters have an entry for each."""


def config_from_json(config_class: type, fields: Any, source: str, version: int = CURRENT) -> Any:
    """Like `config_class.from_dict`, for JSON that may have been edited or damaged.

    Args:
      config_class: configuration class of a model; see `weights.spec.ModelSpec`.
      fields: result of `to_dict`. A missing field takes its default.
      source: file that the fields were read from, for messages.
      version: version of the format, which decides how forms of attention are written.

    Raises:
      InputError: a field is unknown, of the wrong type or out of range, or missing and without a default.
    """
    _check_object(fields, source, "")
    forms = {name: fields[name] for name in FORM_FIELDS[version] if name in fields}
    _check_fields(config_class, {name: value for name, value in fields.items() if name not in forms}, source, "")
    if fields.get("num_layers", 0) > MOST_LAYERS:
        raise InputError(
            f"{source}: field 'num_layers' should be at most {MOST_LAYERS:,}, found {fields['num_layers']}; correct it"
        )
    if "hybrid_blocks" in forms:
        _check_blocks(forms["hybrid_blocks"], source, "hybrid_blocks")
    if "hybrid" in forms:
        _check_fields(HybridConfig, forms["hybrid"], source, "hybrid.")
    _check_forms(forms.get("attention", []), source)
    try:
        return config_class.from_dict(fields)
    except ValueError as error:
        raise InputError(f"{source}: {error}") from error


def check_version(version: Any, source: str) -> int:
    """The format version of a file. Raises InputError unless that version can be read."""
    if type(version) is not int or version not in FORM_FIELDS:
        raise InputError(
            f"{source}: format_version should be one of {tuple(FORM_FIELDS)}, found {version!r}; another version of "
            f"rehyat_jax wrote it"
        )
    return version


def defaults(config_class: type) -> dict[str, Any]:
    """The default of each field that has one, in the form that `to_dict` gives."""
    fields = dataclasses.fields(config_class)
    return {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}


def require_known(name: str, known: Iterable[str], source: str) -> None:
    """Raises InputError, naming the closest known field, if a field is unknown."""
    known = list(known)
    if name not in known:
        nearest = closest(name, known)[0]
        raise InputError(f"{source}: unknown field {name!r}, the closest known one is {nearest!r}; rename or remove it")


def _check_forms(forms: Any, source: str) -> None:
    if not isinstance(forms, list | tuple):
        raise InputError(f"{source}: field 'attention' should be a list, found {forms!r}; correct it")
    for number, entry in enumerate(forms):
        prefix = f"attention[{number}]."
        _check_object(entry, source, prefix)
        _check_blocks(entry.get("blocks"), source, prefix + "blocks")
        kind = entry.get("kind", HybridConfig.kind)
        if not isinstance(kind, str) or kind not in FORMS:
            raise InputError(f"{source}: {prefix}kind should be one of {tuple(FORMS)}, found {kind!r}; correct it")
        form = {name: value for name, value in entry.items() if name not in ("blocks", "kind")}
        _check_fields(FORMS[kind], form, source, prefix)


def _check_blocks(blocks: Any, source: str, name: str) -> None:
    if blocks != "all" and not _fits(blocks, tuple[int, ...]):
        raise InputError(f'{source}: field {name!r} should be "all" or block indices, found {blocks!r}; correct it')


def _check_object(fields: Any, source: str, prefix: str) -> None:
    if not isinstance(fields, dict):
        raise InputError(
            f"{source}: {prefix.rstrip('.') or 'config'} should be an object, found {fields!r}; correct it"
        )


def _check_fields(cls: type, fields: Any, source: str, prefix: str) -> None:
    _check_object(fields, source, prefix)
    known = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for name in fields:
        require_known(prefix + name, [prefix + known_name for known_name in known], source)
    for name, field in known.items():
        hint = hints[name]
        if name not in fields:
            if field.default is dataclasses.MISSING:
                raise InputError(f"{source}: field {prefix + name!r} is missing; add it or get the file again")
        elif dataclasses.is_dataclass(hint):
            _check_fields(hint, fields[name], source, f"{prefix}{name}.")
        elif not _fits(fields[name], hint):
            _refuse_value(prefix + name, hint, fields[name], source)


def check_field(cls: type, name: str, value: Any, source: str, shown_name: str) -> None:
    """Raises InputError, with the name that the file uses, unless a value has the type of a configuration's field."""
    hint = typing.get_type_hints(cls)[name]
    if not _fits(value, hint):
        _refuse_value(shown_name, hint, value, source)


def _refuse_value(name: str, hint: Any, value: Any, source: str) -> NoReturn:
    expected = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
    expected = expected.replace(f"{Real.__module__}.{Real.__name__}", "float")
    limits = f" of at most {LARGEST:,}" if hint is int else ", finite" if "float" in expected else ""
    raise InputError(f"{source}: field {name!r} should be {expected}{limits}, found {value!r}; correct it")


def _fits(value: Any, hint: Any) -> bool:
    """True if a JSON value has the annotated type.

    Numbers must be finite and, but for `Real`, not negative. Integers must be <= LARGEST.
    """
    arguments = typing.get_args(hint)
    match typing.get_origin(hint) or hint:
        case typing.Literal:
            return value in arguments
        case types.UnionType | typing.Union:
            return any(_fits(value, argument) for argument in arguments)
        case builtin if builtin is tuple:
            is_sequence = isinstance(value, list | tuple) and (arguments[-1] is ... or len(value) == len(arguments))
            return is_sequence and all(_fits(item, arguments[0]) for item in value)
        case real if real is Real:
            return type(value) in (int, float) and math.isfinite(value)
        case builtin if builtin is float:
            return type(value) in (int, float) and 0 <= value < math.inf
        case builtin if builtin is int:
            return type(value) is int and 0 <= value <= LARGEST
    return type(value) is hint
