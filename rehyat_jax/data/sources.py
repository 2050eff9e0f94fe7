"""The table of the kinds of training data that a configuration can name; training, planning and evaluation read it."""

import dataclasses
import importlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from rehyat_jax.data.pipeline import Source
from rehyat_jax.data.prepared import PreparedExamples
from rehyat_jax.errors import InputError


class Judge(Protocol):
    """A program that decides how well videos follow their prompts.

    Attributes:
      prompts: the prompts that it knows.
      frame_size: height and width of the frames that it reads.
    """

    prompts: Sequence[str]
    frame_size: tuple[int, int]

    def verdicts(self, videos: np.ndarray, captions: Sequence[str]) -> dict[str, np.ndarray]:
        """Verdicts by name, on N videos [N, T, height, width, 3] floating point in [0, 1].

        Each is [N], or [N, T] with one verdict for every frame, booleans or numbers.
        """


@dataclasses.dataclass(frozen=True)
class SourceKind:
    """One kind of training data, whose name is its key in `SOURCES`.

    Attributes:
      codec: name of the codec that usually encodes its latents, for planning without the data.
      module: the module with `open_source(path, seed) -> Source`, imported only when it is used. Its
        `open_held_out(path, seed)` gives examples for evaluation.
      judge: the module with `open_judge() -> Judge`, if somebody can judge its videos.
    """

    codec: str
    module: str
    judge: str | None = None


SOURCES = {
    "digits": SourceKind(codec="space_to_depth", module="rehyat_jax.demo.digits", judge="rehyat_jax.demo.judge"),
    "prepared": SourceKind(codec="wan_vae", module="rehyat_jax.data.sources"),
}
"""The kinds by `config.data.source`."""

JUDGES = tuple(name for name, kind in SOURCES.items() if kind.judge is not None)
"""The kinds that have a judge."""


def make_source(name: str, path: str, seed: int) -> Source:
    """The training examples of a kind. Raises InputError if they cannot be read."""
    return importlib.import_module(SOURCES[name].module).open_source(path, seed)


def make_held_out(name: str, path: str, seed: int) -> Source:
    """Examples of a kind on which no model is trained. Raises InputError if they cannot be read."""
    return importlib.import_module(SOURCES[name].module).open_held_out(path, seed)


def make_judge(name: str) -> Judge:
    """The judge of a kind in `JUDGES`. Raises InputError if it needs a package that is not installed."""
    return importlib.import_module(str(SOURCES[name].judge)).open_judge()


def open_source(path: str, seed: int) -> Source:
    """A folder that `rehyat_jax.prepare` wrote; `seed` is not used. Raises InputError if it cannot be read."""
    del seed
    if not path:
        raise InputError('config.data.path is empty; source "prepared" reads a folder of prepared examples: give it')
    return PreparedExamples(path)


def open_held_out(path: str, seed: int) -> Source:
    """`open_source`: the caller gives a folder that was not used for training."""
    return open_source(path, seed)
