"""Compares sampled videos of teacher and student, and real ones: consistency, quality by frame, distribution, verdicts.

Videos are decoded one at a time, and only their measures are kept.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from rehyat_jax.data.sources import Judge
from rehyat_jax.evaluation.bootstrap import Estimate, Resampling
from rehyat_jax.evaluation.consistency import chunk_changes, frame_changes, sharpness
from rehyat_jax.evaluation.distribution import features, frechet_distance, spreads, standardised
from rehyat_jax.evaluation.pair import STUDENT, TEACHER
from rehyat_jax.evaluation.results import Curve, Evaluation
from rehyat_jax.evaluation.samples import decoded
from rehyat_jax.files.pictures import save_frames
from rehyat_jax.generation.pipeline import Pipeline

Measures = dict[str, np.ndarray]
"""Arrays by name, the first axis of which is the videos."""

SHOWN_VIDEOS, SHOWN_FRAMES = 4, 9
"""Size of the picture of samples."""

DATA = "data"
"""The set of real videos, next to those of teacher and student."""


class Decoder:
    """Decodes and measures sets of videos.

    Args:
      pipeline: with the codec.
      judge: gives verdicts on videos of known prompts; None for none.
      progress: show the rate and the remaining time.
    """

    def __init__(self, pipeline: Pipeline, judge: Judge | None, *, progress: bool):
        self._pipeline, self._judge, self._progress = pipeline, judge, progress

    def samples(
        self, latents: dict[str, np.ndarray], prompts: Sequence[str]
    ) -> tuple[dict[str, Measures], dict[str, list[np.ndarray]]]:
        """Measures of the samples of teacher and student, and the first videos of each."""
        rows: dict[str, list[Measures]] = {TEACHER: [], STUDENT: []}
        kept: dict[str, list[np.ndarray]] = {TEACHER: [], STUDENT: []}
        for number, prompt in enumerate(self._bar(prompts, "samples")):
            pair = {name: decoded(self._pipeline, latents[name][number]) for name in rows}
            for name, video in pair.items():
                measures = self._measures(video)
                if self._judge is not None:
                    verdicts = self._judge.verdicts(video[None], [prompt])
                    measures |= {f"verdict_{key}": values[0] for key, values in verdicts.items()}
                rows[name].append(measures)
                if len(kept[name]) < SHOWN_VIDEOS:
                    kept[name].append(video)
            rows[STUDENT][-1]["difference"] = np.abs(pair[STUDENT] - pair[TEACHER]).mean((1, 2, 3))
        return {name: _stacked(found) for name, found in rows.items()}, kept

    def data(self, latents: np.ndarray) -> Measures:
        """Measures of real videos with latents [N, T, H, W, C]."""
        return _stacked([self._measures(decoded(self._pipeline, row)) for row in self._bar(latents, "data")])

    def _bar(self, rows: Iterable[Any], name: str) -> tqdm:
        return tqdm(rows, desc=f"measuring {name}", unit="video", disable=not self._progress, delay=1)

    @staticmethod
    def _measures(video: np.ndarray) -> Measures:
        return {
            "frame_change": frame_changes(video[None])[0],
            "sharpness": sharpness(video[None])[0],
            "features": features(video),
        }


def _stacked(rows: list[Measures]) -> Measures:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def compare_videos(
    measures: dict[str, Measures], prompts: Sequence[str], *, time_factor: int, chunk_frames: int
) -> Evaluation:
    """Estimates from the measures of teacher, student and maybe data.

    Args:
      measures: by set, see `Decoder`.
      prompts: of the samples.
      time_factor: see `chunk_changes`.
      chunk_frames: latent frames of a chunk of the student, 1 if it has none.

    Returns:
      The metrics are those in docs/evaluation.md, "Samples".
    """
    found = Evaluation()
    resampling = {name: Resampling(len(rows["frame_change"])) for name, rows in measures.items()}
    of_sets = lambda key: {name: resampling[name].mean(rows[key]) for name, rows in measures.items()}
    for key, title, first in (("frame_change", "change from the frame before", 1), ("sharpness", "sharpness", 0)):
        if not (count := measures[STUDENT][key].shape[1]):
            continue  # a video of one frame does not change
        for name, rows in measures.items():
            found.metrics[f"{key}_{name}"] = resampling[name].mean(rows[key].mean(1))
        words = "mean |difference of pixels|"
        found.curves[f"{key}_by_frame"] = Curve(title, "frame", words, list(range(first, first + count)), of_sets(key))
    at, within = chunk_changes(measures[STUDENT]["frame_change"].shape[1] + 1, time_factor, chunk_frames)
    if chunk_frames > 1 and at.any() and within.any():
        for name, rows in measures.items():
            changes = rows["frame_change"]
            jumps = resampling[name].ratio(changes[:, at].mean(1), changes[:, within].mean(1))
            found.metrics[f"chunk_jump_{name}"] = jumps

    # ------------------------------------------------------------------------------------------ student against teacher
    paired, difference = resampling[STUDENT], measures[STUDENT]["difference"]
    found.metrics["sample_difference"] = paired.mean(difference.mean(1))
    words, frames = "mean |student - teacher| of pixels", list(range(difference.shape[1]))
    series = {STUDENT: paired.mean(difference)}
    found.curves["sample_difference_by_frame"] = Curve("from the teacher's sample", "frame", words, frames, series)
    for key in measures[STUDENT]:
        if key.startswith("verdict_"):
            _add_verdict(found, key.removeprefix("verdict_"), *(measures[name][key] for name in (TEACHER, STUDENT)))
    _add_distribution(found, {name: rows["features"] for name, rows in measures.items()}, prompts)
    return found


def _add_verdict(found: Evaluation, name: str, teacher: np.ndarray, student: np.ndarray) -> None:
    resampling = Resampling(len(teacher))
    whole = lambda verdicts: verdicts.astype(float).reshape(len(verdicts), -1).mean(1)
    found.metrics[f"{name}_{TEACHER}"] = resampling.mean(whole(teacher))
    found.metrics[f"{name}_{STUDENT}"] = resampling.mean(whole(student))
    found.metrics[f"{name}_difference"] = resampling.mean(whole(student) - whole(teacher))
    if teacher.ndim > 1:
        series = {TEACHER: resampling.mean(teacher), STUDENT: resampling.mean(student)}
        frames = list(range(teacher.shape[1]))
        found.curves[f"{name}_by_frame"] = Curve(name.replace("_", " "), "frame", "share of videos", frames, series)


def _add_distribution(found: Evaluation, sets: dict[str, np.ndarray], prompts: Sequence[str]) -> None:
    sets = standardised(sets, DATA if DATA in sets else TEACHER)
    distances: dict[str, Estimate] = {
        "frechet_teacher_student": frechet_distance(sets[TEACHER], sets[STUDENT], paired=True)
    }
    if DATA in sets:
        for name in (TEACHER, STUDENT):
            distances[f"frechet_{name}_data"] = frechet_distance(sets[name], sets[DATA], paired=False)
    found.metrics |= distances
    spread = {name: spreads(sets[name], list(prompts)) for name in (TEACHER, STUDENT)}
    if len(spread[TEACHER]) > 1:
        resampling = Resampling(len(spread[TEACHER]))
        found.metrics |= {f"diversity_{name}": resampling.mean(values) for name, values in spread.items()}
        found.metrics["diversity_difference"] = resampling.mean(spread[STUDENT] - spread[TEACHER])


def save_samples(file: Path, kept: dict[str, list[np.ndarray]], prompts: Sequence[str]) -> None:
    """Writes a PNG of the first videos: the teacher's above the student's from the same noise."""
    frames = len(kept[TEACHER][0])
    chosen = np.unique(np.linspace(0, frames - 1, min(frames, SHOWN_FRAMES)).round().astype(int)).tolist()
    rows = {}
    for number in range(len(kept[TEACHER])):
        for name in (TEACHER, STUDENT):
            title = prompts[number] if len(prompts[number]) < 40 else f"{prompts[number][:37]}..."
            rows[f"{title}\n{name}, noise {number}"] = kept[name][number]
    save_frames(file, rows, chosen)
