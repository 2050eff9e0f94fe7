"""The files that come with the package: the configurations, and the demo's softmax teacher.

`rehyat_jax/packaged/` has `configs/` and `assets/` of the repository; there it holds links to both. A path below one of
them, such as `configs/demo_distill.py`, therefore means the same in a clone and where only a wheel is installed.
"""

import contextlib
import functools
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from rehyat_jax.files.shown import closest, shown

FOLDER = Path(__file__).parents[1] / "packaged"
"""The folder that has the files under their paths in the repository."""

CONFIGS, ASSETS = "configs", "assets"


def here_or_packaged(path: str | Path) -> Path:
    """The path itself if it exists; otherwise the packaged file or folder of that name, if there is one.

    It prints the place of a packaged file that it gives, once, on stderr.
    """
    path = Path(path)
    if path.parts[:1] not in ((CONFIGS,), (ASSETS,)) or ".." in path.parts or os.path.lexists(path):
        return path
    if not (packaged := FOLDER / path).exists():
        return path
    _announce(path, packaged)
    return packaged


@functools.cache
def _announce(path: Path, packaged: Path) -> None:
    print(f"{shown(path)} is not in this folder; reading the one of the package, {shown(packaged)}", file=sys.stderr)


def packaged_configs(folder: str = ".") -> list[str]:
    """Paths of the packaged configurations in one folder of `configs/`, as a command line has them."""
    return sorted(str(file.relative_to(FOLDER)) for file in (FOLDER / CONFIGS / folder).glob("*.py"))


def closest_config(path: str | Path) -> str | None:
    """The packaged configuration whose name is most like that of a file that does not exist; None for other folders."""
    folder = Path(path).parent
    if folder.parts[:1] != (CONFIGS,) or ".." in folder.parts:
        return None
    found = closest(str(path), packaged_configs(str(folder.relative_to(CONFIGS))))
    return found[0] if found else None


@contextlib.contextmanager
def importable_configs(folder: Path) -> Iterator[None]:
    """While the block runs, `from configs import NAME` finds a configuration.

    It looks in the `configs/` that the folder is in, if any, in the working directory and in the package. `configs` is
    a namespace package, with a part in each of these places.

    Args:
      folder: the folder of the configuration file that will be run.
    """
    before = list(sys.path)
    folder = folder.absolute()
    own = [str(place.parent) for place in (folder, *folder.parents) if place.name == CONFIGS]
    sys.path[:0] = [*own[:1], os.getcwd()]
    sys.path.append(str(FOLDER))
    try:
        yield
    finally:
        sys.path[:] = before
