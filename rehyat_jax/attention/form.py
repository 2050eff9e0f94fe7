"""Forms of self-attention, and the form of every block of a model.

A form is a small frozen dataclass. It defines its computation, its cost and its parameters. Everything else (the model,
distillation, weights, planning, the PyTorch export) asks the form. `FORMS` is the table of them.
"""

import abc
import dataclasses
import functools
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rehyat_jax.attention.features.config import FeatureMapConfig
from rehyat_jax.attention.features.inline import InlineFeatures
from rehyat_jax.attention.hybrid.api import STABILIZERS
from rehyat_jax.attention.hybrid.calibration import linear_mass_log_scale
from rehyat_jax.attention.hybrid.geometry import ChunkGeometry
from rehyat_jax.attention.hybrid.state import HybridState, LinearState
from rehyat_jax.attention.on_mesh import (
    hybrid_attention_on_mesh,
    hybrid_attention_part_on_mesh,
    hybrid_key_sums_on_mesh,
    softmax_attention_on_mesh,
)

Features = tuple[InlineFeatures, InlineFeatures] | None
"""phi_query and phi_key; None for a form without feature maps."""


@dataclasses.dataclass(frozen=True)
class AttentionInputs:
    """The inputs of one block's self-attention.

    Attributes:
      query, key, value: [B, N, H, d] in the compute dtype; query and key are normalised and rotated.
      unrotated_query, unrotated_key: the same before RoPE, for feature maps that use them.
      tokens_per_frame: tokens of one latent frame.
      num_frames: frames of the video. A video that is sharded along time may have further frames of padding at its
        end. No token attends to padding, and the attention of padding is zero.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    unrotated_query: jax.Array
    unrotated_key: jax.Array
    tokens_per_frame: int
    num_frames: int

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding."""
        return self.num_frames * self.tokens_per_frame

    def softmax(self) -> jax.Array:
        """Full softmax attention, [B, N, H, d]."""
        return softmax_attention_on_mesh(self.query, self.key, self.value, num_tokens=self.num_tokens)


class Sizes(NamedTuple):
    """The sizes that determine a form's FLOPs: latent frames, tokens of a frame, heads and their width."""

    frames: int
    tokens_per_frame: int
    num_heads: int
    head_dim: int


@dataclasses.dataclass(frozen=True)
class FormFlops:
    """Floating-point operations of one block's attention to one video, forward; see `models.wan.flops`.

    Attributes:
      softmax: scores and weighted sums of values, full or within windows.
      linear: sums over keys, and their readout.
      feature_maps: phi_query and phi_key.
    """

    softmax: int
    linear: int = 0
    feature_maps: int = 0

    @property
    def total(self) -> int:
        return self.softmax + self.linear + self.feature_maps


@dataclasses.dataclass(frozen=True)
class Form(abc.ABC):
    """A form of attention: its interface to a model, distillation, planning and evaluation.

    A subclass is a frozen dataclass. A checkpoint stores its fields.

    Attributes:
      kind: its key in `FORMS`.
      label: a few words for tables and messages.
      feature_map: configuration of phi_query and phi_key; None for a form without feature maps.
      chunk_frames: frames of a chunk. A video that is sharded along time is padded to a multiple of it.
      causal: True if linear attention reads the past only.
    """

    kind: ClassVar[str]

    @property
    def label(self) -> str:
        return self.kind

    @property
    def feature_map(self) -> FeatureMapConfig | None:
        return None

    @property
    def chunk_frames(self) -> int:
        return 1

    @property
    def causal(self) -> bool:
        return False

    @abc.abstractmethod
    def attend(self, inputs: AttentionInputs, features: Features, *, implementation: str | None) -> jax.Array:
        """The attention [B, N, H, d].

        Args:
          inputs: the block's inputs.
          features: features of its queries and keys.
          implementation: see `hybrid_attention`.
        """

    @property
    def attends_in_parts(self) -> bool:
        """True if a video's attention can be computed part by part: `zero_state`, `attend_part`, `key_sums`."""
        return False

    @property
    def streams(self) -> bool:
        """True if the attention of a part needs only the parts before."""
        return self.attends_in_parts and self.causal

    def zero_state(
        self, batch: int, tokens_per_frame: int, num_heads: int, head_dim: int, dtype: jax.typing.DTypeLike
    ) -> HybridState:
        """The state before the first part of a video of `batch` examples, whose attention computes in `dtype`."""
        raise NotImplementedError(f"{self.label} attention has no state")

    def attend_part(
        self,
        inputs: AttentionInputs,
        features: Features,
        state: HybridState,
        *,
        later: LinearState | None = None,
        is_last: bool,
        implementation: str | None,
    ) -> tuple[jax.Array, HybridState]:
        """`attend` for the frames that follow those in `state`.

        Args:
          inputs, features, implementation: see `attend`. Unless `is_last`, the part has complete chunks.
          state: state after the parts before.
          later: the sum of the later parts' `key_sums`; only read if the form does not stream.
          is_last: True for the last part of a video, which may end within a chunk.

        Returns:
          (attention [B, N, H, d], state after this part; unchanged after the last one).
        """
        raise NotImplementedError(f"{self.label} attention cannot be computed in parts")

    def key_sums(self, inputs: AttentionInputs, features: Features, *, implementation: str | None) -> LinearState:
        """The sums over the keys of a part that the parts before it read, if the form does not stream.

        Args:
          inputs, features, implementation: see `attend`.
        """
        raise NotImplementedError(f"{self.label} attention cannot be computed in parts")

    @abc.abstractmethod
    def flops(self, sizes: Sizes) -> FormFlops:
        """Operations of one block's attention."""

    def keys(self, num_frames: int) -> tuple[np.ndarray, np.ndarray]:
        """(softmax keys, linear keys) of every frame, boolean [query frame, key frame]."""
        every = np.ones((num_frames, num_frames), bool)
        return every, ~every

    def log_scale(self, inputs: AttentionInputs, features: Features) -> jax.Array:
        """The correction [H] of the scale of the feature maps; zero where there is nothing to correct."""
        return jnp.zeros(inputs.query.shape[2])


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


@dataclasses.dataclass(frozen=True)
class HybridConfig(Form):
    """Softmax in a window, linear attention outside of it (see `rehyat_jax.attention.hybrid_attention`).

    Attributes:
      chunk_frames, overlap_frames, causal, stabilizer: see `hybrid_attention`.
      feature_map: configuration of phi_query and phi_key.
    """

    chunk_frames: int = 3
    overlap_frames: int = 1
    causal: bool = True
    stabilizer: Literal["row_max", "joint"] = "row_max"
    feature_map: FeatureMapConfig = FeatureMapConfig()

    kind: ClassVar[str] = "hybrid"

    def __post_init__(self):
        if self.chunk_frames < 1:
            raise ValueError(f"chunk_frames must be at least 1, found {self.chunk_frames}")
        if not 0 <= self.overlap_frames <= self.chunk_frames:
            raise ValueError(
                f"overlap_frames must be between 0 and chunk_frames ({self.chunk_frames}), found {self.overlap_frames}"
            )
        if self.stabilizer not in STABILIZERS:
            raise ValueError(f'stabilizer must be "row_max" or "joint", found {self.stabilizer!r}')

    @property
    def label(self) -> str:
        return f"hybrid {self.chunk_frames}+{self.overlap_frames}"

    @property
    def _arguments(self) -> dict[str, Any]:
        """Keyword arguments of `hybrid_attention`."""
        fields = ("chunk_frames", "overlap_frames", "causal", "stabilizer")
        return {name: getattr(self, name) for name in fields}

    def attend(self, inputs: AttentionInputs, features: Features, *, implementation: str | None) -> jax.Array:
        assert features is not None
        return hybrid_attention_on_mesh(
            inputs.query,
            inputs.key,
            inputs.value,
            *features,
            num_frames=inputs.num_frames,
            tokens_per_frame=inputs.tokens_per_frame,
            implementation=implementation,
            **self._arguments,
        )

    @property
    def attends_in_parts(self) -> bool:
        return True

    def zero_state(
        self, batch: int, tokens_per_frame: int, num_heads: int, head_dim: int, dtype: jax.typing.DTypeLike
    ) -> HybridState:
        return HybridState.zeros(
            batch,
            num_heads,
            head_dim,
            self.feature_map.features,
            tokens_per_frame=tokens_per_frame,
            overlap_frames=self.overlap_frames,
            dtype=dtype,
        )

    def attend_part(
        self,
        inputs: AttentionInputs,
        features: Features,
        state: HybridState,
        *,
        later: LinearState | None = None,
        is_last: bool,
        implementation: str | None,
    ) -> tuple[jax.Array, HybridState]:
        assert features is not None
        return hybrid_attention_part_on_mesh(
            inputs.query,
            inputs.key,
            inputs.value,
            *features,
            state,
            None if self.causal else later,
            is_last=is_last,
            tokens_per_frame=inputs.tokens_per_frame,
            implementation=implementation,
            **self._arguments,
        )

    def key_sums(self, inputs: AttentionInputs, features: Features, *, implementation: str | None) -> LinearState:
        assert features is not None
        return hybrid_key_sums_on_mesh(
            inputs.key,
            inputs.value,
            features[1],
            tokens_per_frame=inputs.tokens_per_frame,
            implementation=implementation,
        )

    def log_scale(self, inputs: AttentionInputs, features: Features) -> jax.Array:
        """See `linear_mass_log_scale`."""
        assert features is not None
        computed = (phi.compute() for phi in features)
        return linear_mass_log_scale(
            *(tokens[:, : inputs.num_tokens] for tokens in (inputs.query, inputs.key, *computed)),
            tokens_per_frame=inputs.tokens_per_frame,
            **self._arguments,
        )

    def keys(self, num_frames: int) -> tuple[np.ndarray, np.ndarray]:
        return ChunkGeometry(num_frames, 1, self.chunk_frames, self.overlap_frames).key_masks(causal=self.causal)

    def flops(self, sizes: Sizes) -> FormFlops:
        window, linear = self.keys(sizes.frames)
        # The number of tokens that read sums, plus the number that enter them.
        ends = sizes.tokens_per_frame * int(np.count_nonzero(linear.any(axis=1)) + np.count_nonzero(linear.any(axis=0)))
        kernels = sum(rows * columns for rows, columns in self.feature_map.kernel_shapes(sizes.head_dim))
        return FormFlops(
            softmax=4 * sizes.num_heads * sizes.head_dim * sizes.tokens_per_frame**2 * int(window.sum()),
            linear=2 * ends * self.feature_map.features * sizes.num_heads * (sizes.head_dim + 1),
            feature_maps=2 * ends * sizes.num_heads * kernels,
        )


SOFTMAX = SoftmaxForm()

FORMS: dict[str, type[Form]] = {form.kind: form for form in (SoftmaxForm, HybridConfig)}
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
    """Feature maps of one configuration, stacked over the blocks that have them.

    Attributes:
      key: key under "feature_maps" in the parameter tree. None if the model has only one stack, which is then all of
        "feature_maps".
      config: configuration of both maps of a block.
      blocks: block indices, increasing.
    """

    key: str | None
    config: FeatureMapConfig
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
        """The stacks of the model's feature maps. Forms with equal maps share a stack even if they differ otherwise."""
        blocks: dict[FeatureMapConfig, list[int]] = {}
        for block, form in enumerate(self.of_block):
            if form.feature_map is not None:
                blocks.setdefault(form.feature_map, []).append(block)
        keys = [None] if len(blocks) == 1 else map(str, range(len(blocks)))
        return tuple(
            MapStack(key, config, tuple(found)) for key, (config, found) in zip(keys, blocks.items(), strict=True)
        )

    def stack_of(self, form: Form) -> MapStack:
        """The stack with the maps of a form."""
        return next(stack for stack in self.stacks if stack.config == form.feature_map)

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
