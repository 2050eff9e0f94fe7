"""PyTorch's implementations of hybrid attention: python -m rehyat_jax.benchmarks.torch_attention.

Times `hybrid_attention` of `rehyat_torch.py`, implementations "plain", "sdpa" and "flex", forward and with the backward
pass, for both stabilizers. The implementations take turns in one process. On a CPU, "flex" has no backward pass, and
another process measures the peak memory of a call. On a GPU, PyTorch's allocator counts it. Queries, keys, values and
features are random, and float32.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from rehyat_jax.benchmarks.cpu_attention import BACKWARD, CHUNK_FRAMES, FORWARD, OVERLAP_FRAMES, Shape
from rehyat_jax.benchmarks.environment import describe_environment
from rehyat_jax.benchmarks.peak_memory import measuring_process, peak_bytes
from rehyat_jax.cli import CommandParser, report_input_errors
from rehyat_jax.errors import InputError
from rehyat_jax.extras import check_installed

IMPLEMENTATIONS = ("plain", "sdpa", "flex")
STABILIZERS = ("row_max", "joint")
FEATURES = 256


def prepare(
    shape: Shape, implementation: str, stabilizer: str, direction: str, device: str = "cpu"
) -> Callable[[], Any]:
    """The attention as a call without arguments; with the backward pass, it gives the gradients of all five inputs."""
    import torch

    from rehyat_jax.pytorch.rehyat_torch import hybrid_attention

    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape.array, generator=generator) for _ in range(3)]
    inputs += [torch.rand((*shape.array[:-1], FEATURES), generator=generator) / FEATURES for _ in range(2)]
    cotangent = torch.randn(shape.array, generator=generator).to(device)
    inputs = [tensor.to(device).requires_grad_(direction == BACKWARD) for tensor in inputs]

    def run() -> Any:
        result = hybrid_attention(*inputs, **shape.form, stabilizer=stabilizer, implementation=implementation)
        if direction == BACKWARD:
            result = torch.autograd.grad(result, inputs, cotangent)
        if device == "cuda":
            torch.cuda.synchronize()
        return result

    return run


def measured_peak_bytes(*arguments: Any, device: str) -> int:
    """Peak memory of one call of `prepare`'s; runs in the measuring process."""
    run = prepare(*arguments, device)
    run()  # excludes memory that only a first call allocates
    if device == "cpu":
        return peak_bytes(run)
    import torch

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def alternating_medians(runs: list[Callable[[], Any]], rounds: int) -> list[float]:
    """The median seconds of each call, which take turns; the first round does not count."""
    seconds: list[list[float]] = [[] for _ in runs]
    for number in range(rounds + 1):
        for run, found in zip(runs, seconds, strict=True):
            start = time.perf_counter()
            run()
            if number:
                found.append(time.perf_counter() - start)
    return [statistics.median(found) for found in seconds]


def run(arguments: argparse.Namespace) -> None:
    """Measures and prints the table."""
    sizes = {name: getattr(arguments, name) for name in ("frames", "tokens_per_frame", "heads", "head_dim", "rounds")}
    for name, value in sizes.items():
        if value < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, found {value}")
    check_installed("the attention in PyTorch", "torch", "diffusers")
    import torch

    device = arguments.device
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch finds no GPU; install a build for CUDA, or leave --device out")
    rounds = sizes.pop("rounds")
    shape = Shape(batch=1, **sizes)
    hardware = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    columns = [*(f"{name}, s" for name in IMPLEMENTATIONS), *(f"{name}, MiB" for name in IMPLEMENTATIONS)]
    print(
        f"{shape.frames} frames x {shape.tokens_per_frame} tokens, {shape.heads} heads x {shape.head_dim}, "
        f"Tc={CHUNK_FRAMES}, To={OVERLAP_FRAMES}, {FEATURES} features, float32, medians of {rounds} calls; "
        f"{describe_environment()}, torch {torch.__version__} ({hardware})\n\n"
        f"| stabilizer | direction | {' | '.join(columns)} |\n{'|---' * (2 + len(columns))}|"
    )
    with measuring_process() as process:
        for stabilizer in STABILIZERS:
            for direction in (FORWARD, BACKWARD):
                names = [name for name in IMPLEMENTATIONS if (name, direction, device) != ("flex", BACKWARD, "cpu")]
                calls = [(shape, name, stabilizer, direction) for name in names]
                seconds = alternating_medians([prepare(*call, device) for call in calls], rounds)
                peaks = [process.submit(measured_peak_bytes, *call, device=device).result() / 2**20 for call in calls]
                missing = ["-"] * (len(IMPLEMENTATIONS) - len(names))
                cells = [*(f"{s:.3f}" for s in seconds), *missing, *(f"{peak:.0f}" for peak in peaks), *missing]
                print(f"| {stabilizer} | {direction} | {' | '.join(cells)} |", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark and prints its table."""
    parser = CommandParser("benchmarks.torch_attention", __doc__, "--frames 6 --tokens-per-frame 390")
    parser.add_argument("--frames", type=int, default=9, help="latent frames (default: %(default)s)")
    parser.add_argument("--tokens-per-frame", type=int, default=1560, help="default: %(default)s, Wan2.1 at 480p")
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="calls of each that count (default: %(default)s)")
    arguments = parser.parse_args(argv)
    return report_input_errors(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
