"""Section "demo": `make demo` on this device, with the demo's own bounds for its metrics."""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import ml_collections

from rehyat_jax.benchmarks.gpu_run.cases import read_config
from rehyat_jax.benchmarks.gpu_run.sections import Row, Sizes
from rehyat_jax.demo import measure
from rehyat_jax.demo.report import expectations, report
from rehyat_jax.files import packaged
from rehyat_jax.train import train
from rehyat_jax.weights import load_wan
from rehyat_jax.weights.conversion import convert_from_torch, convert_to_torch

TEACHER = packaged.FOLDER / packaged.ASSETS / "demo_teacher"


def rows(sizes: Sizes) -> Iterator[Row]:
    """Rows with the seconds of each part when it is done, then the metrics, then the demo's bounds."""
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder)
        convert_from_torch(TEACHER, runs / "teacher")
        trainings = {
            "distill": _config("distill", runs / "teacher", sizes.demo_steps),
            "finetune": _config("finetune", runs / "distill" / "model", sizes.demo_steps),
        }
        if sizes.demo_samples:
            trainings["distill_bidirectional"] = _config("distill", runs / "teacher", sizes.demo_steps)
            trainings["distill_bidirectional"].hybrid.causal = False
        for name, config in trainings.items():
            started = time.perf_counter()
            train(config, runs / name)
            yield {"part": name, "steps": config.steps, "seconds": time.perf_counter() - started}
        started = time.perf_counter()
        if sizes.demo_samples:
            convert_to_torch(runs / "finetune" / "model", runs / "student_pytorch", "diffusers")
            metrics = report(runs)
            bounds = expectations(metrics)
        else:
            metrics, bounds = _without_samples(runs), []
        yield {"part": "measurement", "seconds": time.perf_counter() - started}
        yield {"metrics": metrics}
        for claim, figure, bound, holds in bounds:
            yield {"claim": claim, "figure": float(figure), "bound": bound, "right": bool(holds)}


def _config(stage: str, init_from: Path, steps: int | None) -> ml_collections.ConfigDict:
    config = read_config(f"demo_{stage}.py")
    config.init_from = str(init_from)
    if steps is not None:
        config.steps, config.optimizer.warmup_steps, config.batch_size = steps, 1, 2
    return config


def _without_samples(runs: Path) -> dict[str, float]:
    """The metrics that need no videos."""
    config = _config("distill", runs / "teacher", None)
    teacher, student = load_wan(runs / "teacher"), load_wan(runs / "distill" / "model")
    return {
        "attention_error_distilled": float(measure.block_errors(student, config, count=1)["hybrid"].mean()),
        "velocity_error_distilled": measure.velocity_error(student, teacher, config, count=1),
    }
