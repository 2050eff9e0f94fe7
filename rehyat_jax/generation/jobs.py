"""Many videos of one pipeline: their jobs, which of them are finished, and the loop that makes the others."""

import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rehyat_jax.errors import InputError
from rehyat_jax.files.mp4 import read_settings
from rehyat_jax.files.shown import shown
from rehyat_jax.generation.continuing import Continued, skip_frames
from rehyat_jax.generation.latents_file import write_latents
from rehyat_jax.generation.pipeline import Pipeline
from rehyat_jax.generation.video_files import write_videos

ROUND = 256
"""Most videos whose prompts are encoded together: 2 GB of umT5's embeddings, if all are different."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A video to make.

    Attributes:
      prompt: what to show.
      seed, number: seed and number of its noise; see `host_noise`.
      file: the .mp4 file.
      more: further settings to store in the file, as JSON values.
    """

    prompt: str
    seed: int
    number: int
    file: Path
    more: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that are this video's own, as JSON values."""
        return {"prompt": self.prompt, "seed": self.seed, "noise": self.number, **self.more}


def unfinished(jobs: Sequence[Job], settings: Mapping[str, Any]) -> list[Job]:
    """The jobs without a file. Raises InputError if a file was made with other settings."""
    todo = []
    for job in jobs:
        if not job.file.exists():
            if not job.file.with_suffix(".npy").exists():
                todo.append(job)
            continue
        found, wanted = read_settings(job.file), json.loads(json.dumps({**settings, **job.settings}))
        different = [name for name in wanted if name != "program" and found.get(name) != wanted[name]]
        if different:
            name = different[0]
            raise InputError(
                f"{job.file}: was made with {name} {shown(found.get(name))!r}, expected {shown(wanted[name])!r}; "
                f"remove it, or choose another --out"
            )
    return todo


def make_videos(
    pipeline: Pipeline,
    jobs: Sequence[Job],
    *,
    continued: Continued | None = None,
    more: Mapping[str, Any] | None = None,
    as_arrays: bool = False,
    keep_latents: bool = False,
    contact_sheet: bool = False,
) -> Iterator[dict[Path, str]]:
    """Makes videos, `pipeline.options.batch` at once; yields the files of each batch with their descriptions.

    The parts of the pipeline take turns. The transformer stays in memory where the VAE fits next to it.

    Args:
      pipeline: the model and its options.
      jobs: the videos.
      continued: a video with whose last frames all of them begin.
      more: further settings to store in all files, as JSON values.
      as_arrays, contact_sheet: see `write_videos`.
      keep_latents: also write the latents, as .safetensors next to the video.

    Raises:
      InputError: a prompt is wrong, a video is not finite, or a file cannot be written.
    """
    before, keep_both = None, None
    if continued is not None:
        before = pipeline.encode(continued.last, progress=True)
        pipeline.free("VAE")
    for group in _groups(jobs, ROUND):
        prompts = list(dict.fromkeys([*(job.prompt for job in group), pipeline.options.negative_prompt]))
        text = dict(zip(prompts, pipeline.embed(prompts, progress=True), strict=True))
        for together in _groups(group, pipeline.options.batch):
            latents = _sample_together(pipeline, together, text, before)
            if keep_both is None:
                keep_both = len(jobs) > len(together) and pipeline.fits_together()
            if not keep_both:
                pipeline.free("transformer")
            settings = [{**pipeline.settings, **job.settings, **(more or {})} for job in together]
            if keep_latents:
                for job, row, own in zip(together, latents, settings, strict=True):
                    write_latents(job.file.with_suffix(".safetensors"), row, own)
            frames, count = pipeline.frames(latents, progress=True), pipeline.frame_count(latents.shape[1])
            if continued is not None:
                frames = itertools.chain(continued.pieces(len(together)), skip_frames(frames, len(continued.last)))
                count += continued.frames - len(continued.last)
            files = [job.file for job in together]
            how = dict(fps=pipeline.fps, as_arrays=as_arrays, contact_sheet=contact_sheet)
            yield write_videos(frames, count, files, settings, **how)
            if not keep_both:
                pipeline.free("VAE")
        pipeline.free("transformer", "VAE")


def _sample_together(
    pipeline: Pipeline, jobs: Sequence[Job], text: dict[str, np.ndarray], before: np.ndarray | None
) -> np.ndarray:
    """Latents [jobs, T, H, W, C] of videos that are sampled at once, and that begin with the latents `before`.

    Raises:
      InputError: they are not finite.
    """
    # A smaller last group is padded, because it would compile again.
    padded = [*jobs, *[jobs[-1]] * (pipeline.options.batch - len(jobs))]
    negative_text = text[pipeline.options.negative_prompt]
    latents = pipeline.sample_latents(
        np.stack([text[job.prompt] for job in padded]),
        np.stack([negative_text] * len(padded)),
        np.concatenate([pipeline.noise([job.number], job.seed) for job in padded]),
        before=None if before is None else np.stack([before] * len(padded)),
        progress=True,
    )[: len(jobs)]
    if not np.isfinite(latents).all():
        raise InputError(
            f"{pipeline.settings['transformer']}: expected finite videos, found NaN or infinity; the model's training "
            f"may have diverged, or --guidance-scale {pipeline.options.guidance_scale} is too large"
        )
    return latents


def _groups(jobs: Sequence[Job], size: int) -> Iterator[Sequence[Job]]:
    return (jobs[first : first + size] for first in range(0, len(jobs), size))
