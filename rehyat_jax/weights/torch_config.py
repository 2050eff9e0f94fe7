"""`config.json` of both PyTorch layouts, and `rehyat.json` for fields that upstream's configuration lacks.

rehyat.json has format version 2. Version 1 has no "format_version", and has "hybrid_blocks" and one "hybrid" form
instead of "attention". A student without a copy of its base has "base", see `BASE`.
"""

from pathlib import Path
from typing import Any

from rehyat_jax.attention.form import FORM_FIELDS
from rehyat_jax.errors import InputError
from rehyat_jax.files.json_files import read_json_object, write_json
from rehyat_jax.weights.config_fields import (
    CURRENT,
    check_field,
    check_version,
    config_from_json,
    defaults,
    require_known,
)
from rehyat_jax.weights.spec import Inferred, ModelSpec
from rehyat_jax.weights.streamed import OPTIONAL, check_metadata
from rehyat_jax.weights.table import Layout

CONFIG_FILE, SIDE_CAR = "config.json", "rehyat.json"

BASE = "base"
"""Name of an object in rehyat.json of a student without a copy of its base: "name", the base's on the Hub, or null;
"identity", see `identity.BaseIdentity`; and "adapter", true if there are low-rank adapters."""


def read_torch_config(
    spec: ModelSpec, folder: Path, inferred: dict[str, Inferred], layout: Layout
) -> tuple[Any, dict[str, Any]]:
    """The configuration of a PyTorch checkpoint, from its files and its tensors' shapes.

    Args:
      spec: spec of the model.
      folder: folder that may hold config.json and rehyat.json.
      inferred: values that the shapes imply, by name of the configuration's field, and a transformer's "width".
      layout: layout of the tensors. The folder's files describe other models if this layout has no config.json.

    Returns:
      (config, metadata of a transformer, see `StreamedModel`).

    Raises:
      InputError: a file is malformed, describes another architecture, or contradicts the tensors' shapes.
    """
    config_file, side_car = folder / CONFIG_FILE, folder / SIDE_CAR
    is_described = layout in spec.upstream and config_file.exists()
    stated = _read_upstream(spec, config_file, inferred) if is_described else {}
    extra, metadata, version = {}, dict(spec.metadata), CURRENT
    if spec.is_transformer and side_car.exists():
        extra, metadata, version = _read_side_car(spec, side_car, stated)
    fields = {name: found.value for name, found in inferred.items()} | stated | extra
    if spec.head_dim is not None:
        width = fields.pop("width")
        fields |= _heads(spec.head_dim, fields, width, config_file)
    return config_from_json(spec.config, fields, str(side_car if extra else config_file), version), metadata


def write_torch_config(
    spec: ModelSpec,
    folder: Path,
    config: Any,
    metadata: dict[str, Any],
    layout: Layout,
    *,
    base: dict[str, Any] | None = None,
) -> None:
    """Writes config.json in upstream's format, if the layout has one, and rehyat.json for fields it cannot hold.

    `base` is the object `BASE`, for a student without a copy of its base.

    Raises:
      InputError: the layout has no config.json, and a field that the tensors do not imply differs from its default.
    """
    ours, usual = config.to_dict(), defaults(spec.config)
    if layout not in spec.upstream:
        for name in spec.defaulted:
            if ours[name] != usual[name]:
                raise InputError(
                    f"{folder}: the {layout} layout of {spec.description} has {name} {usual[name]}, found "
                    f"{ours[name]}; write another layout"
                )
        return
    upstream = spec.upstream[layout]
    if spec.is_transformer:
        ours["width"] = config.width
    described = {theirs: ours[name] for theirs, name in upstream.fields.items()}
    write_json(folder / CONFIG_FILE, upstream.fixed | upstream.written | described)

    extra = {name: ours[name] for name in upstream.unsaid if ours[name] != usual[name]}
    extra |= {name: ours[name] for name in FORM_FIELDS[2] if name in ours}
    extra |= {name: value for name, value in metadata.items() if value != spec.metadata.get(name)}
    extra |= {BASE: base} if base else {}
    if extra:
        write_json(folder / SIDE_CAR, {"format_version": CURRENT, **extra})


def _read_upstream(spec: ModelSpec, file: Path, inferred: dict[str, Inferred]) -> dict[str, Any]:
    """The fields of the configuration (and a transformer's "width") that config.json states."""
    content = read_json_object(file)
    (marker,) = {upstream.marker for upstream in spec.upstream.values()}
    classes = {upstream.fixed[marker]: upstream for upstream in spec.upstream.values()}
    name = content.get(marker)
    if not isinstance(name, str) or name not in classes:
        raise InputError(
            f"{file}: {marker} should be one of {sorted(classes)}, found {name!r}; "
            f"only checkpoints of {spec.description} can be read"
        )
    upstream, stated = classes[name], {}
    for name, value in content.items():
        if name.startswith("_") or (upstream.is_open and name not in upstream.fields and name not in upstream.fixed):
            continue
        require_known(name, [*upstream.fields, *upstream.fixed], str(file))
        if name in upstream.fixed:
            if value != upstream.fixed[name]:
                without = f", without {spec.unsupported}" if spec.unsupported else ""
                raise InputError(
                    f"{file}: {name} should be {upstream.fixed[name]!r}, found {value!r}; only checkpoints of "
                    f"{spec.description} can be read{without}"
                )
            continue
        ours = upstream.fields[name]
        if ours in inferred and value != inferred[ours].value:
            raise InputError(
                f"{file}: {name} should be {inferred[ours].value!r} by the shape of {inferred[ours].tensor}, "
                f"found {value!r}; config.json and the tensors belong to different checkpoints"
            )
        if ours in ("num_heads", "head_dim"):
            _check_divides(inferred["width"], name, value, file)
        if ours != "width":
            check_field(spec.config, ours, value, str(file), name)
        stated[ours] = value
    return stated


def _read_side_car(spec: ModelSpec, file: Path, stated: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], int]:
    """(fields of the configuration, metadata, format version) of rehyat.json."""
    content = read_json_object(file)
    content.pop(BASE, None)
    version = check_version(content.pop("format_version", 1), str(file))
    unsaid = {name for upstream in spec.upstream.values() for name in upstream.unsaid}
    for name in content:
        require_known(name, [*sorted(unsaid), *FORM_FIELDS[version], *spec.metadata, *OPTIONAL], str(file))
    metadata = {name: content.pop(name, default) for name, default in spec.metadata.items()}
    metadata |= {name: content.pop(name) for name in OPTIONAL if name in content}
    check_metadata(metadata, file)
    for name in content.keys() & stated.keys():
        if content[name] != stated[name]:
            raise InputError(f"{file}: {name} is {content[name]!r}, but config.json says {stated[name]!r}; correct one")
    return content, metadata, version


def _check_divides(width: Inferred, name: str, value: Any, file: Path) -> None:
    if type(value) is not int or value < 1 or width.value % value:
        raise InputError(
            f"{file}: {name} should divide the width {width.value} of {width.tensor}, found {value!r}; "
            f"config.json and the tensors belong to different checkpoints"
        )


def _heads(usual_head_dim: int, known: dict[str, Any], width: int, file: Path) -> dict[str, int]:
    """num_heads and head_dim; if neither is known, head_dim is that of every published model."""
    num_heads, head_dim = known.get("num_heads"), known.get("head_dim")
    if num_heads is None and head_dim is None:
        if width % usual_head_dim:
            raise InputError(
                f"{file}: is needed for the number of heads, because the width {width} is not a multiple of the usual "
                f"head_dim {usual_head_dim}; add the checkpoint's config.json"
            )
        head_dim = usual_head_dim
    num_heads, head_dim = num_heads or width // head_dim, head_dim or width // num_heads
    if num_heads * head_dim != width:
        raise InputError(
            f"{file}: num_attention_heads * attention_head_dim should be the tensors' width {width}, "
            f"found {num_heads} * {head_dim}; correct one"
        )
    return {"num_heads": num_heads, "head_dim": head_dim}
