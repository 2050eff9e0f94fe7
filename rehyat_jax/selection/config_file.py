"""Writes a configuration as a file for `--config`, in the style of `configs/`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_collections

from rehyat_jax.files.write import reported_write_errors, written_whole
from rehyat_jax.training.fields import FIELDS

IMPORT = "from rehyat_jax.training.config import default_config"


def write_config(config: ml_collections.ConfigDict, description: str, path: Path) -> None:
    """Writes a configuration whose forms of attention are entries of `config.forms` with all their fields.

    The file sets the fields that differ from their defaults. It needs no other configuration.

    Args:
      config: the configuration; `hybrid.blocks` is unset.
      description: the file's docstring.
      path: the file.

    Raises:
      InputError: the file cannot be written.
    """
    lines = []
    for field in FIELDS:
        value: Any = config
        for name in field.path.split("."):
            value = value[name]
        # The entries have all fields that could be taken from config.hybrid.
        if field.path.startswith("hybrid.") or _plain(value) == field.default:
            continue
        if field.path in ("forms", "evals"):
            entries = "".join(f"        {_source(entry)},\n" for entry in value)
            lines.append(f"config.{field.path} = (\n{entries}    )")
        else:
            lines.append(f"config.{field.path} = {_source(value)}")
    body = "".join(f"    {line}\n" for line in ("config = default_config()", *lines, "return config"))
    # A path in the description may have characters that would end a docstring.
    safe = description.replace("\\", "\\\\").replace('"""', '\\"\\"\\"')
    text = f'"""{safe}\n"""\n\n{IMPORT}\n\n\ndef get_config():\n{body}'
    with reported_write_errors(path), written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def _plain(value: Any) -> Any:
    """A value with tuples in place of lists."""
    return tuple(map(_plain, value)) if isinstance(value, tuple | list) else value


def _source(value: Any) -> str:
    """A value in Python, with double quotes."""
    if isinstance(value, Mapping | ml_collections.ConfigDict):
        return "{" + ", ".join(f"{_source(name)}: {_source(element)}" for name, element in value.items()) + "}"
    if isinstance(value, tuple | list):
        return "(" + ", ".join(map(_source, value)) + ("," if len(value) == 1 else "") + ")"
    return json.dumps(value) if isinstance(value, str) else repr(value)
