"""The options of an evaluation."""

import dataclasses
from pathlib import Path

from rehyat_jax.data.pipeline import Source
from rehyat_jax.data.sources import SOURCES, make_held_out
from rehyat_jax.errors import InputError
from rehyat_jax.generation.options import SamplingOptions


@dataclasses.dataclass(frozen=True)
class EvaluationOptions:
    """What to measure.

    Attributes:
      data: a kind of data that needs no folder, such as "digits"; or a folder that `rehyat_jax.prepare` wrote, best of
        videos that were not used for training.
      examples: number of examples for velocities and attention, at least 2.
      levels: number of parts of the path from noise to data, see `evaluation.draws`.
      samples: number of videos that each model samples; 0 for none, otherwise at least 2.
      prompts: file with one prompt a line, which take turns; None for those of the judge.
      judge: kind of data whose judge reads the samples, None for that of `data`, "none" for none.
      models: pipeline with the VAE and the text encoder, see `Pipeline.from_pretrained`; only for samples.
      durations: lengths of videos for the cost, as multiples of the data's.
      topology: TPUs to compile for, see `evaluation.cost`; None does not compile.
      sampling: options of sampling. Its seed, batch, dtype, mesh and flow_shift hold for all measurements. Its order is
        the student's.
      student_steps: steps of the student's samples; None for those that it was made for, else for those of `sampling`.
    """

    data: str = "digits"
    examples: int = 64
    levels: int = 10
    samples: int = 0
    prompts: Path | None = None
    judge: str | None = None
    models: str | None = None
    durations: tuple[int, ...] = (1, 2, 4, 8)
    topology: str | None = None
    sampling: SamplingOptions = dataclasses.field(default_factory=SamplingOptions)
    student_steps: int | None = None


def open_examples(options: EvaluationOptions) -> Source:
    """The data of `options.data`. Raises InputError if they cannot be read."""
    if options.data in SOURCES and options.data != "prepared":
        return make_held_out(options.data, "", options.sampling.seed)
    return make_held_out("prepared", options.data, options.sampling.seed)


def check_counts(options: EvaluationOptions) -> None:
    if options.examples < 2:
        raise InputError(
            f"--examples {options.examples}: expected at least 2, because intervals need a spread; give more"
        )
    if options.samples == 1:
        raise InputError("--samples 1: expected 0, or at least 2, because intervals need a spread; give more")
