"""The training runs that led to a model, from the records in their directories."""

from pathlib import Path

import ml_collections

from rehyat_jax.errors import InputError
from rehyat_jax.training.config import load_config
from rehyat_jax.training.metrics import METRICS_FILE
from rehyat_jax.training.stages import STAGES


def training_runs(checkpoint: Path) -> list[ml_collections.ConfigDict]:
    """The configurations of the runs that led to a model checkpoint, the first one first.

    A run's result is `model/` in its directory, next to its `config.json` and `metrics.jsonl`. The run before it is
    that of its `init_from`. The list ends at a model without such records; it is empty if the checkpoint has none.

    Raises:
      InputError: a run's `config.json` is damaged.
    """
    runs: list[ml_collections.ConfigDict] = []
    seen = set()
    while _is_result(checkpoint) and (workdir := checkpoint.resolve().parent) not in seen:
        seen.add(workdir)
        config = load_config(workdir)
        if config.stage not in STAGES:
            raise InputError(
                f"{workdir / 'config.json'}: stage should be one of {tuple(STAGES)}, found {config.stage!r}"
            )
        runs.insert(0, config)
        if not STAGES[runs[0].stage].starts_from_model:
            break
        checkpoint = Path(runs[0].init_from)
    return runs


def _is_result(checkpoint: Path) -> bool:
    workdir = checkpoint.parent
    return checkpoint.name == "model" and all((workdir / name).is_file() for name in ("config.json", METRICS_FILE))


def runs_table(runs: list[ml_collections.ConfigDict]) -> list[str]:
    """The lines of a markdown table with a row for each run."""
    lines = ["| stage | steps | batch | optimizer, highest learning rate | data | other |", "|---|---|---|---|---|---|"]
    for config in runs:
        rate = config.optimizer.learning_rate
        optimizer = f"{config.optimizer.name}, {rate:g}"
        if config.optimizer.name == "muon":
            optimizer += f"; Muon's {config.optimizer.muon_learning_rate:g}"
        # The folder's name alone: its path is that of a private machine.
        data = Path(config.data.path).name if config.data.path else config.data.source
        other = [f"seed {config.seed}"]
        if config.lora.rank:
            other.append(f"low-rank adapters of rank {config.lora.rank}")
        if weight := STAGES[config.stage].teacher_weight(config):
            other.append(f"weight {weight:g} of the teacher's velocity")
            if config.velocity.guidance_scale != 1:
                other.append(f"teacher's guidance scale {config.velocity.guidance_scale:g}")
        if config.noise_by_chunk:
            other.append("a noise level for every chunk")
        cells = (config.stage, config.steps, config.batch_size, optimizer, data, ", ".join(other))
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines
