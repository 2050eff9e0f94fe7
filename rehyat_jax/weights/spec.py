"""Description of a model for reading, writing and converting its weights: everything that differs between backbones."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rehyat_jax.weights.table import Layout, Row
from rehyat_jax.weights.torch_folder import NAME


@dataclasses.dataclass(frozen=True)
class Inferred:
    """The value of a configuration field that a tensor's shape implies."""

    value: Any
    tensor: str


@dataclasses.dataclass(frozen=True)
class UpstreamConfig:
    """How one library's config.json describes the models that can be converted.

    Attributes:
      fields: the library's name of each field -> name in the configuration class, or "width".
      fixed: fields that must have one supported value, with that value.
      unsaid: fields of the configuration class that the file cannot store. The forms of attention and the fields
        implied by tensors' shapes are not listed.
      marker: the field, one of `fixed`, that names the kind of model.
      written: further fields that are written and not checked.
      is_open: whether the file may have fields that are not listed here. They are ignored.
    """

    fields: dict[str, str]
    fixed: dict[str, Any]
    unsaid: tuple[str, ...] = ()
    marker: str = "_class_name"
    written: dict[str, Any] = dataclasses.field(default_factory=dict)
    is_open: bool = False


ShapeOf = Callable[[str], tuple[tuple[int, ...], str]]
"""Path of a parameter -> (its shape in this package, in block 0 if it is stacked; its PyTorch name). Raises
InputError."""


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """One model; `weights.models` has the tables of them.

    Attributes:
      architecture: its name in model.json.
      description: description of the models that can be converted, for messages.
      part: its folder in a diffusers pipeline.
      config: the frozen dataclass of its sizes, with `to_dict` and `from_dict`; a transformer's has its forms of
        attention too, `block_forms`, `num_layers` and `width`.
      model: its module, constructed as model(config, rngs=..., **options).
      table: configuration -> the rows of its parameters, in the order of diffusers' state dict.
      upstream: descriptions of config.json in the PyTorch layouts that have one.
      metadata: "codec" and "text_encoder" of a transformer's published checkpoints.
      smallest: any small configuration, which only provides the names of parameters.
      infer: (shapes of the checkpoint, source for messages) -> the fields, and a transformer's "width", that the
        shapes imply.
      foreign: prefixes of tensor names -> the model that they belong to, which cannot be converted.
      is_transformer: whether the model has stacked blocks of attention with heads, and may have rehyat.json.
      unsupported: description of the models that `fixed` fields of config.json exclude, for messages.
      head_dim: head_dim of a transformer's checkpoint whose config.json and tensors do not state it; None for other
        models.
      defaulted: fields that have their defaults in the layouts without a config.json, because no tensor implies them.
      copies: names of tensors that some files store twice -> the name that is kept.
      file_name: name of the files of weights that are written, without their suffix.
      original_file: pattern of the name of its file in Wan's original repositories, without suffix; empty for the
        transformer, whose file has `file_name`.
    """

    architecture: str
    description: str
    part: str
    config: type
    model: Callable[..., Any]
    table: Callable[[Any], list[Row]]
    upstream: Mapping[Layout, UpstreamConfig]
    metadata: Mapping[str, str]
    smallest: Any
    infer: Callable[[ShapeOf, Any], dict[str, Inferred]]
    foreign: Mapping[tuple[str, ...], str]
    is_transformer: bool = False
    unsupported: str = ""
    head_dim: int | None = None
    defaulted: tuple[str, ...] = ()
    copies: Mapping[str, str] = dataclasses.field(default_factory=dict)
    file_name: str = NAME
    original_file: str = ""

    def find(self, path: Path) -> Path:
        """The model's own folder or file in a diffusers pipeline or an original repository; else the path itself."""
        if (path / self.part).is_dir():
            return path / self.part
        for suffix in ("safetensors", "pth") if self.original_file else ():
            if len(files := sorted(path.glob(f"{self.original_file}.{suffix}"))) == 1:
                return files[0]
        return path
