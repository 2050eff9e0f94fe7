"""Attention Surgery's form: softmax over every R-th token, linear attention to the others."""

import dataclasses
from typing import ClassVar, Literal

import jax
import numpy as np

from rehyat_jax.attention.features.config import FeatureMapConfig
from rehyat_jax.attention.forms.base import AttentionInputs, Features, Form, FormFlops, Learned, Sizes
from rehyat_jax.attention.forms.hybrid import linear_flops
from rehyat_jax.attention.hybrid.api import STABILIZERS
from rehyat_jax.attention.hybrid.calibration import linear_mass_log_scale
from rehyat_jax.attention.on_mesh import strided_attention_on_mesh


@dataclasses.dataclass(frozen=True)
class StridedForm(Form):
    """Softmax over every R-th token, linear attention to the others (see `rehyat_jax.attention.strided`).

    It reads the complete video, so it cannot be computed part by part.

    Attributes:
      stride: R, at least 2. R = 1 is full softmax attention, the form "softmax".
      stabilizer: see `hybrid_attention`.
      feature_map: configuration of phi_query and phi_key.
    """

    stride: int = 2
    stabilizer: Literal["row_max", "joint"] = "row_max"
    feature_map: FeatureMapConfig = FeatureMapConfig()

    kind: ClassVar[str] = "strided"

    def __post_init__(self):
        if type(self.stride) is not int or self.stride < 2:
            raise ValueError(
                f'stride must be an integer of at least 2, found {self.stride!r}: 1 is the form of kind "softmax"'
            )
        if self.stabilizer not in STABILIZERS:
            raise ValueError(f'stabilizer must be "row_max" or "joint", found {self.stabilizer!r}')

    @property
    def label(self) -> str:
        return f"strided {self.stride}"

    @property
    def learned(self) -> Learned:
        return Learned(self.feature_map)

    def attend(self, inputs: AttentionInputs, features: Features, *, implementation: str | None) -> jax.Array:
        assert features is not None
        return strided_attention_on_mesh(
            inputs.query,
            inputs.key,
            inputs.value,
            features.query,
            features.key,
            num_tokens=inputs.num_tokens,
            stride=self.stride,
            stabilizer=self.stabilizer,
            implementation=implementation,
        )

    def keys(self, num_frames: int) -> tuple[np.ndarray, np.ndarray]:
        """Every frame has tokens of both kinds."""
        every = np.ones((num_frames, num_frames), bool)
        return every, every

    def log_scale(self, inputs: AttentionInputs, features: Features) -> jax.Array:
        """See `linear_mass_log_scale`. Tokens of equal remainder modulo R take the place of a frame."""
        assert features is not None
        rows = inputs.num_tokens // self.stride
        arrays = (inputs.query, inputs.key, features.query.compute(), features.key.compute())

        def by_remainder(tokens: jax.Array) -> jax.Array:
            parts = [tokens[:, first : rows * self.stride : self.stride] for first in range(self.stride)]
            return jax.numpy.concatenate(parts, axis=1)

        softmax = np.zeros((self.stride, self.stride), bool)
        softmax[:, 0] = True
        return linear_mass_log_scale(
            *map(by_remainder, arrays),
            tokens_per_frame=rows,
            key_masks=(softmax, ~softmax),
            stabilizer=self.stabilizer,
        )

    def flops(self, sizes: Sizes) -> FormFlops:
        tokens = sizes.frames * sizes.tokens_per_frame
        softmax_keys = -(-tokens // self.stride)
        softmax = 4 * sizes.num_heads * sizes.head_dim * tokens * softmax_keys
        # All queries read the sums, and the other keys enter them.
        one = np.ones((1, 1), bool)
        ends = Sizes(1, 2 * tokens - softmax_keys, sizes.num_heads, sizes.head_dim)
        linear, maps = (count // 2 for count in linear_flops(self.learned, one, ends))
        return FormFlops(softmax, linear, maps)
