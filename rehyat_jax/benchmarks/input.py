"""Throughput of the training input, compared with the need of training: python -m rehyat_jax.benchmarks.input.

Writes prepared examples of two shapes, the demo's and Wan2.1 1.3B's at 480x832 and 81 frames. Reads them like one host
of a run, with several numbers of workers, and prints a markdown table. It needs 2.5 GB of disk and of memory. Files
just written are read from memory, so the figures do not include a slow disk.
"""

import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from rehyat_jax.benchmarks.environment import describe_environment
from rehyat_jax.cli import CommandParser
from rehyat_jax.data.pipeline import batches
from rehyat_jax.data.prepared import PreparedExamples
from rehyat_jax.preparation.units import STORED, Hosts, Plan, UnitWriter, prepare


class Case(NamedTuple):
    """A kind of run.

    Attributes:
      latents, text: shapes of an example.
      examples: number of examples in the data set.
      batch: number of examples that one host reads for a step.
      step: duration of a step in seconds.
      told: description of the run.
    """

    latents: tuple[int, ...]
    text: tuple[int, int]
    examples: int
    batch: int
    step: float
    told: str


CASES = {
    "demo": Case((21, 6, 6, 16), (8, 64), 2048, 6, 0.18, "the demo's distillation, measured on two cores"),
    "1.3B": Case(
        (21, 60, 104, 16), (512, 4096), 48, 8, 2.04, "1.3B's distillation on v5e-16, planned, a host of 8 chips"
    ),
}


def write_examples(folder: Path, case: Case, dtype: str) -> None:
    """Fills a folder with different examples whose text has the full length."""
    rng = np.random.default_rng(0)
    draw = lambda shape: rng.standard_normal(shape, np.float32).astype(STORED[dtype])
    latents, text = draw(case.latents), draw(case.text)

    def fill(writer: UnitWriter, numbers: range, progress: tqdm) -> None:
        for number in numbers:
            writer.add({"latents": np.roll(latents, number), "text": text}, {"name": str(number), "caption": ""})
            progress.update()

    # With a codec that cannot decode, the contact sheet is skipped.
    plan = Plan("examples", "wan_vae", "umt5", {}, list(range(case.examples)), 64)
    prepare(folder, plan, fill, lambda: np.zeros(case.text, np.float32), Hosts(), item="example")


def examples_per_second(folder: Path, batch: int, workers: int, seconds: float) -> float:
    """Throughput of only the loader, measured after its workers have started and their first batches are consumed."""
    data = batches(PreparedExamples(folder), batch_size=batch, seed=0, workers=workers)
    for _ in range(4 + 6 * workers):
        next(data)
    start, count = time.monotonic(), 0
    while time.monotonic() - start < seconds:
        next(data)
        count += batch
    elapsed = time.monotonic() - start
    data.close()
    return count / elapsed


def benchmark(folder: Path, workers: list[int], seconds: float) -> str:
    """Measures with files inside an existing folder; returns the table."""
    lines = [
        f"{describe_environment()}, grain {version('grain')}, array_record {version('array_record')}. MB are of the "
        f"float32 that training gets.",
        "",
        "| run | stored as | workers | examples/s | MB/s | times what it takes |",
        "|---|---|---|---|---|---|",
    ]
    for name, case in CASES.items():
        megabytes = 4e-6 * (np.prod(case.latents) + np.prod(case.text))
        for dtype in ("float32", "bfloat16"):
            data = folder / f"{name}-{dtype}"
            write_examples(data, case, dtype)
            for count in workers:
                rate = examples_per_second(data, case.batch, count, seconds)
                times = rate / (case.batch / case.step)
                lines.append(f"| {name} | {dtype} | {count} | {rate:.1f} | {rate * megabytes:.0f} | {times:.1f} |")
    for name, case in CASES.items():
        lines += ["", f"{name} takes {case.batch / case.step:.1f} examples/s: {case.told}."]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark and prints its table."""
    parser = CommandParser("benchmarks.input", __doc__, "--workers 0 2 --seconds 10")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="numbers of worker processes")
    parser.add_argument("--seconds", type=float, default=10, help="of each measurement")
    parser.add_argument("--workdir", type=Path, help="where to put the files meanwhile; default: the system's /tmp")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=arguments.workdir, prefix="input-") as folder:
        print(benchmark(Path(folder), arguments.workers, arguments.seconds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
