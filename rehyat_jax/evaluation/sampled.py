"""Samples both models, and compares the videos: opened and checked first, because sampling takes long."""

import dataclasses
import functools
from pathlib import Path

from rehyat_jax.data.pipeline import Source
from rehyat_jax.data.sources import JUDGES, Judge, make_judge
from rehyat_jax.errors import InputError
from rehyat_jax.evaluation.distribution import NAME as FEATURE_SPACE
from rehyat_jax.evaluation.draws import Examples, read_examples
from rehyat_jax.evaluation.options import EvaluationOptions
from rehyat_jax.evaluation.pair import STUDENT, Side
from rehyat_jax.evaluation.results import Evaluation
from rehyat_jax.evaluation.samples import SampleSet, read_about
from rehyat_jax.evaluation.videos import DATA, Decoder, compare_videos, save_samples
from rehyat_jax.files.shown import shown
from rehyat_jax.generation.codecs import LATENT_SIZES
from rehyat_jax.generation.options import SamplingOptions
from rehyat_jax.generation.pipeline import Pipeline
from rehyat_jax.generation.text_encoders import read_prompts
from rehyat_jax.weights.streamed import SAMPLING

SAMPLES, PICTURE = "samples", "samples.png"
"""The folder of kept samples and their picture, in the folder of an evaluation."""


class Sampler:
    """The samples of both models: opened and checked first, sampled and compared later.

    Use `open`.
    """

    def __init__(
        self,
        pipelines: dict[str, Pipeline],
        sets: dict[str, SampleSet],
        prompts: list[str],
        judge: Judge | None,
        examples: Examples,
        folder: Path | None,
    ):
        self._pipelines, self._sets, self._prompts, self._judge = pipelines, sets, prompts, judge
        self._examples, self._folder = examples, folder

    @classmethod
    def open(cls, sides: dict[str, Side], options: EvaluationOptions, source: Source, folder: Path | None) -> "Sampler":
        """Raises InputError: see `evaluate_models`."""
        # As many real videos as samples.
        examples = read_examples(source, options.samples, options.sampling.seed)
        sampling = _of_data_size(options.sampling, sides[STUDENT].metadata["codec"], examples.latents.shape[1:])
        of_side = functools.partial(_of_side, sampling, student_steps=options.student_steps)
        pipelines = {
            name: Pipeline.from_pretrained(options.models, of_side(name, side), student=side.path)
            for name, side in sides.items()
        }
        judge = _open_judge(options)
        prompts = _prompts(options, judge)
        if judge is not None:
            _check_judge(judge, prompts, pipelines[STUDENT])
        asked = [prompts[number % len(prompts)] for number in range(options.samples)]
        sets = {
            name: SampleSet(pipelines[name], asked, side.fingerprint, folder and folder / SAMPLES / name)
            for name, side in sides.items()
        }
        return cls(pipelines, sets, asked, judge, examples, folder)

    def compare(self, *, progress: bool) -> Evaluation:
        """Samples what is missing, and compares. Raises InputError if samples are not finite."""
        pipeline = self._pipelines[STUDENT]
        latents = {name: found.latents(name, progress=progress) for name, found in self._sets.items()}
        decoder = Decoder(pipeline, self._judge, progress=progress)
        measures, kept = decoder.samples(latents, self._prompts)
        # The clean latents of trajectories are unknown. Videos of another size would differ by that alone.
        if self._examples.timestep is None and self._examples.latents.shape[1:] == pipeline.latent_shape:
            measures[DATA] = decoder.data(self._examples.latents)
        pipeline.free("VAE")
        if self._folder is not None:
            save_samples(self._folder / PICTURE, kept, self._prompts)
        found = compare_videos(
            measures,
            self._prompts,
            time_factor=pipeline.time_factor,
            chunk_frames=pipeline.config.block_forms.chunk_frames,
        )
        found.about["sampling"] = read_about(pipeline) | {"seed": pipeline.options.seed}
        found.about["prompts"] = len(set(self._prompts))
        found.about["feature_space"] = FEATURE_SPACE
        return found


def _of_side(sampling: SamplingOptions, name: str, side: Side, *, student_steps: int | None) -> SamplingOptions:
    """The options of a side's samples.

    The order and the approximations are the student's, and a model of few steps has its own solver.
    """
    if SAMPLING in side.metadata:
        sampling = dataclasses.replace(sampling, steps=None, guidance_scale=None, flow_shift=None, sampler=None)
    if name != STUDENT:
        return dataclasses.replace(sampling, order=None, quantize=None, exact=(), guidance_every=1, step_cache=None)
    return dataclasses.replace(sampling, steps=student_steps or sampling.steps)


def _of_data_size(sampling: SamplingOptions, codec: str, shape: tuple[int, ...]) -> SamplingOptions:
    """The options with the size of the data's videos where they have none."""
    sizes = LATENT_SIZES[codec]
    latents = sizes.latent_shape(*sizes.default_size)
    # Frames of a latent frame after the first one, and the side of a latent pixel.
    time_factor = (sizes.default_size[0] - 1) // (latents[0] - 1)
    side = sizes.default_size[1] // latents[1]
    return dataclasses.replace(
        sampling,
        frames=sampling.frames or (shape[0] - 1) * time_factor + 1,
        height=sampling.height or shape[1] * side,
        width=sampling.width or shape[2] * side,
    )


def _open_judge(options: EvaluationOptions) -> Judge | None:
    name = options.judge
    if name is None:
        name = options.data if options.data in JUDGES else "none"
    if name == "none":
        return None
    if name not in JUDGES:
        raise InputError(f'--judge {name}: expected one of {", ".join(JUDGES)} or "none"; nobody judges other videos')
    return make_judge(name)


def _prompts(options: EvaluationOptions, judge: Judge | None) -> list[str]:
    if options.prompts is not None:
        return read_prompts(options.prompts)
    if judge is None:
        raise InputError("--samples: expected --prompts FILE, because there is no judge who knows prompts; give it")
    return list(judge.prompts)


def _check_judge(judge: Judge, prompts: list[str], pipeline: Pipeline) -> None:
    if unknown := [prompt for prompt in prompts if prompt not in judge.prompts]:
        raise InputError(
            f"--prompts: expected prompts that the judge knows, such as {judge.prompts[0]!r}, found "
            f"{shown(unknown[0])!r}; correct it, or give --judge none"
        )
    size = pipeline.options.height, pipeline.options.width
    if size != judge.frame_size:
        raise InputError(
            f"--size {size[0]}x{size[1]}: expected {judge.frame_size[0]}x{judge.frame_size[1]}, which the judge reads; "
            f"sample that size, or give --judge none"
        )
