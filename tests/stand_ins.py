"""Writes what README.md's commands for Wan2.1 read, but tiny and random: python tests/stand_ins.py.

The current folder gets `wan` (a diffusers pipeline), `Wan2.1-T2V-1.3B` (a transformer), `videos` with captions, and
`prompts.txt`.
"""

import shutil
import tempfile
from pathlib import Path

import numpy as np
from test_pipeline import save_random_pipeline

from rehyat_jax.files.mp4 import write_video

PROMPTS = ("a cat runs across the green field", "waves")
FRAMES, HEIGHT, WIDTH = 21, 32, 48


def main() -> None:
    """Writes everything."""
    with tempfile.TemporaryDirectory() as place:
        save_random_pipeline(Path(place))
        shutil.move(Path(place) / "folder", "wan")
    shutil.copytree("wan/transformer", "Wan2.1-T2V-1.3B")
    Path("prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    Path("videos").mkdir()
    for number in range(8):
        frames = np.random.default_rng(number).integers(0, 256, (FRAMES, HEIGHT, WIDTH, 3), np.uint8)
        write_video(Path("videos", f"{number}.mp4"), frames)
        Path("videos", f"{number}.txt").write_text(PROMPTS[number % 2])


if __name__ == "__main__":
    main()
