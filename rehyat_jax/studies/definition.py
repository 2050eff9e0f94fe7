"""The definition of a study: variants of training runs over several seeds, as a file of `configs/studies/` gives it."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_collections

from rehyat_jax.errors import InputError
from rehyat_jax.studies.measure import MEASURES
from rehyat_jax.studies.untrained import has_parameters_to_train
from rehyat_jax.training.command_line import call_in_file, override_options, read_config_file
from rehyat_jax.training.config import check_config, check_known
from rehyat_jax.training.stages import STAGES
from rehyat_jax.training.values import shown_value


@dataclasses.dataclass(frozen=True)
class TrainingStage:
    """One training run of every variant.

    Attributes:
      name: name of its folder.
      config: path of its configuration file.
      changes: fields that the study sets to other values than the file, for all variants; "optimizer.name" names a
        field of a group.
    """

    name: str
    config: str
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Variant:
    """One variant.

    Attributes:
      changes: fields of its first training stage with other values. Later stages take the model from the stage before,
        with its forms of attention.
      stages: names of the training stages that it runs; () runs all of them.
    """

    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    stages: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Trend:
    """Published scores of some of the variants, with whose order the study compares its own.

    Attributes:
      title: the score in words.
      scores: label of a variant -> its published score.
      lower_is_better: whether a lower score is better.
    """

    title: str
    scores: Mapping[str, float]
    lower_is_better: bool = False


@dataclasses.dataclass(frozen=True)
class Study:
    """Variants, each trained with every seed and then measured.

    Attributes:
      title: a few words.
      question: the question that the study answers.
      published: what papers report on it, with the source.
      stages: the training stages in their order. The first one of a variant starts from `teacher`.
      variants: label -> variant.
      measures: keys of `rehyat_jax.studies.measure.MEASURES`, for the last model of each run.
      headline: the figure by which variants are compared, a key of `METRICS`.
      trends: published scores.
      seeds: seeds of the training runs.
      teacher: the softmax model, in a PyTorch layout or as a model checkpoint.
      videos: number of videos of measure "samples", a multiple of 40.

    Raises:
      ValueError: a value is wrong, or two values contradict each other.
    """

    title: str
    question: str
    published: str
    stages: tuple[TrainingStage, ...]
    variants: Mapping[str, Variant]
    measures: tuple[str, ...]
    headline: str
    trends: tuple[Trend, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    teacher: str = "assets/demo_teacher"
    videos: int = 40

    def __post_init__(self) -> None:
        names = [stage.name for stage in self.stages]
        _expect(len(names) > 0 and len(set(names)) == len(names), "stages", "stages with different names", names)
        _expect(all(_is_name(name) for name in names), "stages", "names of letters, digits and _", names)
        _expect(len(self.variants) > 0, "variants", "at least one", dict(self.variants))
        folders = [folder_name(label) for label in self.variants]
        _expect("" not in folders and len(set(folders)) == len(folders), "variants", "labels that differ", folders)
        for label, variant in self.variants.items():
            order = tuple(name for name in names if name in variant.stages)
            _expect(
                variant.stages == order, f"variants[{label!r}].stages", f"some of {names}, in order", variant.stages
            )
        known = all(name in MEASURES for name in self.measures)
        _expect(known and len(self.measures) > 0, "measures", f"some of {list(MEASURES)}", self.measures)
        given = [name for measure in self.measures for name in MEASURES[measure].metrics]
        _expect(self.headline in given, "headline", f"one of {given}, which the measures give", self.headline)
        for trend in self.trends:
            _expect(set(trend.scores) <= set(self.variants), "trends", "labels of variants", sorted(trend.scores))
        different = len(set(self.seeds)) == len(self.seeds) > 0
        _expect(different and all(type(seed) is int and seed >= 0 for seed in self.seeds), "seeds", "seeds", self.seeds)
        _expect(self.videos > 0 and self.videos % 40 == 0, "videos", "a multiple of 40", self.videos)

    def stages_of(self, label: str) -> tuple[TrainingStage, ...]:
        """The training stages that a variant runs."""
        chosen = self.variants[label].stages
        return tuple(stage for stage in self.stages if not chosen or stage.name in chosen)

    def changes_of(self, label: str, stage: TrainingStage) -> dict[str, Any]:
        """The fields of a variant's stage that differ from its file, without its seed and the model it starts from."""
        first = self.stages_of(label)[0]
        return {**stage.changes, **(self.variants[label].changes if stage == first else {})}


def _expect(holds: bool, field: str, expected: str, found: Any) -> None:
    if not holds:
        raise ValueError(f"{field}: expected {expected}, found {shown_value(found)}")


def _is_name(name: str) -> bool:
    return re.fullmatch(r"\w+", name) is not None


def folder_name(label: str) -> str:
    """The name of a variant's folder: the letters and digits of its label."""
    return re.sub(r"\W+", "_", label.lower()).strip("_")


def read_study(file: Path) -> Study:
    """Runs a study's file, and checks the configuration of every training run.

    Raises:
      InputError: the file or one of its configurations cannot be read, or a field is wrong. The message has the place.
    """
    study = call_in_file(str(file), "get_study", Study, "a function get_study that returns a Study")
    frozen = [name for name in study.measures if MEASURES[name].needs_frozen_teacher]
    for label in study.variants:
        configs = [stage_config(file, study, label, stage) for stage in study.stages_of(label)]
        if frozen and any(not _trains_maps_alone(config) for config in configs):
            raise InputError(
                f"{file}: measure {frozen[0]!r} needs the teacher's parameters next to the feature maps, but variant "
                f"{label!r} trains others; measure 'velocity_error' or 'samples'"
            )
    return study


def _trains_maps_alone(config: ml_collections.ConfigDict) -> bool:
    return STAGES[config.stage].trains == "feature_maps" and not config.lora.rank


def stage_config(file: Path, study: Study, label: str, stage: TrainingStage) -> ml_collections.ConfigDict:
    """The configuration of a variant's stage, with the study's teacher as the model that it starts from.

    Raises:
      InputError: the configuration's file or the teacher cannot be read, or a changed field is unknown or has a wrong
        value.
    """
    place = f"{file}: variant {label!r}, stage {stage.name!r}"
    config = read_config_file(stage.config)
    changes = study.changes_of(label, stage)
    try:
        check_known(changes)
        config.update_from_flattened_dict({**changes, "init_from": study.teacher})
        check_config(config)
        has_parameters_to_train(config)  # the teacher has the blocks that the forms name
    except (InputError, TypeError, ValueError, AttributeError, KeyError) as error:
        raise InputError(f"{place}: {error}") from error
    return config


def train_options(study: Study, label: str, stage: TrainingStage, seed: int, init_from: Path | str) -> list[str]:
    """The options of `rehyat_jax.train` for one run, except its workdir."""
    changes = {**study.changes_of(label, stage), "init_from": str(init_from), "seed": seed}
    return override_options(stage.config, changes)
