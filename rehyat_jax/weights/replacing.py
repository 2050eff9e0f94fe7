"""Checks what a conversion may replace: only what this program wrote."""

import hashlib
import os
from pathlib import Path

from rehyat_jax.errors import InputError
from rehyat_jax.files.regular import SMALL
from rehyat_jax.weights.adapters import ADAPTERS_FILE
from rehyat_jax.weights.model_checkpoint import foreign_entries, is_model_checkpoint
from rehyat_jax.weights.torch_config import CONFIG_FILE, SIDE_CAR
from rehyat_jax.weights.torch_folder import BRANCH_FILE, INDEX, NAME

LOADER_FILE = "rehyat_torch.py"
"""The loader that is written next to a student's weights."""

CARD = "README.md"
"""The model card."""

MARK = ".written_by_rehyat_jax"
"""A file in folders that `convert to-torch` writes. It holds the SHA-256 of `CARD`, or nothing if there is no card."""


def check_force(source: Path, destination: Path) -> None:
    """Raises InputError if `convert --force` would remove the source, or anything that no conversion wrote.

    A link is replaced without its target, an empty directory as if it were not there.
    """
    files = [source, *(source.rglob("*") if source.is_dir() else source.parent.glob(f"*{source.suffix}"))]
    # Unlike Path.resolve, this takes links that lead to one another.
    resolved = lambda path: Path(os.path.realpath(path))
    place = resolved(destination)
    inside = next((file for file in files if resolved(file).is_relative_to(place)), None)
    if inside is not None:
        raise InputError(f"{destination}: would replace the source {inside}; choose another destination")
    if destination.is_symlink() or not destination.exists():
        return
    if not destination.is_dir():
        raise InputError(f"{destination}: is a file, which --force does not replace; choose another destination")
    if foreign := foreign_entry(destination):
        raise InputError(
            f"{destination}: --force replaces only what convert wrote, and convert did not write {foreign}; choose "
            f"another destination, or remove the directory"
        )


def foreign_entry(directory: Path) -> str | None:
    """The name of something in a directory that no conversion wrote; None if there is nothing of that kind."""
    names = sorted(path.name for path in directory.iterdir())
    if is_model_checkpoint(directory):
        return next(iter(foreign_entries(directory)), None)
    # Earlier releases left no mark, but wrote the loader next to the weights of students.
    is_export = MARK in names or (SIDE_CAR in names and LOADER_FILE in names)
    known = (CONFIG_FILE, SIDE_CAR, LOADER_FILE, MARK, f"{NAME}{INDEX}", BRANCH_FILE, ADAPTERS_FILE)
    known = (*known, *_own_card(directory)) if is_export else ()
    is_weights = lambda name: is_export and name.startswith(NAME) and name.endswith(".safetensors")
    return next((name for name in names if name not in known and not is_weights(name)), None)


def write_marks(directory: Path, card: str | None) -> None:
    """Writes `CARD`, unless it is None, and `MARK`."""
    content = (card or "").encode()
    if card is not None:
        (directory / CARD).write_bytes(content)
    (directory / MARK).write_text("" if card is None else hashlib.sha256(content).hexdigest())


def _own_card(directory: Path) -> tuple[str, ...]:
    """The card's name, if it is as it was written: a user's own words are not replaced."""
    card, mark = directory / CARD, directory / MARK
    if not (card.is_file() and mark.is_file() and card.stat().st_size <= SMALL and mark.stat().st_size <= SMALL):
        return ()
    return (CARD,) if hashlib.sha256(card.read_bytes()).hexdigest() == mark.read_text(errors="replace") else ()
