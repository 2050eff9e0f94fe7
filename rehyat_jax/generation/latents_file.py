"""Latents of a video in a safetensors file, with the settings that they were sampled with."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from rehyat_jax.errors import InputError
from rehyat_jax.files.regular import check_regular_file
from rehyat_jax.files.shown import shown
from rehyat_jax.files.write import reported_write_errors, written_whole

NAME, SETTINGS = "latents", "settings"


def write_latents(file: Path, latents: np.ndarray, settings: dict[str, Any]) -> None:
    """Writes latents [T, H, W, C] float32, complete or not at all. Raises InputError if that fails."""
    content = save({NAME: np.ascontiguousarray(latents)}, {SETTINGS: json.dumps(settings)})
    with reported_write_errors(file), written_whole(file) as temporary:
        temporary.write_bytes(content)


def read_latents(file: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """(latents [T, H, W, C] float32, settings) of a file of `write_latents`. Raises InputError for any other."""
    check_regular_file(file)
    expected = f"expected {NAME} [T, H, W, C] float32 with their settings, as sample --keep-latents writes"
    try:
        with safe_open(file, framework="numpy") as opened:
            settings = json.loads((opened.metadata() or {}).get(SETTINGS, ""))
            latents = opened.get_tensor(NAME)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise InputError(f"{file}: {expected}, found: {shown(error)}; give such a file") from error
    if not isinstance(settings, dict) or latents.dtype != np.float32 or latents.ndim != 4 or not latents.size:
        raise InputError(f"{file}: {expected}, found {latents.dtype} {list(latents.shape)}; give such a file")
    if not np.isfinite(latents).all():
        raise InputError(f"{file}: {NAME} have values that are NaN or infinite; sample them again")
    return latents, settings
