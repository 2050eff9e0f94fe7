"""`config.json` of both PyTorch layouts, and `rehyat.json` for what upstream's configuration cannot say."""

import dataclasses
from pathlib import Path
from typing import Any

from rehyat_jax.errors import InputError
from rehyat_jax.files.json_files import read_json_object, write_json
from rehyat_jax.models.wan.config import WanConfig
from rehyat_jax.weights.config_fields import require_known, wan_config_from_json
from rehyat_jax.weights.wan.names import Layout

SIDE_CAR = "rehyat.json"

DEFAULT_METADATA = {"codec": "wan_vae", "text_encoder": "umt5"}
"""What published Wan checkpoints are made with."""

DEFAULTS = WanConfig(num_heads=1, head_dim=1, ffn_dim=1, num_layers=1).to_dict()
"""Of the fields that have one; the four required ones are always stated or inferred."""


@dataclasses.dataclass(frozen=True)
class UpstreamConfig:
    """How one library's config.json describes the models that can be converted.

    Attributes:
      fields: their name of each field -> name in `WanConfig`, or "width".
      fixed: fields with the one value that is supported.
      unsaid: top-level fields of `WanConfig` that the file has no place for, besides those seen from tensors' shapes.
    """

    fields: dict[str, str]
    fixed: dict[str, Any]
    unsaid: tuple[str, ...]


UPSTREAM: dict[Layout, UpstreamConfig] = {
    "diffusers": UpstreamConfig(
        fields={
            "attention_head_dim": "head_dim",
            "eps": "eps",
            "ffn_dim": "ffn_dim",
            "freq_dim": "freq_dim",
            "in_channels": "in_channels",
            "num_attention_heads": "num_heads",
            "num_layers": "num_layers",
            "out_channels": "out_channels",
            "patch_size": "patch_size",
            "text_dim": "text_dim",
        },
        fixed={
            "_class_name": "WanTransformer3DModel",
            "_diffusers_version": "0.42.0",
            "added_kv_proj_dim": None,
            "cross_attn_norm": True,
            "image_dim": None,
            "pos_embed_seq_len": None,
            "qk_norm": "rms_norm_across_heads",
            "rope_max_seq_len": 1024,
        },
        unsaid=("text_length", "hybrid_blocks", "hybrid"),
    ),
    "original": UpstreamConfig(
        fields={
            "dim": "width",
            "eps": "eps",
            "ffn_dim": "ffn_dim",
            "freq_dim": "freq_dim",
            "in_dim": "in_channels",
            "num_heads": "num_heads",
            "num_layers": "num_layers",
            "out_dim": "out_channels",
            "text_len": "text_length",
        },
        fixed={"_class_name": "WanModel", "_diffusers_version": "0.30.0", "model_type": "t2v"},
        unsaid=("hybrid_blocks", "hybrid"),
    ),
}
"""Values and omissions are those of the published files."""


@dataclasses.dataclass(frozen=True)
class Inferred:
    """The value of a configuration's field that a tensor's shape implies."""

    value: Any
    tensor: str


def read_torch_config(folder: Path, inferred: dict[str, Inferred]) -> tuple[WanConfig, dict[str, str]]:
    """The configuration of a PyTorch checkpoint, from its files and its tensors' shapes.

    Args:
      folder: where config.json and rehyat.json may be.
      inferred: what the shapes imply, by names of `WanConfig`'s fields, and "width".

    Returns:
      (config, metadata with "codec" and "text_encoder").

    Raises:
      InputError: a file is malformed, describes another architecture, or contradicts the tensors' shapes.
    """
    config_file, side_car = folder / "config.json", folder / SIDE_CAR
    stated = _read_upstream(config_file, inferred) if config_file.exists() else {}
    extra, metadata = _read_side_car(side_car, stated) if side_car.exists() else ({}, dict(DEFAULT_METADATA))
    fields = DEFAULTS | {name: found.value for name, found in inferred.items()} | stated | extra
    width = fields.pop("width")
    fields |= _heads(stated, width, config_file)
    return wan_config_from_json(fields, str(side_car if extra else config_file)), metadata


def write_torch_config(folder: Path, config: WanConfig, metadata: dict[str, str], layout: Layout) -> None:
    """config.json as upstream writes it and, where that can't say everything, rehyat.json."""
    upstream, ours = UPSTREAM[layout], {**config.to_dict(), "width": config.width}
    described = {theirs: ours[name] for theirs, name in upstream.fields.items()}
    write_json(folder / "config.json", upstream.fixed | described)

    extra = {name: ours[name] for name in upstream.unsaid if ours[name] != DEFAULTS[name]}
    if config.hybrid_blocks:
        extra["hybrid"] = ours["hybrid"]
    extra |= {name: value for name, value in metadata.items() if value != DEFAULT_METADATA[name]}
    if extra:
        write_json(folder / SIDE_CAR, extra)


def _read_upstream(file: Path, inferred: dict[str, Inferred]) -> dict[str, Any]:
    """The fields of `WanConfig` (and "width") that config.json states."""
    content = read_json_object(file)
    classes = {upstream.fixed["_class_name"]: upstream for upstream in UPSTREAM.values()}
    name = content.get("_class_name")
    if not isinstance(name, str) or name not in classes:
        raise InputError(
            f"{file}: _class_name should be one of {sorted(classes)}, found {name!r}; "
            f"only Wan's text-to-video transformers can be converted"
        )
    upstream, stated = classes[name], {}
    width = inferred["width"]
    for name, value in content.items():
        if name.startswith("_"):
            continue
        require_known(name, [*upstream.fields, *upstream.fixed], str(file))
        if name in upstream.fixed:
            if value != upstream.fixed[name]:
                raise InputError(
                    f"{file}: {name} should be {upstream.fixed[name]!r}, found {value!r}; only Wan's text-to-video "
                    f"transformers can be converted, without image conditioning or other normalisation"
                )
            continue
        ours = upstream.fields[name]
        if ours in inferred and value != inferred[ours].value:
            raise InputError(
                f"{file}: {name} should be {inferred[ours].value!r} by the shape of {inferred[ours].tensor}, "
                f"found {value!r}; config.json and the tensors belong to different checkpoints"
            )
        if ours in ("num_heads", "head_dim") and (type(value) is not int or value < 1 or width.value % value):
            raise InputError(
                f"{file}: {name} should divide the width {width.value} of {width.tensor}, found {value!r}; "
                f"config.json and the tensors belong to different checkpoints"
            )
        stated[ours] = value
    return stated


def _read_side_car(file: Path, stated: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """(fields of `WanConfig`, metadata) of rehyat.json."""
    content = read_json_object(file)
    for name in content:
        require_known(name, [*UPSTREAM["diffusers"].unsaid, *DEFAULT_METADATA], str(file))
    metadata = {name: content.pop(name, default) for name, default in DEFAULT_METADATA.items()}
    for name, value in metadata.items():
        if not isinstance(value, str):
            raise InputError(f"{file}: {name} should be a name, found {value!r}; correct it")
    for name in content.keys() & stated.keys():
        if content[name] != stated[name]:
            raise InputError(f"{file}: {name} is {content[name]!r}, but config.json says {stated[name]!r}; correct one")
    return content, metadata


def _heads(stated: dict[str, Any], width: int, file: Path) -> dict[str, int]:
    """num_heads and head_dim; where neither is stated, every published Wan model's head_dim of 128."""
    num_heads, head_dim = stated.get("num_heads"), stated.get("head_dim")
    if num_heads is None and head_dim is None:
        if width % 128:
            raise InputError(
                f"{file}: is needed for the number of heads, because the width {width} is not a multiple of the usual "
                f"head_dim 128; add the checkpoint's config.json"
            )
        head_dim = 128
    num_heads, head_dim = num_heads or width // head_dim, head_dim or width // num_heads
    if num_heads * head_dim != width:
        raise InputError(
            f"{file}: num_attention_heads * attention_head_dim should be the tensors' width {width}, "
            f"found {num_heads} * {head_dim}; correct one"
        )
    return {"num_heads": num_heads, "head_dim": head_dim}
