"""`WanConfig` from JSON, with every field checked before it is used."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable
from typing import Any

from rehyat_jax.errors import InputError
from rehyat_jax.models.wan.config import WanConfig


def wan_config_from_json(fields: Any, source: str) -> WanConfig:
    """Like `WanConfig.from_dict`, for JSON that may have been edited or damaged.

    Args:
      fields: what `WanConfig.to_dict` gives.
      source: what the fields were read from, for messages.

    Raises:
      InputError: a field is unknown, missing, of the wrong type or out of range.
    """
    _check_fields(WanConfig, fields, source, "")
    try:
        return WanConfig.from_dict(fields)
    except ValueError as error:
        raise InputError(f"{source}: {error}") from error


def require_known(name: str, known: Iterable[str], source: str) -> None:
    """Raises InputError, naming the closest known field, if a field's name is not among the known ones."""
    known = list(known)
    if name not in known:
        closest = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
        raise InputError(f"{source}: unknown field {name!r}, the closest known one is {closest!r}; rename or remove it")


def _check_fields(cls: type, fields: Any, source: str, prefix: str) -> None:
    if not isinstance(fields, dict):
        raise InputError(
            f"{source}: {prefix.rstrip('.') or 'config'} should be an object, found {fields!r}; correct it"
        )
    hints = typing.get_type_hints(cls)
    for name in fields:
        require_known(prefix + name, [prefix + known for known in hints], source)
    for name, hint in hints.items():
        if name not in fields:
            raise InputError(f"{source}: field {prefix + name!r} is missing; add it or get the file again")
        if dataclasses.is_dataclass(hint):
            _check_fields(hint, fields[name], source, f"{prefix}{name}.")
        elif not _fits(fields[name], hint):
            expected = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
            raise InputError(
                f"{source}: field {prefix + name!r} should be {expected}, found {fields[name]!r}; correct it"
            )


def _fits(value: Any, hint: Any) -> bool:
    """Whether a JSON value is what an annotation says; numbers must be finite and not negative."""
    arguments = typing.get_args(hint)
    match typing.get_origin(hint) or hint:
        case typing.Literal:
            return value in arguments
        case types.UnionType | typing.Union:
            return any(_fits(value, argument) for argument in arguments)
        case builtin if builtin is tuple:
            is_sequence = isinstance(value, list | tuple) and (arguments[-1] is ... or len(value) == len(arguments))
            return is_sequence and all(_fits(item, arguments[0]) for item in value)
        case builtin if builtin is float:
            return type(value) in (int, float) and 0 <= value < math.inf
        case builtin if builtin is int:
            return type(value) is int and value >= 0
    return type(value) is hint
