"""The forms of attention that Attention Surgery chooses from; softmax, which changes nothing, is always one of them."""

import ast
import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from rehyat_jax.attention.forms.base import Form
from rehyat_jax.attention.forms.softmax import SOFTMAX
from rehyat_jax.errors import InputError
from rehyat_jax.training.command_line import UNREADABLE
from rehyat_jax.training.config import check_config, hybrid_config
from rehyat_jax.training.values import Entry, shown_value

DEFAULT_FORMS: tuple[dict[str, Any], ...] = (
    *({"kind": "strided", "stride": stride} for stride in (2, 4, 8)),
    *({"kind": "hybrid", "chunk_frames": chunk, "overlap_frames": 1} for chunk in (1, 3, 5)),
    {"kind": "linear"},
    {"kind": "window"},
)
"""Attention Surgery's rates, ReHyAt's windows, linear attention alone, and the window alone."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One form that a block may have.

    Attributes:
      label: words that no other candidate has.
      form: the form.
    """

    label: str
    form: Form

    @property
    def fields(self) -> dict[str, Any]:
        """An entry of `config.forms` without "blocks". It has all fields of the form."""
        return {"kind": self.form.kind, **dataclasses.asdict(self.form)}

    @property
    def folder(self) -> str:
        """The name of its folder, which no other form has."""
        name = re.sub(r"\W+", "_", self.form.label)
        return f"{name}_{hashlib.sha256(json.dumps(self.fields, sort_keys=True).encode()).hexdigest()[:6]}"


def parsed_entries(text: str) -> tuple[Mapping[str, Any], ...]:
    """The entries that the option --forms gives: dictionaries as in `config.forms`, without "blocks".

    Raises:
      InputError: the text is something else.
    """
    expected = "--forms: expected a tuple of forms, such as ({'kind': 'strided', 'stride': 4}, {'kind': 'window'},)"
    try:
        entries = ast.literal_eval(text)
    except UNREADABLE as error:
        raise InputError(f"{expected}, found {shown_value(text)}") from error
    if not isinstance(entries, tuple | list) or not entries or not all(entry in Entry() for entry in entries):
        raise InputError(f"{expected}, found {shown_value(entries)}")
    for number, entry in enumerate(entries):
        if "blocks" in entry:
            raise InputError(f"--forms[{number}].blocks: expected no blocks, because they are chosen; leave it out")
    return tuple(entries)


def candidate_config(config: ml_collections.ConfigDict, entry: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """The configuration that converts every block to one form; the entry lacks "blocks"."""
    return with_forms(config, ({"blocks": "all", **entry},))


def with_forms(config: ml_collections.ConfigDict, entries: tuple[dict[str, Any], ...]) -> ml_collections.ConfigDict:
    """A copy of a configuration with other forms of attention."""
    changed = config.copy_and_resolve_references()
    with changed.unlocked():
        changed.hybrid.blocks, changed.forms = None, entries
    return changed


def make_candidates(
    config: ml_collections.ConfigDict, entries: Sequence[Mapping[str, Any]], frames: int
) -> tuple[tuple[Candidate, ...], dict[str, str]]:
    """The candidates of entries, softmax first.

    Args:
      config: the configuration of stage 1, whose `hybrid` has the fields that an entry lacks.
      entries: one for each form, without "blocks".
      frames: tokens of the longest training examples along time.

    Returns:
      (candidates, label of each form that stage 1 cannot train -> the reason).

    Raises:
      InputError: an entry has an unknown field or a wrong value; or two entries give the same form.
    """
    forms: dict[Form, str] = {SOFTMAX: SOFTMAX.label}
    skipped = {}
    for number, entry in enumerate(entries):
        changed = candidate_config(config, entry)
        try:
            check_config(changed)
            form = hybrid_config(changed, 0)
        except InputError as error:
            raise InputError(str(error).replace("config.forms[0]", f"--forms[{number}]")) from error
        if form == SOFTMAX:
            continue
        if form in forms:
            raise InputError(f"--forms[{number}]: is the same form as {forms[form]!r}; leave one of them out")
        same_words = sum(other.label == form.label for other in forms)
        label = form.label + f" ({same_words + 1})" * bool(same_words)
        if form.learned is not None and not form.keys(frames)[1].any():
            skipped[label] = (
                f"its chunks of {form.chunk_frames} frames hold all {frames} latent frames of the longest training "
                f"examples, so no token attends linearly, and its feature maps would learn nothing"
            )
            continue
        forms[form] = label
    if len(forms) == 1:
        reasons = "; ".join(f"{label}: {reason}" for label, reason in skipped.items())
        raise InputError(f"--forms: expected a form other than softmax, found none. {reasons}".rstrip(". "))
    return tuple(Candidate(label, form) for form, label in forms.items()), skipped
