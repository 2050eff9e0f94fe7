"""Parameter names of Wan2.1's VAE: in this package, diffusers' `AutoencoderKLWan` and the original `WanVAE_`."""

from typing import NamedTuple

from rehyat_jax.models.wan_vae.config import Stage, WanVaeConfig
from rehyat_jax.models.wan_vae.modeling import PIXEL_CHANNELS
from rehyat_jax.weights.table import CONVOLUTION, FRAME_CONVOLUTION, FRAME_SCALE, SAME, VIDEO_SCALE, Row, Transform


class Names(NamedTuple):
    """The names of one module, or of one parameter."""

    path: str
    diffusers: str
    original: str

    def at(self, path: str, diffusers: str | None = None, original: str | None = None) -> "Names":
        """The names of a part of the module; the libraries' names are `path`, and then diffusers', unless given."""
        diffusers = diffusers or path
        return Names(f"{self.path}.{path}", f"{self.diffusers}.{diffusers}", f"{self.original}.{original or diffusers}")

    def row(self, shape: tuple[int, ...], transform: Transform = SAME) -> Row:
        """The row of the parameter of these names."""
        return Row(self.path, shape, self.diffusers, self.original, transform)


def wan_vae_table(config: WanVaeConfig) -> list[Row]:
    """The rows of a model, in the order of diffusers' state dict."""
    encoder, decoder = (Names(coder, coder, coder) for coder in ("encoder", "decoder"))
    coded, decoded, z_dim = config.encoder_stages, config.decoder_stages, config.z_dim
    return [
        *_video(encoder.at("conv_in", original="conv1"), PIXEL_CHANNELS, coded[0].in_channels),
        *_encoder_stages(encoder, coded),
        *_middle(encoder, coded[-1].out_channels),
        *_head(encoder, coded[-1].out_channels, 2 * z_dim),
        *_video(Names("quant_conv", "quant_conv", "conv1"), 2 * z_dim, 2 * z_dim, (1, 1, 1)),
        *_video(Names("post_quant_conv", "post_quant_conv", "conv2"), z_dim, z_dim, (1, 1, 1)),
        *_video(decoder.at("conv_in", original="conv1"), z_dim, decoded[0].in_channels),
        *_middle(decoder, decoded[0].in_channels),
        *_decoder_stages(decoder, decoded),
        *_head(decoder, decoded[-1].out_channels, PIXEL_CHANNELS),
    ]


def _encoder_stages(encoder: Names, stages: tuple[Stage, ...]) -> list[Row]:
    """Blocks and downsampling. Both libraries number them through over all stages."""
    rows, number = [], 0
    for index, stage in enumerate(stages):
        width = stage.out_channels
        for block in range(stage.blocks):
            names = encoder.at(f"stage_{index}.block_{block}", f"down_blocks.{number}", f"downsamples.{number}")
            rows += _block(names, width if block else stage.in_channels, width)
            number += 1
        if stage.resamples:
            names = encoder.at(f"stage_{index}.resample", f"down_blocks.{number}", f"downsamples.{number}")
            rows += _frame(names.at("conv", "resample.1"), width, width, 3)
            rows += _video(names.at("time_conv"), width, width, (3, 1, 1)) if stage.resamples_time else []
            number += 1
    return rows


def _decoder_stages(decoder: Names, stages: tuple[Stage, ...]) -> list[Row]:
    """Blocks and upsampling. diffusers groups them by stage; the original code numbers them through."""
    rows, number = [], 0
    for index, stage in enumerate(stages):
        width, group = stage.out_channels, f"up_blocks.{index}"
        for block in range(stage.blocks):
            names = decoder.at(f"stage_{index}.block_{block}", f"{group}.resnets.{block}", f"upsamples.{number}")
            rows += _block(names, width if block else stage.in_channels, width)
            number += 1
        if stage.resamples:
            names = decoder.at(f"stage_{index}.resample", f"{group}.upsamplers.0", f"upsamples.{number}")
            rows += _frame(names.at("conv", "resample.1"), width, width // 2, 3)
            rows += _video(names.at("time_conv"), width, 2 * width, (3, 1, 1)) if stage.resamples_time else []
            number += 1
    return rows


def _middle(coder: Names, width: int) -> list[Row]:
    attention = coder.at("middle.attention", "mid_block.attentions.0", "middle.1")
    return [
        attention.at("norm.scale", "norm.gamma").row((width,), FRAME_SCALE),
        *_frame(attention.at("query_key_value", "to_qkv"), width, 3 * width, 1),
        *_frame(attention.at("output", "proj"), width, width, 1),
        *_block(coder.at("middle.block_0", "mid_block.resnets.0", "middle.0"), width, width),
        *_block(coder.at("middle.block_1", "mid_block.resnets.1", "middle.2"), width, width),
    ]


def _head(coder: Names, width: int, out_channels: int) -> list[Row]:
    return [
        _scale(coder.at("norm_out", original="head.0"), width),
        *_video(coder.at("conv_out", original="head.2"), width, out_channels),
    ]


def _block(names: Names, in_channels: int, out_channels: int) -> list[Row]:
    rows = [
        _scale(names.at("norm_1", "norm1", "residual.0"), in_channels),
        *_video(names.at("conv_1", "conv1", "residual.2"), in_channels, out_channels),
        _scale(names.at("norm_2", "norm2", "residual.3"), out_channels),
        *_video(names.at("conv_2", "conv2", "residual.6"), out_channels, out_channels),
    ]
    if in_channels != out_channels:
        rows += _video(names.at("shortcut", "conv_shortcut", "shortcut"), in_channels, out_channels, (1, 1, 1))
    return rows


def _scale(names: Names, width: int) -> Row:
    return names.at("scale", "gamma").row((width,), VIDEO_SCALE)


def _video(names: Names, in_channels: int, out_channels: int, kernel: tuple[int, int, int] = (3, 3, 3)) -> list[Row]:
    shape = (*kernel, in_channels, out_channels)
    return [names.at("kernel", "weight").row(shape, CONVOLUTION), names.at("bias").row((out_channels,))]


def _frame(names: Names, in_channels: int, out_channels: int, kernel: int) -> list[Row]:
    shape = (kernel, kernel, in_channels, out_channels)
    return [names.at("kernel", "weight").row(shape, FRAME_CONVOLUTION), names.at("bias").row((out_channels,))]
