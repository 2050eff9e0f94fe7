"""Hyper-parameters of the feature maps phi_query and phi_key."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class FeatureMapConfig:
    """A per-head multilayer perceptron followed by powers (ReHyAt section 3; open details decided here).

    Attributes:
      features: F, features per head after the powers are concatenated; also the width of the hidden layers. 256 with
        two layers adds about 2.4M parameters to a block of Wan2.1 1.3B, the published count.
      num_layers: number of linear layers (grouped 1x1 convolutions, groups = heads, no biases).
      degree: P. The non-negative output is cut into P equal parts and part i is raised to the power i.
      hidden_activation: "gelu" (tanh form), "silu" or "relu", after every layer but the last.
      output_activation: "relu", "softplus" or "elu_plus_one" after the last layer. All are non-negative, so
        denominators are positive by construction.
      input: "rotated" feeds queries and keys after RoPE (the papers' equations reuse the softmax branch's), "unrotated"
        feeds them before it.
    """

    features: int = 256
    num_layers: int = 2
    degree: int = 2
    hidden_activation: str = "gelu"
    output_activation: str = "relu"
    input: str = "rotated"

    def __post_init__(self):
        if self.num_layers < 1:
            raise ValueError(f"feature_map.num_layers must be at least 1, found {self.num_layers}")
        if self.degree < 1 or self.features % self.degree:
            raise ValueError(
                f"feature_map.features ({self.features}) must be a multiple of feature_map.degree ({self.degree}), "
                f"and the degree at least 1"
            )
        for field, allowed in (
            ("hidden_activation", ("gelu", "silu", "relu")),
            ("output_activation", ("relu", "softplus", "elu_plus_one")),
            ("input", ("rotated", "unrotated")),
        ):
            if getattr(self, field) not in allowed:
                raise ValueError(f"feature_map.{field} must be one of {allowed}, found {getattr(self, field)!r}")
