"""Sizes of Wan2.1's VAE, and the published ones."""

import dataclasses
from typing import Any, NamedTuple, NewType

Real = NewType("Real", float)
"""A finite number of either sign. A field annotated with `float` must not be negative in a file."""


class Stage(NamedTuple):
    """One resolution of the encoder or the decoder.

    Attributes:
      in_channels, out_channels: channels before and after the residual blocks.
      blocks: number of residual blocks.
      resamples: whether the stage ends with a change of resolution by 2 in height and width.
      resamples_time: whether that changes the number of frames by 2 too.
    """

    in_channels: int
    out_channels: int
    blocks: int
    resamples: bool
    resamples_time: bool


@dataclasses.dataclass(frozen=True)
class WanVaeConfig:
    """Architecture of `WanAutoencoder`. The defaults are the published sizes of Wan2.1's VAE.

    Attributes:
      base_dim: channels of the first stage of the encoder, and of the last of the decoder.
      z_dim: channels of the latents.
      dim_mult: channels of each stage of the encoder, in multiples of `base_dim`.
      num_res_blocks: residual blocks in each stage of the encoder; the decoder has one more.
      temporal_downsample: for each stage but the last, whether it halves the number of frames.
      latents_mean, latents_std: statistics of every channel of the latents, by which they are normalised.
    """

    base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    # fmt: off
    latents_mean: tuple[Real, ...] = tuple(map(Real, (
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    )))
    latents_std: tuple[float, ...] = (
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
    )
    # fmt: on

    def __post_init__(self):
        if not self.dim_mult or not min(self.base_dim, self.z_dim, self.num_res_blocks, *self.dim_mult) > 0:
            raise ValueError(
                f"base_dim, z_dim, num_res_blocks and every entry of dim_mult must be positive, found {self}"
            )
        if len(self.temporal_downsample) != len(self.dim_mult) - 1:
            raise ValueError(
                f"temporal_downsample must have one entry less than dim_mult {self.dim_mult}, "
                f"found {self.temporal_downsample}"
            )
        if any(self.base_dim * mult % 2 for mult in self.dim_mult[1:]):
            raise ValueError(
                f"base_dim times every later entry of dim_mult must be even, because upsampling halves the channels, "
                f"found {self.base_dim} and {self.dim_mult}"
            )
        for name in ("latents_mean", "latents_std"):
            if len(getattr(self, name)) != self.z_dim:
                raise ValueError(
                    f"{name} must have one entry for each of the {self.z_dim} channels of the latents, "
                    f"found {len(getattr(self, name))}"
                )
        if min(self.latents_std) <= 0:
            raise ValueError(f"latents_std must be positive, found {self.latents_std}")

    @property
    def time_factor(self) -> int:
        """Frames of video that one latent frame stands for; the first latent frame stands for one."""
        return 2 ** sum(self.temporal_downsample)

    @property
    def space_factor(self) -> int:
        """Pixels along each side of a latent pixel."""
        return 2 ** (len(self.dim_mult) - 1)

    @property
    def encoder_stages(self) -> tuple[Stage, ...]:
        """The stages of the encoder, first to last."""
        widths = [self.base_dim * mult for mult in (1, *self.dim_mult)]
        last = len(self.dim_mult) - 1
        return tuple(
            Stage(
                widths[index],
                widths[index + 1],
                self.num_res_blocks,
                resamples=index != last,
                resamples_time=index != last and self.temporal_downsample[index],
            )
            for index in range(last + 1)
        )

    @property
    def decoder_stages(self) -> tuple[Stage, ...]:
        """The stages of the decoder, first to last. Upsampling at the end of a stage halves the channels."""
        widths = [self.base_dim * mult for mult in self.dim_mult[::-1]]
        last = len(self.dim_mult) - 1
        return tuple(
            Stage(
                widths[index - 1] // 2 if index else widths[0],
                widths[index],
                self.num_res_blocks + 1,
                resamples=index != last,
                resamples_time=index != last and self.temporal_downsample[last - 1 - index],
            )
            for index in range(last + 1)
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dict; `from_dict` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "WanVaeConfig":
        """Inverse of `to_dict`; lists become tuples. Raises TypeError on an unknown field."""
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
        }
        return cls(**values)


WAN_VAE_PRESETS: dict[str, WanVaeConfig] = {"wan2.1": WanVaeConfig()}
"""Published sizes."""
