"""Reads the videos that tests write."""

from pathlib import Path

import numpy as np

from rehyat_jax.files.mp4 import iterate_frames, read_facts


def read_mp4(path: Path) -> tuple[np.ndarray, float]:
    """(uint8 [frames, height, width, 3], frames per second)."""
    return np.concatenate(list(iterate_frames(path))), float(read_facts(path).fps)
