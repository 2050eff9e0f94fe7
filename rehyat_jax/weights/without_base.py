"""The part of a student that its base lacks, and the check that everything else is the base's."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rehyat_jax.errors import InputError
from rehyat_jax.weights.adapters import Adapters
from rehyat_jax.weights.identity import BaseIdentity
from rehyat_jax.weights.models import spec_of
from rehyat_jax.weights.streamed import StreamedModel
from rehyat_jax.weights.table import Row

SHOWN = 3
"""Number of tensors that an error names."""


def branch_rows(config: Any) -> list[Row]:
    """The rows of a student's table that its base lacks: feature maps, and what forms of attention add."""
    spec = spec_of(config)
    of_base = {row.path for row in spec.table(config.replace(hybrid_blocks=()))}
    return [row for row in spec.table(config) if row.path not in of_base]


def check_base(
    student: StreamedModel,
    base: StreamedModel,
    adapters: Adapters,
    source: Path,
    base_name: object,
    *,
    progress: Callable[[int], object] = lambda nbytes: None,
) -> str:
    """The identity of the base, after a comparison of all its weights with the student's, which read both once.

    Args:
      student: the student.
      base: a softmax model of the same architecture.
      adapters: low-rank adapters that were merged into the student; empty if there are none.
      source, base_name: both models, for messages.
      progress: called with the size in bytes of each parameter of the base that was compared.

    Raises:
      InputError: the base is another model, a weight differs by more than the adapters, or a file is damaged.
    """
    _check_architecture(student.config, base.config, source, base_name)
    identity, differing, count = BaseIdentity(), [], 0
    for row in spec_of(base.config).table(base.config):
        for name, found, expected in _tensors(row, student, base):
            identity.add(name, expected)
            count += 1
            if not _equals(found, expected, adapters.get(name)):
                differing.append(name)
        progress(base.params[row.path].nbytes)
    if differing:
        others = ", ..." if len(differing) > SHOWN else ""
        raise InputError(
            f"{source}: {len(differing)} of the {count} tensors outside the linear branch differ from those of "
            f"{base_name}{' with the adapters' if adapters else ''}: {', '.join(differing[:SHOWN])}{others}; give the "
            f"model that the student was made from, --adapter if it was trained with adapters, or export the complete "
            f"student without --without-base"
        )
    return identity.digest()


def _check_architecture(student: Any, base: Any, source: Path, base_name: object) -> None:
    if base.hybrid_blocks:
        raise InputError(f"{base_name}: expected a softmax model as base, found a student; give the student's teacher")
    # Weights do not depend on the number of text tokens, which diffusers' files do not state.
    softmax = student.replace(hybrid_blocks=(), text_length=base.text_length)
    for field in dataclasses.fields(softmax):
        found, expected = (getattr(config, field.name) for config in (base, softmax))
        if found != expected and field.name not in ("hybrid_blocks", "hybrid"):
            raise InputError(
                f"{base_name}: {field.name} should be {expected!r}, as in {source}, found {found!r}; give the model "
                f"that the student was made from"
            )


def _tensors(row: Row, student: StreamedModel, base: StreamedModel) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(name in diffusers, student's values, base's values), as views in diffusers' layout, of a row's tensors."""
    found, expected = (model.params[row.path].read() for model in (student, base))
    if row.blocks is None:
        found, expected = found[None], expected[None]
    for name, *layers in zip(row.names("diffusers"), found, expected, strict=True):
        yield name, *(row.transform.to_torch(layer) for layer in layers)


def _equals(found: np.ndarray, expected: np.ndarray, adapter: tuple[np.ndarray, np.ndarray] | None) -> bool:
    """True if a student's tensor is the base's, to the bit, or the base's plus an adapter (A, B), to rounding."""
    found, expected = found.astype(np.float32), expected.astype(np.float32)
    if adapter is None:
        return np.array_equal(found, expected)
    a, b = adapter
    # Each of the rank's products and sums, and the last sum, may round once; TPUs' products of float32 a little more.
    rounding = np.finfo(np.float32).eps * (2 * np.abs(found) + 4 * (len(a) + 2) * (np.abs(b) @ np.abs(a)))
    return bool((np.abs(found - (expected + b @ a)) <= rounding).all())
