"""The manifest of a benchmark's videos: what was made of which model with which settings."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rehyat_jax.evaluation.vbench.layout import Video
from rehyat_jax.files.write import reported_write_errors, written_whole
from rehyat_jax.generation.jobs import Job


def manifest_file(folder: Path) -> Path:
    """The manifest of the videos in a folder, next to it: VBench expects only videos in the folder."""
    path = Path(os.path.abspath(folder))
    return path.with_name(f"{path.name}.json")


def write_manifest(
    folder: Path, settings: Mapping[str, Any], inputs: Sequence[Path], videos: Sequence[Video], jobs: Sequence[Job]
) -> Path:
    """Writes the manifest of complete videos; returns its file.

    Args:
      folder: folder of the model's videos.
      settings: what decides all videos, as JSON values.
      inputs: files of prompts.
      videos, jobs: the videos, in the same order.

    Raises:
      InputError: the manifest cannot be written, or a file cannot be read.
    """
    rows = [
        {
            **{"file": video.name.as_posix(), "sha256": _sha256(job.file), "seed": job.seed},
            **{"original_prompt": video.entry.prompt, "prompt": job.prompt, "index": video.index},
        }
        for video, job in zip(videos, tqdm(jobs, desc="hashing videos", unit="video", delay=1), strict=True)
    ]
    content = {
        "settings": dict(settings),
        "inputs": {str(file): _sha256(file) for file in inputs},
        "videos": rows,
    }
    path = manifest_file(folder)
    with reported_write_errors(path), written_whole(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
