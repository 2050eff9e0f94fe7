"""Checks what a conversion may replace: only what this program wrote."""

import os
from pathlib import Path

from rehyat_jax.errors import InputError
from rehyat_jax.weights.model_checkpoint import foreign_entries, is_model_checkpoint
from rehyat_jax.weights.torch_config import CONFIG_FILE, SIDE_CAR
from rehyat_jax.weights.torch_folder import INDEX, NAME

LOADER_FILE = "rehyat_torch.py"
"""The loader that is written next to a student's weights."""

MARK = ".written_by_rehyat_jax"
"""An empty file in folders that `convert to-torch` writes. Their other files are those that diffusers writes."""


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
    known = (CONFIG_FILE, SIDE_CAR, LOADER_FILE, MARK, f"{NAME}{INDEX}") if is_export else ()
    is_weights = lambda name: is_export and name.startswith(NAME) and name.endswith(".safetensors")
    return next((name for name in names if name not in known and not is_weights(name)), None)
