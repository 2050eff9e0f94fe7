"""The train steps that are measured and planned: the configurations in `configs/`, with one video on one device."""

from typing import Any

import ml_collections

from rehyat_jax.benchmarks.gpu_run.sections import SECTIONS, Sizes
from rehyat_jax.files import packaged
from rehyat_jax.models.wan.config import WAN_PRESETS, WanConfig
from rehyat_jax.training.command_line import read_config_file
from rehyat_jax.training.setup import student_config


def read_config(name: str) -> ml_collections.ConfigDict:
    """The configuration that a file in `configs/` of the package describes."""
    return read_config_file(str(packaged.FOLDER / packaged.CONFIGS / name))


def train_cases() -> dict[str, dict[str, Any]]:
    """Arguments of `train_case` by name of the section."""
    return {name: section.arguments for name, section in SECTIONS.items() if section.module == "train_step"}


def train_case(
    sizes: Sizes, *, stage: str, hybrid: float, remat: str, implementation: str
) -> tuple[ml_collections.ConfigDict, WanConfig, tuple[int, int, int]]:
    """(configuration, architecture, latents' size) of a step.

    Args:
      sizes: sizes of the model and the video.
      stage: "distill" or "finetune", configured by configs/wan_1_3b_*.py.
      hybrid: the share of hybrid blocks, spread evenly over the depth.
      remat: the remat policy for finetuning.
      implementation: name of the field of `sizes` with the attention's implementation; empty for the platform's best.
    """
    config = read_config(f"wan_1_3b_{stage}.py")
    layers = WAN_PRESETS[sizes.preset].num_layers
    count = round(hybrid * layers)
    config.preset, config.batch_size = sizes.preset, 1
    config.hybrid.blocks = tuple(i * layers // count for i in range(count)) if count else None
    if stage == "finetune":
        config.remat = remat
    if implementation:
        config.attention_implementation = getattr(sizes, implementation)[0]
    if not count:
        config.stage = "pretrain"  # the same step, for a model without hybrid blocks
    return config, student_config(WAN_PRESETS[sizes.preset], config), sizes.latents
