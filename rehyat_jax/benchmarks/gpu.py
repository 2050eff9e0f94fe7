"""Hybrid against full softmax attention on one NVIDIA GPU: python -m rehyat_jax.benchmarks.gpu [--json FILE].

First compares outputs and gradients on this GPU with the float64 reference, then times forward and forward + backward
in bfloat16 at the sizes of Wan2.1 (12 heads: 1.3B, 40 heads: 14B; 1560 tokens a frame are 480 x 832 pixels), Tc = 3,
To = 1, 256 features. Features are given: what it takes to make them is a row of its own. Prints markdown tables; ends
with exit code 1 if something failed or was wrong.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rehyat_jax.attention import FeatureMap, FeatureMapConfig, hybrid_attention, softmax_attention
from rehyat_jax.attention.api import IMPLEMENTATIONS, STABILIZERS
from rehyat_jax.attention.geometry import ChunkGeometry
from rehyat_jax.benchmarks.environment import describe_environment
from rehyat_jax.cli import report_input_errors
from rehyat_jax.errors import InputError
from rehyat_jax.files import written_whole

HEAD_DIM, FEATURES, CHUNK_FRAMES, OVERLAP_FRAMES = 128, 256, 3, 1
NAMES = ("query", "key", "value", "phi_query", "phi_key")

# Dense bfloat16 TFLOP/s of the data sheets, by what JAX calls the device.
PEAK_TFLOPS = {
    "NVIDIA A100": 312,
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H200": 989,
    "NVIDIA GH200": 989,
    "NVIDIA B200": 2250,
}

# Weights, states, cotangents and results are each rounded to bfloat16's 8 bits: a few times 2**-9 of the largest.
TOLERANCE = 2.0**-6


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One attention at one size; times in milliseconds, None where it failed."""

    heads: int
    frames: int
    attention: str
    forward_tflop: float
    both_tflop: float
    forward_ms: float | None
    both_ms: float | None


def hybrid(implementation: str, stabilizer: str, tokens_per_frame: int, causal: bool = True) -> Callable:
    """`hybrid_attention` of (query, key, value, phi_query, phi_key)."""
    return functools.partial(
        hybrid_attention,
        tokens_per_frame=tokens_per_frame,
        chunk_frames=CHUNK_FRAMES,
        overlap_frames=OVERLAP_FRAMES,
        causal=causal,
        stabilizer=stabilizer,
        implementation=implementation,
    )


def random_inputs(frames: int, tokens_per_frame: int, heads: int, *, features: bool = True) -> list[jax.Array]:
    """Bfloat16 query, key, value, all normal, and non-negative features whose products are of order one."""
    widths = [HEAD_DIM] * 3 + ([FEATURES] * 2 if features else [])
    keys = jax.random.split(jax.random.key(0), len(widths))
    shapes = [(1, frames * tokens_per_frame, heads, width) for width in widths]
    arrays = [jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True)]
    return arrays[:3] + [jnp.abs(array) / FEATURES**0.5 for array in arrays[3:]]


def output_and_gradients(attend: Callable) -> Callable:
    """(inputs, cotangent) -> (output, the inputs' gradients)."""

    def run(inputs, cotangent):
        output, pullback = jax.vjp(attend, *inputs)
        return output, pullback(cotangent)

    return run


def errors(implementation: str, stabilizer: str, causal: bool) -> dict[str, float]:
    """Largest error over largest value of the output and each gradient, at 7 frames (a ragged chunk) of 60 tokens."""
    inputs = random_inputs(7, 60, 2)
    cotangent = jax.random.normal(jax.random.key(1), inputs[0].shape, jnp.bfloat16)
    found = jax.jit(output_and_gradients(hybrid(implementation, stabilizer, 60, causal)))(inputs, cotangent)
    with jax.enable_x64(True):
        reference = output_and_gradients(hybrid("reference", stabilizer, 60, causal))
        expected = jax.jit(reference)(*jax.tree.map(lambda array: array.astype(jnp.float64), (inputs, cotangent)))
        values = [error_ratio(*pair) for pair in zip(*map(jax.tree.leaves, (found, expected)), strict=True)]
    return dict(zip(("output", *NAMES), values, strict=True))


def error_ratio(found: jax.Array, expected: jax.Array) -> float:
    """max |found - expected| / max |expected|."""
    found, expected = (np.asarray(array).astype(np.float64) for array in (found, expected))
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def check(implementations: list[str]) -> Iterator[dict]:
    """Compares each implementation with the reference, in both stabilizers and directions of time."""
    for implementation in implementations:
        for stabilizer in STABILIZERS:
            for causal in (True, False):
                case = dict(implementation=implementation, stabilizer=stabilizer, causal=causal)
                try:
                    found = errors(**case)
                except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
                    report_failure(case, error)
                    found = None
                right = found is not None and all(error < TOLERANCE for error in found.values())
                yield case | {"errors": found, "right": right}


def milliseconds(function: Callable, *arguments, repeats: int) -> float:
    """Median time of a call, the device idle before and after it."""
    function = jax.jit(function)
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def softmax_tflop(pairs: int, heads: int, *, products: int) -> float:
    """2 products of every pair of a query and a key forward, 5 more backward."""
    return products * 2 * pairs * heads * HEAD_DIM / 1e12


def linear_tflop(tokens: int, heads: int, *, products: int) -> float:
    """2 products of every token's features and a state or value forward, 4 more backward."""
    return products * 2 * tokens * heads * FEATURES * HEAD_DIM / 1e12


def measure(
    heads: int, frames: int, tokens_per_frame: int, implementations: list[str], *, full_by: str, repeats: int
) -> Iterator[Measurement]:
    """Times full attention by `full_by`, then each hybrid implementation and stabilizer, then the feature maps."""
    tokens = frames * tokens_per_frame
    geometry = ChunkGeometry(frames, tokens_per_frame, CHUNK_FRAMES, OVERLAP_FRAMES)
    window_pairs = int(geometry.key_masks(causal=True)[0].sum()) * tokens_per_frame**2
    *qkv, phi_query, phi_key = random_inputs(frames, tokens_per_frame, heads)

    def measurement(name, attend, inputs, forward_tflop, both_tflop):
        cotangent = jnp.ones_like(inputs[0])
        forward_ms = both_ms = None
        try:
            forward_ms = milliseconds(attend, *inputs, repeats=repeats)
            both_ms = milliseconds(output_and_gradients(attend), inputs, cotangent, repeats=repeats)
        except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
            report_failure(dict(attention=name, heads=heads, frames=frames), error)
        return Measurement(heads, frames, name, forward_tflop, both_tflop, forward_ms, both_ms)

    full = functools.partial(softmax_attention, implementation=full_by)
    full_tflop = functools.partial(softmax_tflop, tokens**2, heads)
    yield measurement(f"full, {full_by}", full, qkv, full_tflop(products=2), full_tflop(products=7))

    softmax, linear = (
        functools.partial(softmax_tflop, window_pairs, heads),
        functools.partial(linear_tflop, tokens, heads),
    )
    for implementation in implementations:
        for stabilizer in STABILIZERS:
            yield measurement(
                f"hybrid, {implementation}, {stabilizer}",
                hybrid(implementation, stabilizer, tokens_per_frame),
                [*qkv, phi_query, phi_key],
                softmax(products=2) + linear(products=2),
                softmax(products=7) + linear(products=6),
            )
    yield feature_maps_measurement(measurement, qkv[0], heads, tokens)


def feature_maps_measurement(measurement: Callable, query: jax.Array, heads: int, tokens: int) -> Measurement:
    """Both maps, of the query and of the key, as one row."""
    maps = [FeatureMap(FeatureMapConfig(), heads=heads, head_dim=HEAD_DIM, rngs=nnx.Rngs(seed)) for seed in (0, 1)]
    graphs, params = zip(*map(nnx.split, maps), strict=True)

    def attend(query, params):
        phi_query, phi_key = (nnx.merge(*pair)(query) for pair in zip(graphs, params, strict=True))
        # A cotangent in the shape of the query reaches every feature of both.
        return (phi_query + phi_key)[..., :HEAD_DIM] + (phi_query + phi_key)[..., HEAD_DIM:]

    forward = 2 * 2 * tokens * heads * (HEAD_DIM * FEATURES + FEATURES**2) / 1e12
    return measurement("feature maps of query and key", attend, (query, params), forward, 3 * forward)


def report_failure(case: dict, error: Exception) -> None:
    """Says on stderr what failed; the benchmark goes on."""
    what = ", ".join(f"{name}={value}" for name, value in case.items())
    print(f"failed: {what}: {type(error).__name__}: {str(error)[:1000]}", file=sys.stderr, flush=True)


def correctness_row(case: dict) -> str:
    """A line of the first table."""
    found = case["errors"] or dict.fromkeys(("output", *NAMES), float("nan"))
    cells = [case["implementation"], case["stabilizer"], "past" if case["causal"] else "past and future"]
    cells += [f"{error:.4f}" for error in found.values()] + ["yes" if case["right"] else "NO"]
    return f"| {' | '.join(cells)} |"


def timing_row(row: Measurement, full: Measurement, peak: float | None) -> str:
    """A line of the second table; `full` is the full attention of the same size."""
    cells = [str(row.heads), str(row.frames), row.attention]
    for direction in ("forward", "both"):
        ms, full_ms = getattr(row, f"{direction}_ms"), getattr(full, f"{direction}_ms")
        if ms is None:
            cells += ["failed", "", "", ""]
            continue
        tflops = getattr(row, f"{direction}_tflop") / (ms / 1e3)
        cells += [
            f"{ms:.2f}",
            f"{full_ms / ms:.2f}" if full_ms else "",
            f"{tflops:.0f}",
            f"{tflops / peak:.0%}" if peak else "",
        ]
    return f"| {' | '.join(cells)} |"


def find_device(platform: str) -> jax.Device:
    """The first device of a platform, "gpu" or "cpu"."""
    try:
        return jax.devices(platform)[0]
    except RuntimeError as error:
        raise InputError(
            f"--device {platform}: expected an NVIDIA GPU that JAX can use, found {jax.devices()}; run this on a "
            f'machine that has one, with `pip install "jax[cuda13]"` and JAX_PLATFORMS unset'
        ) from error


def benchmark(arguments: argparse.Namespace) -> bool:
    """Runs and prints everything; returns whether all was right."""
    device = find_device(arguments.device)
    peak = next((peak for name, peak in PEAK_TFLOPS.items() if device.device_kind.startswith(name)), None)
    full_by = "cudnn" if device.platform == "gpu" else "xla"
    with jax.default_device(device):
        environment = describe_environment()
        print(f"{environment}\n\nLargest error over largest value, against the float64 reference\n", flush=True)
        print(f"| implementation | stabilizer | linear keys | output | {' | '.join(NAMES)} | right |")
        print("|---" * (5 + len(NAMES)) + "|")
        cases = []
        for case in check(arguments.implementations):
            cases.append(case)
            print(correctness_row(case), flush=True)

        print(f"\nMilliseconds, medians of {arguments.repeats}; speedups are over full attention\n")
        columns = " | ".join(f"{name} ms | speedup | TFLOP/s | of peak" for name in ("forward", "forward + backward"))
        print(f"| heads | frames | attention | {columns} |\n{'|---' * 11}|", flush=True)
        rows = []
        for heads in arguments.heads:
            for frames in arguments.frames:
                full = None
                for row in measure(
                    heads,
                    frames,
                    arguments.tokens_per_frame,
                    arguments.implementations,
                    full_by=full_by,
                    repeats=arguments.repeats,
                ):
                    full = full or row
                    rows.append(row)
                    print(timing_row(row, full, peak), flush=True)
    if arguments.json:
        result = dict(environment=environment, peak_tflops=peak, tokens_per_frame=arguments.tokens_per_frame)
        result |= dict(correctness=cases, measurements=[dataclasses.asdict(row) for row in rows])
        with written_whole(arguments.json) as path:
            path.write_text(json.dumps(result, indent=1))
    return all(case["right"] for case in cases) and all(row.both_ms is not None for row in rows)


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark: exit code 0, 1 if something failed or was wrong, 2 if it could not be run."""
    parser = argparse.ArgumentParser(
        prog="python -m rehyat_jax.benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = [name for name in IMPLEMENTATIONS if name != "reference"]
    on_gpus = [name for name in known if name in ("cudnn", "pallas_gpu")]
    parser.add_argument("--implementations", nargs="+", choices=known, default=on_gpus)
    parser.add_argument("--heads", type=positive, nargs="+", default=[12, 40])
    parser.add_argument("--frames", type=positive, nargs="+", default=[21, 42, 81], help="latent frames")
    parser.add_argument("--tokens-per-frame", type=positive, default=1560)
    parser.add_argument("--repeats", type=positive, default=10, help="calls of each; the median counts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything here")
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu", help="cpu is for trying the program itself")
    arguments = parser.parse_args(argv)
    all_right = True

    def run():
        nonlocal all_right
        all_right = benchmark(arguments)

    return report_input_errors(run) or int(not all_right)


def positive(text: str) -> int:
    """An integer of at least 1."""
    if (number := int(text)) < 1:
        raise ValueError
    return number


if __name__ == "__main__":
    sys.exit(main())
