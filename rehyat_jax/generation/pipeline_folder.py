"""The parts of a text-to-video pipeline in a folder, in diffusers' layout or that of Wan's original repositories."""

from pathlib import Path
from typing import Any

from rehyat_jax.errors import InputError
from rehyat_jax.files.json_files import read_json_object
from rehyat_jax.weights.spec import ModelSpec

INDEX = "model_index.json"
"""The file that lists a pipeline's parts in diffusers' layout."""

CLASSES = {
    "transformer": "WanTransformer3DModel",
    "vae": "AutoencoderKLWan",
    "text_encoder": "UMT5EncoderModel",
}
"""The classes of the parts that are read, in diffusers' and transformers' names."""


def check_pipeline(folder: Path) -> None:
    """Raises InputError if a folder is another pipeline than Wan2.1's text to video, or names foreign parts.

    Only model_index.json is read. A folder without this file passes.
    """
    file = folder / INDEX
    if not file.exists():
        return
    content = read_json_object(file)
    if (found := content.get("_class_name")) != "WanPipeline":
        raise InputError(
            f"{file}: _class_name should be 'WanPipeline', found {found!r}; only Wan2.1's text-to-video pipelines can "
            f"be sampled"
        )
    if _class_of(content, "transformer_2") is not None:
        raise InputError(
            f"{file}: has a transformer_2, expected one transformer; pipelines of two experts (Wan2.2 A14B) cannot be "
            f"sampled, give a pipeline of Wan2.1"
        )
    if content.get("expand_timesteps"):
        raise InputError(
            f"{file}: expand_timesteps should be false, found {content['expand_timesteps']!r}; a timestep for every "
            f"token (Wan2.2 TI2V-5B) is not supported, give a pipeline of Wan2.1"
        )
    for part, expected in CLASSES.items():
        if (found := _class_of(content, part)) != expected:
            raise InputError(
                f"{file}: {part} should be a {expected}, found {found}; the folder is another model's, give a pipeline "
                f"of Wan2.1"
            )


def find_part(folder: Path, spec: ModelSpec) -> Path:
    """The folder or file of the VAE or text encoder of a pipeline. Raises InputError if it is missing."""
    place = spec.find(folder)
    if place == folder:
        original = f" or {spec.original_file}.safetensors" if spec.original_file else ""
        raise InputError(
            f"{folder}: expected {spec.description} in {spec.part}/{original}, found neither; get the complete "
            f"repository (those whose names end in -Diffusers have every part as safetensors)"
        )
    return place


def scheduler_shift(folder: Path) -> float | None:
    """The flow shift of scheduler/scheduler_config.json; None without that file or field. Raises InputError."""
    file = folder / "scheduler" / "scheduler_config.json"
    if not file.exists():
        return None
    content = read_json_object(file)
    # The name in UniPC's configuration, and in that of diffusers' Euler.
    shift = content.get("flow_shift", content.get("shift"))
    if shift is None:
        return None
    if isinstance(shift, bool) or not isinstance(shift, int | float) or not 0.001 <= shift <= 1000:
        raise InputError(f"{file}: flow_shift should be a number from 0.001 to 1000, found {shift!r}; correct it")
    return float(shift)


def _class_of(content: dict[str, Any], part: str) -> str | None:
    """The class that model_index.json names for a part: [library, class], or [null, null] for none."""
    entry = content.get(part)
    return str(entry[1]) if isinstance(entry, list) and len(entry) == 2 and entry[1] is not None else None
