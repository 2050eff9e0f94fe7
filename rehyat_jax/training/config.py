"""Every field of a training configuration, with its default."""

import dataclasses
import difflib
import math
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
from flax import traverse_util

from rehyat_jax.attention.form import HybridConfig
from rehyat_jax.attention.hybrid.backend import IMPLEMENTATIONS
from rehyat_jax.data.sources import SOURCES
from rehyat_jax.errors import InputError
from rehyat_jax.files.json_files import read_json_object
from rehyat_jax.files.write import reported_write_errors, written_whole
from rehyat_jax.models.wan.config import WAN_PRESETS
from rehyat_jax.models.wan.modeling import REMAT_POLICIES
from rehyat_jax.training.stages import STAGES

CHOICES = {
    "stage": tuple(STAGES),
    "preset": tuple(WAN_PRESETS),
    "data.source": tuple(SOURCES),
    "data.corrupt": ("error", "skip"),
    "dtype": ("float32", "bfloat16"),
    "remat": tuple(REMAT_POLICIES),
    "optimizer.name": ("adamw", "muon"),
    "optimizer.decay": ("cosine", "linear", "constant"),
    "timestep_sampling": ("logit_normal", "uniform"),
    "attention_implementation": ("", *IMPLEMENTATIONS),
}
"""Allowed values of the fields that take names."""


class Range(NamedTuple):
    """Allowed values of a number: finite, at least `low`, at most `high`. The ends may be left out.

    Attributes:
      above, below: whether `low` or `high` itself is left out.
    """

    low: float
    high: float = math.inf
    above: bool = False
    below: bool = False

    def __contains__(self, value: float) -> bool:
        inside = (value > self.low if self.above else value >= self.low) and (
            value < self.high if self.below else value <= self.high
        )
        return inside and math.isfinite(value)

    def __str__(self) -> str:
        low = f"{'more than' if self.above else 'at least'} {self.low}"
        if self.high == math.inf:
            return f"{low} and finite"
        return f"{low} and {'less than' if self.below else 'at most'} {self.high}"


_LARGEST = 2**31 - 1

RANGES = {
    "seed": Range(0, _LARGEST),
    "hybrid.chunk_frames": Range(1, 10**6),
    "hybrid.overlap_frames": Range(0, 10**6),
    "hybrid.feature_map.features": Range(1, 2**16),
    "hybrid.feature_map.num_layers": Range(1, 100),
    "hybrid.feature_map.degree": Range(1, 100),
    "data.workers": Range(0, 1000),
    "steps": Range(1, _LARGEST),
    "batch_size": Range(1, 2**24),
    "accumulation_steps": Range(1, 2**24),
    "optimizer.learning_rate": Range(0),
    "optimizer.muon_learning_rate": Range(0),
    "optimizer.warmup_steps": Range(0, _LARGEST),
    "optimizer.weight_decay": Range(0),
    "optimizer.clip_norm": Range(0),
    "ema_decay": Range(0, 1, below=True),
    "flow_shift": Range(0, 1e6, above=True),
    "caption_dropout": Range(0, 1),
    "mesh.data": Range(-1, 2**24),
    "mesh.fsdp": Range(-1, 2**24),
    "mesh.context": Range(-1, 2**24),
    "mesh.tensor": Range(-1, 2**24),
    "spike_factor": Range(0),
    "max_skipped": Range(1, _LARGEST),
    "log_every": Range(1, _LARGEST),
    "checkpoint_every": Range(1, _LARGEST),
    "keep_checkpoints": Range(1, _LARGEST),
    "keep_every": Range(0, _LARGEST),
    "keep_best": Range(0, _LARGEST),
}
"""Allowed values of all fields that are numbers."""


def default_config() -> ml_collections.ConfigDict:
    """Defaults shared by all stages; a file in `configs/` changes the fields of its experiment.

    The result is locked. An unknown field, in a file or on the command line, is an error that names the closest field.
    """
    config = ml_collections.ConfigDict()
    # "pretrain" (softmax, from scratch), "distill" (stage 1: feature maps only) or "finetune" (stage 2: everything).
    config.stage = "finetune"
    # Size of a model trained from scratch, a key of WAN_PRESETS. `plan` assumes this size for an `init_from` that does
    # not exist.
    config.preset = "tiny"
    # Model to start from: a PyTorch folder in either layout, or a model checkpoint.
    config.init_from = ""
    config.seed = 0

    # The blocks that become hybrid ("all" or indices), and their form. If unset, the model keeps its attention. For a
    # hybrid model, some of its hybrid blocks may be given; the others become softmax. `HybridConfig` has the fields.
    config.hybrid = ml_collections.ConfigDict(dataclasses.asdict(HybridConfig()))
    config.hybrid.blocks = ml_collections.config_dict.placeholder(object)
    # Other forms in other blocks: dictionaries with "blocks" and the fields that differ from config.hybrid, such as
    # ({"blocks": (0, 1), "chunk_frames": 6}, {"blocks": (29,), "kind": "softmax"}). They override blocks = "all".
    config.forms = ()

    config.data = ml_collections.ConfigDict()
    # "digits", or "prepared" for a folder at `path` that `rehyat_jax.prepare` wrote.
    config.data.source = "digits"
    config.data.path = ""
    config.data.workers = 0
    # A record that cannot be read: "error" stops the run, "skip" takes the next one in its place.
    config.data.corrupt = "error"
    # Relative number of batches of each shape in the folder, in the order of dataset.json; () follows the number of
    # examples.
    config.data.weights = ()

    config.steps = 1000
    # Examples per update, split into `accumulation_steps` equal parts that run one after another.
    config.batch_size = 16
    config.accumulation_steps = 1
    # Compute dtype; parameters, optimizer state and EMA are always float32.
    config.dtype = "bfloat16"
    config.remat = "none"
    config.attention_implementation = ""  # "" picks the best for the platform

    config.optimizer = ml_collections.ConfigDict()
    # "adamw", or "muon" for the blocks' matrices with AdamW on the rest.
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 1e-5
    config.optimizer.muon_learning_rate = 0.02
    config.optimizer.warmup_steps = 100
    config.optimizer.decay = "cosine"  # after the warmup: "cosine" or "linear" to zero, or "constant"
    config.optimizer.weight_decay = 0.01
    config.optimizer.clip_norm = 1.0  # global gradient norm; 0 does not clip

    config.ema_decay = 0.99  # 0 keeps no average
    config.flow_shift = 5.0
    config.timestep_sampling = "logit_normal"  # or "uniform"
    config.caption_dropout = 0.1

    # Devices along each axis (`parallel.mesh.AXES`); -1 takes all remaining devices.
    config.mesh = ml_collections.ConfigDict({"data": 1, "fsdp": -1, "context": 1, "tensor": 1})

    # An update is skipped if its gradient norm is not finite, or more than `spike_factor` times the norm's running mean
    # (0: only if it is not finite). The run ends after `max_skipped` skipped updates in a row.
    config.spike_factor = 10.0
    config.max_skipped = 10

    config.log_every = 10
    # Evaluators, such as ({"type": "attention_error", "every": 500},); see `evaluation.evaluators`.
    config.evals = ()
    config.checkpoint_every = 500
    # Checkpoints that are kept: the newest `keep_checkpoints`; those of steps that are multiples of `keep_every` (0:
    # none for that); and the `keep_best` with the lowest mean of the losses logged before them.
    config.keep_checkpoints = 2
    config.keep_every = 0
    config.keep_best = 0
    config.checkpoint_dir = ""  # instead of `checkpoints` in the workdir; it may be in an object store, as gs://...
    return config.lock()


def check_config(config: ml_collections.ConfigDict) -> None:
    """Raises InputError, naming the field, unless the values are valid together."""
    flat = lambda config: traverse_util.flatten_dict(config.to_dict(), sep=".")
    if missing := sorted(flat(default_config()).keys() - flat(config).keys()):
        group = missing[0].rpartition(".")[0]
        raise InputError(f"config.{missing[0]} is missing; give config.{group or missing[0]}'s fields one by one")
    fields = {path: _lookup(config, path) for path in CHOICES}
    for path, value in fields.items():
        if value not in CHOICES[path]:
            nearest = difflib.get_close_matches(str(value), CHOICES[path], n=1, cutoff=0)[0]
            raise InputError(
                f"config.{path} must be one of {CHOICES[path]}, found {value!r}; did you mean {nearest!r}?"
            )
    for path, allowed in RANGES.items():
        if _lookup(config, path) not in allowed:
            raise InputError(f"config.{path} must be {allowed}, found {_lookup(config, path)}")
    if not all(type(weight) in (int, float) and weight in Range(0) for weight in config.data.weights):
        raise InputError(f"config.data.weights must be numbers of {Range(0)}, found {tuple(config.data.weights)}")
    if config.batch_size % config.accumulation_steps:
        raise InputError(
            f"config.batch_size ({config.batch_size}) must be a multiple of config.accumulation_steps "
            f"({config.accumulation_steps})"
        )
    if config.optimizer.warmup_steps >= config.steps:
        raise InputError(
            f"config.optimizer.warmup_steps ({config.optimizer.warmup_steps}) must be less than config.steps "
            f"({config.steps}); lower it"
        )
    stage = STAGES[config.stage]
    if stage.starts_from_model and not config.init_from:
        raise InputError(f"config.init_from is empty; stage {config.stage!r} starts from a model: give its path")
    if stage.is_of_hybrid_blocks and not config.hybrid.blocks and not config.forms:
        raise InputError(
            f'config.hybrid.blocks is unset; stage "{config.stage}" needs the blocks to convert: "all" or indices'
        )


def save_config(config: ml_collections.ConfigDict, workdir: Path) -> None:
    """Writes `workdir/config.json`."""
    path = workdir / "config.json"
    with reported_write_errors(path), written_whole(path) as temporary:
        temporary.write_text(config.to_json(indent=2) + "\n")


def load_config(workdir: Path) -> ml_collections.ConfigDict:
    """The configuration of the run in `workdir`. Raises InputError if there is none, or a damaged one."""
    path = workdir / "config.json"
    if not path.exists():
        raise InputError(f"{path}: expected the configuration of a training run, found no file; check the folder")
    fields = read_json_object(path)
    try:
        return config_from_json(fields)
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise InputError(
            f"{path}: expected the fields of a configuration, found {str(error)[:200]}; correct it, or "
            f"start the run again"
        ) from error


def config_from_json(fields: dict[str, Any]) -> ml_collections.ConfigDict:
    """The configuration that `ConfigDict.to_json` wrote."""
    config = default_config()
    config.update(fields)
    return config


def _lookup(config: ml_collections.ConfigDict, path: str):
    for name in path.split("."):
        config = config[name]
    return config
