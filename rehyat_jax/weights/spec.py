"""What the weights machinery must know of a model: everything that differs from backbone to backbone."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from rehyat_jax.weights.table import Layout, Row


@dataclasses.dataclass(frozen=True)
class Inferred:
    """The value of a configuration's field that a tensor's shape implies."""

    value: Any
    tensor: str


@dataclasses.dataclass(frozen=True)
class UpstreamConfig:
    """How one library's config.json describes the models that can be converted.

    Attributes:
      fields: their name of each field -> name in the configuration class, or "width".
      fixed: fields with the one value that is supported.
      unsaid: fields of the configuration class that the file has no place for, besides the forms of attention and those
        that are seen from tensors' shapes.
    """

    fields: dict[str, str]
    fixed: dict[str, Any]
    unsaid: tuple[str, ...] = ()


ShapeOf = Callable[[str], tuple[tuple[int, ...], str]]
"""Path of a parameter -> (its shape here, in block 0 where it is stacked; its name in PyTorch). Raises InputError."""


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """One backbone; `weights.models.MODELS` is the table of them.

    Attributes:
      architecture: its name in model.json.
      description: of the models that can be converted, for messages.
      config: the frozen dataclass of its sizes and forms of attention, with `to_dict`, `from_dict`, `block_forms`,
        `num_layers` and `width`.
      model: its module, made by model(config, rngs=..., **options).
      table: configuration -> the rows of its parameters, in the order of diffusers' state dict.
      upstream: config.json of both PyTorch layouts.
      metadata: "codec" and "text_encoder" of published checkpoints.
      smallest: any configuration, for the names of parameters.
      infer: (shapes of the checkpoint, number of blocks, source for messages) -> what the shapes imply, by field; with
        "width".
      foreign: prefixes of tensors' names -> the model that they belong to, which cannot be converted.
      head_dim: where config.json does not say it.
    """

    architecture: str
    description: str
    config: type
    model: Callable[..., Any]
    table: Callable[[Any], list[Row]]
    upstream: Mapping[Layout, UpstreamConfig]
    metadata: Mapping[str, str]
    smallest: Any
    infer: Callable[[ShapeOf, Any], dict[str, Inferred]]
    foreign: Mapping[tuple[str, ...], str]
    head_dim: int
