"""Samples two models from the same prompts and noise; keeps the latents in a folder, so that a stopped command resumes.

`FOLDER/teacher/00000.safetensors` has the latents of video 0 with their settings, and so on.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from rehyat_jax.errors import InputError
from rehyat_jax.files.shown import shown
from rehyat_jax.files.temporary import remove_leftovers
from rehyat_jax.generation.latents_file import read_latents, write_latents
from rehyat_jax.generation.pipeline import Pipeline

NOT_COMPARED = "program", "transformer"
"""Settings that may differ from those of kept samples: the version, and a model's path. Its fingerprint is compared."""


class SampleSet:
    """The samples of one model.

    Args:
      pipeline: of the model.
      prompts: one for each video; video i has noise i.
      fingerprint: identifies the model's files.
      folder: place of the latents; None keeps them in memory only.

    Raises:
      InputError: the folder has other samples. The message shows what differs.
    """

    def __init__(self, pipeline: Pipeline, prompts: Sequence[str], fingerprint: str, folder: Path | None):
        self._pipeline, self._prompts, self._folder = pipeline, prompts, folder
        common = pipeline.settings | {"seed": pipeline.options.seed, "model": fingerprint}
        self._settings = [common | {"prompt": prompt, "noise": i} for i, prompt in enumerate(prompts)]
        self._latents: dict[int, np.ndarray] = {}
        if folder is not None:
            self._latents = {i: self._kept(i) for i in range(len(prompts)) if self._file(i).exists()}

    def latents(self, name: str, *, progress: bool = False) -> np.ndarray:
        """The latents [N, T, H, W, C] float32 of all videos; samples those that are missing.

        Args:
          name: of the model, for the progress bar.
          progress: show the rate and the remaining time.

        Raises:
          InputError: they are not finite, or cannot be written.
        """
        pipeline, count = self._pipeline, len(self._prompts)
        missing = [i for i in range(count) if i not in self._latents]
        if missing:
            if self._folder is not None and self._folder.is_dir():
                remove_leftovers(self._folder)
            texts = list(dict.fromkeys([*(self._prompts[i] for i in missing), pipeline.options.negative_prompt]))
            embedded = dict(zip(texts, pipeline.embed(texts, progress=progress), strict=True))
            with tqdm(total=count, initial=count - len(missing), desc=f"sampling the {name}", unit="video") as bar:
                bar.disable = not progress
                for first in range(0, len(missing), pipeline.options.batch):
                    self._sample(missing[first : first + pipeline.options.batch], embedded)
                    bar.update(len(missing[first : first + pipeline.options.batch]))
            pipeline.free("transformer")
        return np.stack([self._latents[i] for i in range(count)])

    def _sample(self, numbers: Sequence[int], embedded: dict[str, np.ndarray]) -> None:
        pipeline = self._pipeline
        # A smaller last batch is padded, because it would compile again.
        padded = [*numbers, *[numbers[-1]] * (pipeline.options.batch - len(numbers))]
        negative = embedded[pipeline.options.negative_prompt]
        text = np.stack([embedded[self._prompts[i]] for i in padded])
        latents = pipeline.sample_latents(text, np.stack([negative] * len(padded)), pipeline.noise(padded))
        for number, row in zip(numbers, latents[: len(numbers)], strict=True):
            if not np.isfinite(row).all():
                raise InputError(
                    f"{pipeline.settings['transformer']}: expected finite videos, found NaN or infinity in sample "
                    f"{number}; the model's training may have diverged, or --guidance-scale is too large"
                )
            if self._folder is not None:
                write_latents(self._file(number), row, self._settings[number])
            self._latents[number] = row

    def _file(self, number: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{number:05d}.safetensors"

    def _kept(self, number: int) -> np.ndarray:
        file = self._file(number)
        latents, found = read_latents(file)
        wanted = json.loads(json.dumps(self._settings[number]))
        names = [name for name in dict.fromkeys([*wanted, *found]) if name not in NOT_COMPARED]
        different = [
            f"{name} {shown(found.get(name), 80)!r}, expected {shown(wanted.get(name), 80)!r}"
            for name in names
            if found.get(name) != wanted.get(name)
        ]
        if different:
            raise InputError(
                f"{file}: was sampled with {'; '.join(different)}; give the earlier options, remove "
                f"{file.parent.parent}, or choose another --out"
            )
        return latents


def decoded(pipeline: Pipeline, latents: np.ndarray) -> np.ndarray:
    """One video from its latents [T, H, W, C]: float32 [frames, height, width, 3] in [0, 1]."""
    return np.concatenate(list(pipeline.frames(latents[None])), axis=1)[0].astype(np.float32) / 255


def read_about(settings: Pipeline) -> dict[str, Any]:
    """The settings of samples, for a report."""
    return {name: value for name, value in settings.settings.items() if name not in NOT_COMPARED}
