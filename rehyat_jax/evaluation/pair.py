"""The two models of an evaluation, which may differ only in their attention and their weights."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from rehyat_jax.attention.forms.hybrid import HybridConfig
from rehyat_jax.errors import InputError
from rehyat_jax.files.fingerprint import BLOCKS, fingerprint
from rehyat_jax.files.shown import shown
from rehyat_jax.models.wan.config import WanConfig
from rehyat_jax.weights.load import checkpoint_files, open_checkpoint
from rehyat_jax.weights.model_checkpoint import METADATA
from rehyat_jax.weights.streamed import StreamedModel

TEACHER, STUDENT = "teacher", "student"


class Side(NamedTuple):
    """One of the two models before its weights are read."""

    path: Path
    config: WanConfig
    metadata: dict[str, str]
    fingerprint: str


class Facts(NamedTuple):
    """What two models must have in common, except for the attention: architecture, codec and text encoder."""

    config: WanConfig
    codec: str
    text_encoder: str


def open_pair(teacher: Path, student: Path) -> dict[str, Side]:
    """The two models, by "teacher" and "student".

    Raises:
      InputError: a checkpoint cannot be read; or the models are no pair, see `check_pair`.
    """
    opened = {TEACHER: open_checkpoint(teacher), STUDENT: open_checkpoint(student)}
    check_pair(teacher, student, *map(facts_of, opened.values()))
    sides = {}
    for path, (name, model) in zip((teacher, student), opened.items(), strict=True):
        folder, files = checkpoint_files(path)
        sides[name] = Side(Path(path), model.config, model.metadata, fingerprint(files, folder, blocks=BLOCKS))
    return sides


def facts_of(model: StreamedModel) -> Facts:
    """The facts of an opened checkpoint."""
    return Facts(model.config, *(model.metadata[name] for name in METADATA))


def check_pair(teacher: object, student: object, of_teacher: Facts, of_student: Facts) -> None:
    """Raises InputError, naming the field, if models differ in more than their attention and their weights.

    Args:
      teacher, student: names of the models in the message.
      of_teacher, of_student: their facts.
    """
    fields, others = _fields(of_teacher), _fields(of_student)
    for name, expected in fields.items():
        if others[name] != expected:
            raise InputError(
                f"{student}: expected the teacher's {name}, {shown(expected)!r}, found {shown(others[name])!r}; "
                f"{teacher} is the teacher of other models, give this student's own"
            )


def _fields(facts: Facts) -> dict[str, Any]:
    config = facts.config.replace(hybrid_blocks=(), hybrid=HybridConfig())
    of_config = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {"codec": facts.codec, "text encoder": facts.text_encoder} | of_config
