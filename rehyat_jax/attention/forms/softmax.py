"""Full softmax attention as a form."""

import dataclasses
from typing import ClassVar

import jax

from rehyat_jax.attention.forms.base import AttentionInputs, Features, Form, FormFlops, Sizes


@dataclasses.dataclass(frozen=True)
class SoftmaxForm(Form):
    """Full softmax attention, as in the teacher and in blocks that are not converted."""

    kind: ClassVar[str] = "softmax"

    def attend(self, inputs: AttentionInputs, features: Features, *, implementation: str | None) -> jax.Array:
        del features, implementation
        return inputs.softmax()

    def flops(self, sizes: Sizes) -> FormFlops:
        tokens = sizes.frames * sizes.tokens_per_frame
        return FormFlops(softmax=4 * tokens**2 * sizes.num_heads * sizes.head_dim)


SOFTMAX = SoftmaxForm()
