"""The help of `train` about the configuration's fields, and docs/configuration.md: both from `fields.FIELDS`.

python -m rehyat_jax.training.fields_page    # in the repository's root, writes docs/configuration.md
"""

import textwrap
from pathlib import Path

from rehyat_jax.files.write import written_whole
from rehyat_jax.training.fields import EFFECTS, ENTRIES, FIELDS, Field

PAGE = Path("docs/configuration.md")

HEADER = """# Every field of a configuration

A configuration file (`--config FILE`) is a Python program with a function `get_config()`. It returns the defaults with
the changes of one experiment; `configs/` has examples. They come with the package: `--config configs/NAME.py` reads
the package's file if the working directory has none of that name. `--config.FIELD=VALUE` sets a single field:

    python -m rehyat_jax.train --config configs/demo_distill.py --workdir DIR --config.optimizer.learning_rate=1e-3

A value that is not allowed is refused before anything is written, with exit code 2 and the name of its field.
This command writes the page from the table in `rehyat_jax/training/fields.py`:

    python -m rehyat_jax.training.fields_page
"""


def fields_help() -> str:
    """All fields with their defaults, allowed values, effects on a resumed run and meanings, as text for a terminal."""
    lines = ["Fields of the configuration, with their defaults:"]
    for field in FIELDS:
        lines += ["", f"  --config.{field.path} ({_shown_default(field)})", *_described(field, " " * 6)]
        for entry in ENTRIES.get(field.path, ()):
            lines += [f"      In an entry: {entry.path} ({_shown_default(entry)})", *_described(entry, " " * 10)]
    lines += ["", "Effects on a resumed run:", ""]
    for effect, meaning in EFFECTS.items():
        lines += _wrapped(f"{effect}: {meaning}", "  ")
    return "\n".join(lines)


def _described(field: Field, indent: str) -> list[str]:
    sentences = (field.help, f"Allowed: {field.allowed}", f"Another value for a resumed run: {_effect(field)}")
    return [line for sentence in sentences for line in _wrapped(sentence, indent)]


def _wrapped(sentence: str, indent: str) -> list[str]:
    return textwrap.wrap(sentence, 116, initial_indent=indent, subsequent_indent=indent)


def fields_page() -> str:
    """The text of docs/configuration.md."""
    effects = "".join(f"| {effect} | {meaning} |\n" for effect, meaning in EFFECTS.items())
    entries = "".join(f"\n## An entry of config.{path}\n\n{_table(fields)}" for path, fields in ENTRIES.items())
    return (
        f"{HEADER}\n## Fields\n\n{_table(FIELDS)}{entries}\n## Another value for a resumed run\n\n"
        f"| printed as | effect |\n|---|---|\n{effects}"
    )


def write_page() -> None:
    """Writes docs/configuration.md; the working directory is the repository's root."""
    with written_whole(PAGE) as temporary:
        temporary.write_text(fields_page(), encoding="utf-8")


def _table(fields: tuple[Field, ...]) -> str:
    rows = (
        f"| {field.path} | `{_shown_default(field)}` | {field.allowed} | {_effect(field)} | {field.help} |\n"
        for field in fields
    )
    return (
        "| field | default | allowed | another value for a resumed run | meaning |\n|---|---|---|---|---|\n"
        + "".join(rows)
    )


def _shown_default(field: Field) -> str:
    return "unset" if field.default is None else str(field.default) or '""'


def _effect(field: Field) -> str:
    return field.effect + (f"; refused {field.refusal.words}" if field.refusal else "")


if __name__ == "__main__":
    write_page()
    print(f"wrote {PAGE}")
