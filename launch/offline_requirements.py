"""Prints the requirements of rehyat_jax that a machine without network lacks, one for pip on each line.

`offline_wheels.sh` calls it before every download. A wheel in its folder counts as installed, and its requirements are
then checked too. It prints nothing when the wheels are complete.
"""

import argparse
import sys
import tomllib
import zipfile
from collections.abc import Mapping
from email import message_from_bytes
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.specifiers import SpecifierSet
from pip._vendor.packaging.utils import canonicalize_name, parse_wheel_filename
from pip._vendor.packaging.version import InvalidVersion, Version

ROOT = Path(__file__).parent.parent

NEVER = ("torch", "triton", "jax", "jaxlib", "jax-cuda*", "nvidia-*", "libtpu", "imageio-ffmpeg")
"""Packages that are too large, or that must suit the machine's driver."""

LACKED = (
    "array-record",
    "av",
    "diffusers",
    "grain",
    "imageio-ffmpeg",
    "importlib-metadata",
    "ml-collections",
    "orbax-checkpoint",
    "portpicker",
    "requests",
)
"""Packages assumed to be missing or too old on a machine whose installed packages are unknown."""


class Wheel(NamedTuple):
    """A downloaded package: its version and all its possible requirements."""

    version: Version
    requires: list[Requirement]


def project_requirements() -> list[Requirement]:
    """All requirements in requirements.txt and in the extra `torch` of pyproject.toml."""
    lines = (ROOT / "requirements.txt").read_text().split("\n")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines += project["optional-dependencies"]["torch"]
    return [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]


def installed_versions(file: Path) -> dict[str, Version]:
    """Versions by canonical name, from the output of `pip list --format=freeze`. Exits if it is anything else."""
    versions = {}
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f"{file}: expected the output of `pip list --format=freeze`, found: {error}; check the path")
    for number, line in enumerate(lines, start=1):
        name, equals, version = line.partition("==")
        if not line.strip() or line.startswith("#"):
            continue
        try:
            if not equals:
                raise InvalidVersion
            versions[canonicalize_name(name.strip())] = Version(version.strip())
        except InvalidVersion:
            sys.exit(
                f"{file}:{number}: expected NAME==VERSION, found {line!r}; "
                f"write the file there with `python3 -m pip list --format=freeze`"
            )
    if not versions:
        sys.exit(f"{file}: expected lines NAME==VERSION, found none; write it with `pip list --format=freeze`")
    return versions


def read_wheels(folder: Path) -> dict[str, Wheel]:
    """The wheels of a folder by canonical name."""
    wheels = {}
    for path in folder.glob("*.whl"):
        name, version, *_ = parse_wheel_filename(path.name)
        with zipfile.ZipFile(path) as archive:
            (metadata,) = (file for file in archive.namelist() if fnmatch(file, "*.dist-info/METADATA"))
            lines = message_from_bytes(archive.read(metadata)).get_all("Requires-Dist", [])
        wheels[name] = Wheel(version, [Requirement(line) for line in lines])
    return wheels


def required(roots: list[Requirement], wheels: Mapping[str, Wheel], python: str) -> dict[str, SpecifierSet]:
    """All packages, by canonical name, in `roots` and in the requirements of their wheels, recursively."""
    # pip's own resolver would evaluate markers for the machine that it runs on.
    target = {
        "implementation_name": "cpython",
        "os_name": "posix",
        "platform_machine": "x86_64",
        "platform_python_implementation": "CPython",
        "platform_system": "Linux",
        "python_full_version": f"{python}.0",
        "python_version": python,
        "sys_platform": "linux",
    }
    specifiers: dict[str, SpecifierSet] = {}
    pending, seen = [*roots], set()
    while pending:
        requirement = pending.pop()
        name = canonicalize_name(requirement.name)
        specifiers[name] = specifiers.get(name, SpecifierSet()) & requirement.specifier
        for extra in {"", *requirement.extras}:
            if name in wheels and (name, extra) not in seen:
                seen.add((name, extra))
                pending += [
                    one
                    for one in wheels[name].requires
                    if not one.marker or one.marker.evaluate(target | {"extra": extra})
                ]
    return specifiers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", required=True, help="version there, as 3.12")
    parser.add_argument("--installed", type=Path, help="output of `pip list --format=freeze` there")
    parser.add_argument("folder", type=Path, help="with the wheels so far")
    arguments = parser.parse_args()
    installed = installed_versions(arguments.installed) if arguments.installed else None
    wheels = read_wheels(arguments.folder)

    download, left_out = [], []
    for name, specifier in sorted(required(project_requirements(), wheels, arguments.python).items()):
        if name in wheels:
            found = wheels[name].version
        elif installed is not None:
            found = installed.get(name)
        elif name in LACKED:
            found = None
        else:
            continue
        if found and specifier.contains(found, prereleases=True):
            continue
        if any(fnmatch(name, pattern) for pattern in NEVER):
            left_out.append(f"not downloaded: {name}{specifier}, found {found or 'none'} there")
        elif name in wheels:
            sys.exit(
                f"{name}: the packages together need {specifier}, downloaded {found}; choose versions that suit each "
                f"other, write them into a file as NAME==VERSION and export PIP_CONSTRAINT=FILE"
            )
        else:
            download.append(f"{name}{specifier}")
    if not download:
        print(*left_out, sep="\n", end="\n" if left_out else "", file=sys.stderr)
    print(*download, sep="\n", end="\n" if download else "")


if __name__ == "__main__":
    main()
