"""The optional packages, and what to install if one is missing.

Code imports an optional package where it is used. If that fails, `rehyat_jax.cli` reports the error that
`missing_extra` gives. Long work calls `check_installed` first.
"""

import importlib.util

from rehyat_jax.errors import InputError

EXTRAS = {
    "diffusers": "torch",
    "libtpu": "tpu",
    "pyarrow": "data",
    "qwix": "quantize",
    "shtab": "completion",
    "sklearn": "demo",
    "torch": "torch",
    "webdataset": "data",
}
"""Name of an optional package, as it is imported -> the extra of this project that installs it."""


def install_command(*extras: str) -> str:
    """The command that installs extras."""
    return f"pip install 'rehyat-jax[{','.join(extras)}]'"


def check_installed(purpose: str, *packages: str) -> None:
    """Checks that optional packages are installed, without importing them.

    Args:
      purpose: what needs them, for the message.
      *packages: keys of `EXTRAS`.

    Raises:
      InputError: some are missing; the message has the command that installs them.
    """
    if missing := [package for package in packages if importlib.util.find_spec(package) is None]:
        raise _error(purpose, missing)


def missing_extra(error: ImportError) -> InputError | None:
    """The error for a user if an optional package could not be found; None for every other failed import."""
    package = (error.name or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or package not in EXTRAS:
        return None
    return _error("this command", [package])


def _error(purpose: str, packages: list[str]) -> InputError:
    extras = dict.fromkeys(EXTRAS[package] for package in packages)
    return InputError(f"{purpose} needs {' and '.join(packages)}, not installed here: {install_command(*extras)}")
