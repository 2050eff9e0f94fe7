"""The table of the forms of self-attention, and the form of every block of a model.

A form is a small frozen dataclass. It defines its computation, its cost and its parameters. Everything else (the model,
distillation, weights, planning, the PyTorch export) asks the form. `FORMS` is the table of them.
"""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import numpy as np

from rehyat_jax.attention.features.config import FeatureMapConfig
from rehyat_jax.attention.forms.base import Form, FormFlops, Learned, Sizes
from rehyat_jax.attention.forms.causal_softmax import CausalSoftmaxForm
from rehyat_jax.attention.forms.hybrid import HybridConfig, TwoBranchForm
from rehyat_jax.attention.forms.linear import LinearForm
from rehyat_jax.attention.forms.softmax import SOFTMAX, SoftmaxForm
from rehyat_jax.attention.forms.strided import StridedForm
from rehyat_jax.attention.forms.window import WindowForm

FORMS: dict[str, type[Form]] = {
    form.kind: form
    for form in (
        SoftmaxForm,
        CausalSoftmaxForm,
        HybridConfig,
        TwoBranchForm,
        WindowForm,
        LinearForm,
        StridedForm,
    )
}
"""The forms by `kind`."""


def make_form(kind: str, fields: dict[str, Any]) -> Form:
    """A form from its fields as JSON or a training configuration has them: dictionaries, and lists for tuples.

    Raises:
      TypeError: a field is unknown.
      ValueError: a value is out of range.
    """
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    if "feature_map" in fields:
        fields["feature_map"] = FeatureMapConfig(**fields["feature_map"])
    return FORMS[kind](**fields)


class MapStack(NamedTuple):
    """Learned parameters of one configuration, stacked over the blocks that have them.

    Attributes:
      key: key under "feature_maps" in the parameter tree. None if the model has only one stack, which is then all of
        "feature_maps".
      config: the learned parameters of a block.
      blocks: block indices, increasing.
    """

    key: str | None
    config: Learned
    blocks: tuple[int, ...]

    def of(self, feature_maps: Any) -> Any:
        """The part of a tree like the model's "feature_maps" that belongs to this stack."""
        return feature_maps if self.key is None else feature_maps[self.key]


@dataclasses.dataclass(frozen=True)
class BlockForms:
    """The form of every block of a model.

    Attributes:
      of_block: one form for each block.
    """

    of_block: tuple[Form, ...]

    @functools.cached_property
    def forms(self) -> tuple[Form, ...]:
        """The different forms: softmax first, the others in the order of their first blocks."""
        different = dict.fromkeys(self.of_block)
        return tuple(sorted(different, key=lambda form: form != SOFTMAX))

    @property
    def indices(self) -> tuple[int, ...]:
        """The index in `forms` of every block's form."""
        return tuple(self.forms.index(form) for form in self.of_block)

    @property
    def converted(self) -> tuple[int, ...]:
        """The blocks whose form is not softmax."""
        return tuple(block for block, form in enumerate(self.of_block) if form != SOFTMAX)

    @functools.cached_property
    def stacks(self) -> tuple[MapStack, ...]:
        """The stacks of "feature_maps". Forms with equal parameters share one even if they differ otherwise."""
        blocks: dict[Learned, list[int]] = {}
        for block, form in enumerate(self.of_block):
            if form.learned is not None:
                blocks.setdefault(form.learned, []).append(block)
        keys = [None] if len(blocks) == 1 else map(str, range(len(blocks)))
        return tuple(
            MapStack(key, config, tuple(found)) for key, (config, found) in zip(keys, blocks.items(), strict=True)
        )

    def stack_of(self, form: Form) -> MapStack:
        """The stack with the parameters of a form."""
        return next(stack for stack in self.stacks if stack.config == form.learned)

    @property
    def chunk_frames(self) -> int:
        """The smallest number of frames that makes complete chunks in every block."""
        return int(np.lcm.reduce([form.chunk_frames for form in self.forms]))

    def flops(self, sizes: Sizes) -> list[FormFlops]:
        """The operations of every block's attention."""
        of_form = {form: form.flops(sizes) for form in self.forms}
        return [of_form[form] for form in self.of_block]


FORM_FIELDS = {1: ("hybrid_blocks", "hybrid"), 2: ("attention",)}
"""The fields of a model's JSON that assign forms to blocks, by format version."""


def forms_to_json(blocks: tuple[int, ...] | Literal["all"], forms: Form | tuple[Form, ...]) -> list[dict[str, Any]]:
    """One object for each different form: its "blocks", its "kind" and its fields.

    Args:
      blocks: the converted blocks, increasing.
      forms: one form, or one for each block.
    """
    if not isinstance(forms, tuple):
        return [{"blocks": blocks, "kind": forms.kind, **dataclasses.asdict(forms)}]
    of_form: dict[Form, list[int]] = {}
    assert blocks != "all"
    for block, form in zip(blocks, forms, strict=True):
        of_form.setdefault(form, []).append(block)
    return [{"blocks": found, "kind": form.kind, **dataclasses.asdict(form)} for form, found in of_form.items()]


def forms_from_json(fields: dict[str, Any]) -> dict[str, Any]:
    """The values "hybrid_blocks" and "hybrid" of a model's configuration, from the fields of its JSON that
    `FORM_FIELDS` names.

    Raises:
      TypeError: a form has an unknown field.
      ValueError: a value is out of range, or two forms share a block.
    """
    if "attention" not in fields:
        entries = [{"blocks": fields.get("hybrid_blocks", ()), **fields.get("hybrid", {})}]
    else:
        entries = fields["attention"]
    if len(entries) == 1:
        blocks, form = _form_from_json(entries[0])
        return {"hybrid_blocks": blocks, "hybrid": form}
    of_block: dict[int, Form] = {}
    for blocks, form in map(_form_from_json, entries):
        if blocks == "all" or of_block.keys() & set(blocks):
            raise ValueError(f"attention: blocks {blocks} of a form are blocks of another form")
        of_block |= dict.fromkeys(blocks, form)
    of_block = dict(sorted(of_block.items()))
    return {"hybrid_blocks": tuple(of_block), "hybrid": tuple(of_block.values())}


def _form_from_json(entry: dict[str, Any]) -> tuple[tuple[int, ...] | Literal["all"], Form]:
    fields = dict(entry)
    blocks, kind = fields.pop("blocks"), fields.pop("kind", HybridConfig.kind)
    return blocks if blocks == "all" else tuple(blocks), make_form(kind, fields)
