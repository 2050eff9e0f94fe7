"""Hybrid and full attention on a CPU as videos grow: python -m rehyat_jax.benchmarks.cpu [--json FILE] [--plot FILE].

Times forward and forward + backward of the hybrid attention's implementations, of hybrid attention in PyTorch, and of
full attention in PyTorch. All run in one process (medians, float32), and another process measures their peak memory. An
attention is skipped at lengths where it would be too slow or too large.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache
from matplotlib.figure import Figure

from rehyat_jax.attention import FeatureMapConfig
from rehyat_jax.benchmarks.cpu_attention import (
    ATTENTIONS,
    BACKWARD,
    CHUNK_FRAMES,
    FORWARD,
    OVERLAP_FRAMES,
    Run,
    Shape,
    prepare,
)
from rehyat_jax.benchmarks.environment import describe_environment
from rehyat_jax.benchmarks.peak_memory import measuring_process, peak_bytes
from rehyat_jax.cli import CommandParser, report_input_errors
from rehyat_jax.errors import InputError
from rehyat_jax.extras import check_installed
from rehyat_jax.files.write import written_whole

DIRECTIONS = (FORWARD, BACKWARD)


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One attention at one length. Peak memory is the memory of a call without its inputs, but with its results."""

    attention: str
    direction: str
    frames: int
    tokens: int
    seconds: float
    peak_bytes: int


def median_seconds(run: Run, *, total: float = 1.0, most: int = 20) -> float:
    """The median time of at least three calls, repeated for about `total` seconds; the first call does not count."""
    run()
    seconds = []
    while len(seconds) < 3 or (sum(seconds) < total and len(seconds) < most):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def measured_peak_bytes(attention: str, shape: Shape, direction: str) -> int:
    """Peak memory of one call; runs in the measuring process."""
    run = prepare(attention, shape, direction)
    run()  # excludes memory that only a first call allocates
    return peak_bytes(run)


def measure(
    attentions: list[str],
    shapes: list[Shape],
    measure_peak: Callable[[str, Shape, str], int],
    *,
    max_seconds: float,
    max_bytes: float,
) -> Iterator[Measurement]:
    """Measures all attentions in both directions, shortest videos first.

    An attention is skipped at a length where it would exceed a maximum if its time or memory grew quadratically.
    """
    last: dict[tuple[str, str], Measurement] = {}
    for shape, attention, direction in itertools.product(shapes, attentions, DIRECTIONS):
        if point := last.get((attention, direction)):
            growth = (shape.frames / point.frames) ** 2
            if growth * point.seconds > max_seconds or growth * point.peak_bytes > max_bytes:
                continue
        run = prepare(attention, shape, direction)
        if run is None:
            continue
        peak = measure_peak(attention, shape, direction)
        point = Measurement(attention, direction, shape.frames, shape.array[1], median_seconds(run), peak)
        last[attention, direction] = point
        yield point


def table(points: list[Measurement]) -> str:
    """A markdown table with a row for every attention at every length, and "-" where it was not run."""
    found = {(point.frames, point.attention, point.direction): point for point in points}
    lines = [
        "| frames | tokens | attention | forward, ms | and backward, ms | forward, MiB | and backward, MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for frames, tokens in sorted({(point.frames, point.tokens) for point in points}):
        for attention in ATTENTIONS:
            both = [found.get((frames, attention, direction)) for direction in DIRECTIONS]
            if any(both):
                milliseconds = [f"{1000 * point.seconds:.3g}" if point else "-" for point in both]
                mebibytes = [f"{point.peak_bytes / 2**20:.0f}" if point else "-" for point in both]
                cells = [str(frames), str(tokens), attention, *milliseconds, *mebibytes]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def growth_table(points: list[Measurement]) -> str:
    """A markdown table of the exponent e of (frames)^e between the last two lengths of every curve; 1 is linear."""
    lines = ["| growth between the last two lengths | time | peak memory |", "|---|---|---|"]
    for attention, direction in itertools.product(ATTENTIONS, DIRECTIONS):
        curve = [point for point in points if (point.attention, point.direction) == (attention, direction)]
        if len(curve) > 1:
            before, after = curve[-2:]
            exponent = lambda new, old, before=before, after=after: (
                math.log(max(new, 1e-9) / max(old, 1e-9)) / math.log(after.frames / before.frames)
            )
            time_growth = exponent(after.seconds, before.seconds)
            memory_growth = exponent(after.peak_bytes, before.peak_bytes)
            cells = [
                f"{attention}, {direction}, {before.frames} to {after.frames} frames",
                f"{time_growth:.2f}",
                f"{memory_growth:.2f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def save_plot(path: Path, points: list[Measurement]) -> None:
    """Writes a PNG of time and peak memory against frames, with a row for each direction."""
    figure = Figure(figsize=(9, 6.5), layout="constrained", dpi=100)
    for row, direction in zip(figure.subplots(2, 2, sharex=True), DIRECTIONS, strict=True):
        quantities = (
            ("seconds", lambda point: point.seconds),
            ("peak memory besides inputs, MiB", lambda point: point.peak_bytes / 2**20),
        )
        for axes, (label, quantity) in zip(row, quantities, strict=True):
            for index, attention in enumerate(ATTENTIONS):
                curve = [point for point in points if (point.attention, point.direction) == (attention, direction)]
                style = "--" if attention.startswith("full") else "-"
                x, y = [point.frames for point in curve], [quantity(point) for point in curve]
                axes.plot(x, y, style, marker="o", markersize=3, color=f"C{index}", label=attention if curve else None)
            axes.set(title=direction, xlabel="latent frames", ylabel=label, xscale="log", yscale="log")
            frames = sorted({point.frames for point in points})
            axes.set_xticks(frames, labels=map(str, frames))
            axes.minorticks_off()
            axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=7)
    with written_whole(path) as temporary:
        figure.savefig(temporary, format="png")


def keep_compiled_programs(folder: str | None, least_seconds: float = 0.0) -> None:
    """Makes XLA store programs that took so long to compile in `folder`, and read them from there; None ends this."""
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least_seconds)
    compilation_cache.reset_cache()  # otherwise an earlier setting would stay


@contextlib.contextmanager
def shared_programs() -> Iterator[str]:
    """A temporary folder through which processes share compiled programs, because they compile the same ones."""
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    with tempfile.TemporaryDirectory(prefix="programs-") as folder:
        keep_compiled_programs(folder)
        try:
            yield folder
        finally:
            keep_compiled_programs(*before)


def run(arguments: argparse.Namespace) -> None:
    sizes = {name: getattr(arguments, name) for name in ("batch", "tokens_per_frame", "heads", "head_dim")}
    for name, value in (*sizes.items(), ("frames", min(arguments.frames))):
        if value < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, found {value}")
    shapes = [Shape(frames=frames, **sizes) for frames in sorted(set(arguments.frames))]
    check_installed("the comparison with PyTorch", "torch", "diffusers")
    import torch

    environment = f"{describe_environment()}, torch {torch.__version__} ({torch.get_num_threads()} threads)"

    points = []
    with shared_programs() as folder, measuring_process(functools.partial(keep_compiled_programs, folder)) as process:
        for point in measure(
            arguments.attentions,
            shapes,
            lambda *call: process.submit(measured_peak_bytes, *call).result(),
            max_seconds=arguments.max_seconds,
            max_bytes=arguments.max_gib * 2**30,
        ):
            points.append(point)
            print(f"{point.frames} frames, {point.attention}, {point.direction}", file=sys.stderr)

    form = f"Tc={CHUNK_FRAMES}, To={OVERLAP_FRAMES}, {FeatureMapConfig().features} features, float32"
    print(
        f"{sizes['batch']} x frames x {sizes['tokens_per_frame']} tokens, {sizes['heads']} heads x "
        f"{sizes['head_dim']}, {form}; {environment}. Memory is by how much the resident size of a process of its own "
        f"rises during a call: inputs are not in it, results are.\n\n{table(points)}\n\n{growth_table(points)}"
    )
    if arguments.json:
        rows = [dataclasses.asdict(point) for point in points]
        report = {"environment": environment, **sizes, "form": form, "measurements": rows}
        with written_whole(arguments.json) as temporary:
            temporary.write_text(json.dumps(report, indent=2))
    if arguments.plot:
        save_plot(arguments.plot, points)


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark and prints its tables."""
    parser = CommandParser("benchmarks.cpu", __doc__, "--frames 21 42 --json cpu.json")
    parser.add_argument("--frames", type=int, nargs="+", default=[21, 42, 84, 168, 336], help="latent frames")
    parser.add_argument(
        "--attentions",
        nargs="+",
        choices=list(ATTENTIONS),
        default=list(ATTENTIONS),
        metavar="NAME",
        help=f"which to compare, by default all: {'; '.join(ATTENTIONS)}",
    )
    parser.add_argument("--tokens-per-frame", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--max-seconds", type=float, default=3.0, help="longest call to expect of a curve's next point")
    parser.add_argument("--max-gib", type=float, default=4.0, help="most memory to expect of a curve's next point")
    parser.add_argument("--json", type=Path, help="also write the measurements to this file")
    parser.add_argument("--plot", type=Path, help="also draw time and memory against frames to this PNG")
    arguments = parser.parse_args(argv)
    return report_input_errors(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
