"""Reads the videos that tests write."""

from pathlib import Path

import numpy as np

from rehyat_jax.files.mp4 import read_facts, read_frames


def read_mp4(path: Path) -> tuple[np.ndarray, float]:
    """(uint8 [frames, height, width, 3], frames per second)."""
    return read_frames(path), float(read_facts(path).fps)
