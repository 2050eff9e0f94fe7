"""Hyper-parameters of the feature maps phi_query and phi_key."""

import dataclasses

from rehyat_jax.attention.features.kinds import FEATURE_MAPS, FeatureMapKind

INPUTS = ("rotated", "unrotated", "unnormed")
"""Values of `FeatureMapConfig.input`."""


@dataclasses.dataclass(frozen=True)
class FeatureMapConfig:
    """One feature map of every head. Its kind decides which of the fields it reads; the others keep their defaults.

    Attributes:
      features: F, features per head.
      num_layers, degree, hidden_activation, output_activation: see `features.mlp`.
      input: "rotated" feeds queries and keys after RoPE (the papers' equations reuse the softmax branch's), "unrotated"
        feeds them before it, "unnormed" before their norm too.
      kind: a key of `FEATURE_MAPS`: "mlp" (ReHyAt's), "hedgehog" or "silu_l2".
      gate: True to multiply the features of each token by 2 sigmoid(w.x), with a learned vector w of every head that is
        zero at first.
    """

    features: int = 256
    num_layers: int = 2
    degree: int = 2
    hidden_activation: str = "gelu"
    output_activation: str = "relu"
    input: str = "rotated"
    kind: str = "mlp"
    gate: bool = False

    def __post_init__(self):
        for field, allowed in (("kind", tuple(FEATURE_MAPS)), ("input", INPUTS)):
            if getattr(self, field) not in allowed:
                raise ValueError(f"feature_map.{field} must be one of {allowed}, found {getattr(self, field)!r}")
        read = ("features", "input", "kind", "gate", *self.row.fields)
        for field in dataclasses.fields(self):
            if field.name not in read and getattr(self, field.name) != field.default:
                raise ValueError(
                    f'feature_map.{field.name} is not a field of kind "{self.kind}": expected its default '
                    f"{field.default!r}, found {getattr(self, field.name)!r}"
                )
        if problem := self.row.problem(self):
            raise ValueError(f"feature_map.{problem}")

    @property
    def row(self) -> FeatureMapKind:
        """What `FEATURE_MAPS` says of its kind."""
        return FEATURE_MAPS[self.kind]

    def kernel_shapes(self, head_dim: int) -> list[tuple[int, int]]:
        """(rows, columns) of the matrices of one head."""
        return self.row.kernel_shapes(self, head_dim)
