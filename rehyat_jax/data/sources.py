"""The table of the kinds of training data that a configuration can name; training and planning read it."""

import dataclasses
import importlib

from rehyat_jax.data.pipeline import Source
from rehyat_jax.data.prepared import PreparedExamples
from rehyat_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class SourceKind:
    """One kind of training data, whose name is its key in `SOURCES`.

    Attributes:
      codec: name of the codec that usually encodes its latents, for planning without the data.
      module: the module with `open_source(path, seed) -> Source`, imported only when it is used.
    """

    codec: str
    module: str


SOURCES = {
    "digits": SourceKind(codec="space_to_depth", module="rehyat_jax.demo.digits"),
    "prepared": SourceKind(codec="wan_vae", module="rehyat_jax.data.sources"),
}
"""The kinds by `config.data.source`."""


def make_source(name: str, path: str, seed: int) -> Source:
    """The training examples of a kind. Raises InputError if they cannot be read."""
    return importlib.import_module(SOURCES[name].module).open_source(path, seed)


def open_source(path: str, seed: int) -> Source:
    """A folder that `rehyat_jax.prepare` wrote; `seed` is not used. Raises InputError if it cannot be read."""
    del seed
    if not path:
        raise InputError('config.data.path is empty; source "prepared" reads a folder of prepared examples: give it')
    return PreparedExamples(path)
