"""Hybrid against full softmax attention on one NVIDIA GPU: python -m rehyat_jax.benchmarks.gpu [--json FILE].

First compares outputs and gradients on this GPU with the float64 reference, then times forward and forward + backward
in bfloat16 at the sizes of Wan2.1 (12 heads: 1.3B, 40 heads: 14B; 1560 tokens a frame are 480 x 832 pixels), Tc = 3,
To = 1, 256 features. "layer" computes its feature maps; "hybrid" gets their features as inputs. Prints markdown tables;
the exit code is 1 if something failed or was wrong. `benchmarks.gpu_run` runs this and all other GPU benchmarks.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rehyat_jax.attention import FeatureMap, FeatureMapConfig, hybrid_attention, softmax_attention
from rehyat_jax.attention.hybrid.api import STABILIZERS
from rehyat_jax.attention.hybrid.backend import IMPLEMENTATIONS
from rehyat_jax.attention.hybrid.geometry import ChunkGeometry
from rehyat_jax.benchmarks.environment import describe_environment
from rehyat_jax.cli import CommandParser, report_input_errors
from rehyat_jax.errors import InputError
from rehyat_jax.extras import install_command
from rehyat_jax.files.write import written_whole

HEAD_DIM, FEATURES, CHUNK_FRAMES, OVERLAP_FRAMES = 128, 256, 3, 1
KINDS = ("full", "torch", "layer", *(f"hybrid, {stabilizer}" for stabilizer in STABILIZERS), "maps")
"""Kinds of rows that `measure` can time:

full, torch: full attention in JAX, in PyTorch.
layer: hybrid attention that computes its feature maps.
hybrid, STABILIZER: hybrid attention that is given its features.
maps: only the feature maps.
"""

NAMES = ("query", "key", "value", "phi_query", "phi_key")

# Dense bfloat16 TFLOP/s from the data sheets, by JAX's name of the device.
PEAK_TFLOPS = {
    "NVIDIA A100": 312,
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H200": 989,
    "NVIDIA GH200": 989,
    "NVIDIA B200": 2250,
}

# Weights, states, cotangents and results are each rounded to bfloat16's 8 bits: a few times 2**-9 of the largest value.
TOLERANCE = 2.0**-6


QUEUED_SECONDS = 0.05
"""Target duration of one queue of calls."""

MOST_SECONDS = 3.0
"""Timing of a function stops after this many seconds."""


def data_sheet_tflops(device_kind: str) -> float | None:
    """A GPU's dense bfloat16 peak in TFLOP/s from its data sheet; None for an unknown GPU."""
    return next((peak for name, peak in PEAK_TFLOPS.items() if device_kind.startswith(name)), None)


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One attention at one size, with times in milliseconds; a time is None if the call failed."""

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
    """Bfloat16 query, key and value, all normal, and non-negative features whose products are of order one."""
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
    """Error ratios of the output and each gradient, at 7 frames of 60 tokens, where the last chunk is incomplete."""
    inputs, cotangent = _checked_inputs(7)
    found = jax.jit(output_and_gradients(hybrid(implementation, stabilizer, 60, causal)))(inputs, cotangent)
    expected = _expected(stabilizer, causal, 7)
    values = [error_ratio(*pair) for pair in zip(*map(jax.tree.leaves, (found, expected)), strict=True)]
    return dict(zip(("output", *NAMES), values, strict=True))


def state_errors(implementation: str, stabilizer: str) -> dict[str, float]:
    """Error ratios of the output and of the sums in the final state, for a 6-frame video computed in two parts."""
    inputs, _ = _checked_inputs(6)
    run = functools.partial(hybrid(implementation, stabilizer, 60), return_state=True)
    half = 3 * 60
    first, rest = ([array[:, part] for array in inputs] for part in (slice(half), slice(half, None)))
    start, state = jax.jit(run)(*first)
    end, state = jax.jit(run)(*rest, initial_state=state)
    expected, _ = _expected(stabilizer, True, 6)
    phi_key, value = (np.asarray(inputs[i], np.float64)[0] for i in (4, 2))
    # The frames before the overlap have left the window.
    left = slice(6 * 60 - 60)
    sums = np.einsum("nhf,nhd->hfd", phi_key[left], value[left])
    return {
        "output": error_ratio(np.concatenate([start, end], axis=1), expected),
        "state": error_ratio(state.past.state[0], sums),
        "normalizer": error_ratio(state.past.normalizer[0], phi_key[left].sum(0)),
    }


def _checked_inputs(frames: int) -> tuple[list[jax.Array], jax.Array]:
    """Inputs and cotangent with 2 heads and 60 tokens a frame."""
    inputs = random_inputs(frames, 60, 2)
    return inputs, jax.random.normal(jax.random.key(1), inputs[0].shape, jnp.bfloat16)


@functools.cache
def _expected(stabilizer: str, causal: bool, frames: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Output and gradients in float64."""
    arguments = _checked_inputs(frames)
    with jax.enable_x64(True):
        reference = output_and_gradients(hybrid("reference", stabilizer, 60, causal))
        arguments = jax.tree.map(lambda array: array.astype(jnp.float64), arguments)
        return jax.tree.map(np.asarray, jax.jit(reference)(*arguments))


def error_ratio(found: jax.Array, expected: jax.Array) -> float:
    """max |found - expected| / max |expected|."""
    found, expected = (np.asarray(array).astype(np.float64) for array in (found, expected))
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def check(implementations: Sequence[str]) -> Iterator[dict]:
    """Compares each implementation with the reference, in both stabilizers and directions of time."""
    names = ("implementation", "stabilizer", "causal")
    cases = itertools.product(implementations, STABILIZERS, (True, False))
    yield from _judged(errors, [dict(zip(names, case, strict=True)) for case in cases])


def check_states(implementations: Sequence[str]) -> Iterator[dict]:
    """Compares each implementation with the reference on a video that is given in two parts."""
    cases = itertools.product(implementations, STABILIZERS)
    yield from _judged(state_errors, [dict(implementation=name, stabilizer=stabilizer) for name, stabilizer in cases])


def _judged(find_errors: Callable[..., dict[str, float]], cases: list[dict]) -> Iterator[dict]:
    """Each case with its errors, None if it failed. Cases run in parallel, because most of the time is compilation."""

    def judged(case: dict) -> dict:
        try:
            found = find_errors(**case)
        except Exception as error:  # any compiler error; the other cases are still compared
            report_failure(case, error)
            found = None
        return case | {"errors": found, "right": found is not None and all(x < TOLERANCE for x in found.values())}

    with ThreadPoolExecutor() as threads:
        yield from threads.map(judged, cases)


def milliseconds(function: Callable, *arguments, repeats: int, jit: bool = True) -> float:
    """Median time of a call; short calls are queued, so that the host's time in them is hidden.

    Args:
      function: function that is compiled unless `jit` is False; then it may also wait for its own results.
      arguments: arguments of the function.
      repeats: number of timings; fewer if they would take longer than `MOST_SECONDS`.
      jit: whether to compile the function.
    """
    if jit:
        function = jax.jit(function)

    def seconds(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            result = function(*arguments)
        jax.block_until_ready(result)
        return (time.perf_counter() - start) / calls

    seconds(1)  # compiles
    first = seconds(1)
    calls = max(1, min(20, round(QUEUED_SECONDS / first)))
    times = [first] if calls == 1 else []
    while len(times) < repeats and sum(times) * calls < MOST_SECONDS:
        times.append(seconds(calls))
    return statistics.median(times) * 1e3


def softmax_tflop(pairs: int, heads: int, *, products: int) -> float:
    """TFLOP of softmax attention: 2 products of every query-key pair forward, 5 more backward."""
    return products * 2 * pairs * heads * HEAD_DIM / 1e12


def linear_tflop(tokens: int, heads: int, *, products: int) -> float:
    """TFLOP of linear attention: 2 products of every token's features and a state or value forward, 4 more backward."""
    return products * 2 * tokens * heads * FEATURES * HEAD_DIM / 1e12


def measure(
    heads: int,
    frames: int,
    tokens_per_frame: int,
    implementations: Sequence[str],
    *,
    full_by: str,
    repeats: int,
    kinds: Sequence[str] = KINDS,
) -> Iterator[Measurement]:
    """Times attention at one size.

    Args:
      heads, frames, tokens_per_frame: the size; frames are latent frames.
      implementations: implementations of hybrid attention.
      full_by: the implementation of full attention.
      repeats: number of timed calls; the median counts.
      kinds: the kinds of rows to measure, a subset of `KINDS`; rows come in the order of `KINDS`.
    """
    tokens = frames * tokens_per_frame
    geometry = ChunkGeometry(frames, tokens_per_frame, CHUNK_FRAMES, OVERLAP_FRAMES)
    window_pairs = int(geometry.key_masks(causal=True)[0].sum()) * tokens_per_frame**2
    *qkv, phi_query, phi_key = random_inputs(frames, tokens_per_frame, heads)
    full, window, linear, maps = (
        functools.partial(softmax_tflop, tokens**2, heads),
        functools.partial(softmax_tflop, window_pairs, heads),
        functools.partial(linear_tflop, tokens, heads),
        2 * 2 * tokens * heads * (HEAD_DIM * FEATURES + FEATURES**2) / 1e12,
    )
    forward, both = window(products=2) + linear(products=2), window(products=7) + linear(products=6)

    def measurement(name, attend, inputs, forward_tflop, both_tflop):
        cotangent = jnp.ones_like(inputs[0])
        forward_ms = both_ms = None
        try:
            forward_ms = milliseconds(attend, *inputs, repeats=repeats)
            both_ms = milliseconds(output_and_gradients(attend), inputs, cotangent, repeats=repeats)
        except Exception as error:  # any compiler error; the other rows are still timed
            report_failure(dict(attention=name, heads=heads, frames=frames), error)
        return Measurement(heads, frames, name, forward_tflop, both_tflop, forward_ms, both_ms)

    if "full" in kinds:
        attend = functools.partial(softmax_attention, implementation=full_by)
        yield measurement(f"full, {full_by}", attend, qkv, full(products=2), full(products=7))
    if "torch" in kinds:
        yield from torch_measurement(heads, frames, qkv[0].shape, full, repeats)
    if "layer" in kinds:
        for implementation in implementations:
            attend, params = whole_layer(implementation, STABILIZERS[0], tokens_per_frame, heads)
            name = f"layer, {implementation}, {STABILIZERS[0]}"
            yield measurement(name, attend, [*qkv, params], forward + maps, both + 3 * maps)
    for stabilizer in STABILIZERS:
        if f"hybrid, {stabilizer}" in kinds:
            for implementation in implementations:
                attend = hybrid(implementation, stabilizer, tokens_per_frame)
                name = f"hybrid, {implementation}, {stabilizer}"
                yield measurement(name, attend, [*qkv, phi_query, phi_key], forward, both)
    if "maps" in kinds:
        attend, params = feature_maps(heads)
        yield measurement("feature maps of query and key", attend, [qkv[0], params], maps, 3 * maps)


def torch_measurement(
    heads: int, frames: int, shape: tuple[int, ...], flops: Callable, repeats: int
) -> Iterator[Measurement]:
    """Times PyTorch's `scaled_dot_product_attention` with the kernel that it picks; no row without PyTorch."""
    try:
        import torch
    except ImportError as error:
        report_failure(dict(attention="full, PyTorch"), error)
        return

    batch, tokens, _, head_dim = shape
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    arrays = [torch.randn(batch, heads, tokens, head_dim, dtype=torch.bfloat16, device=device) for _ in range(3)]
    cotangent = torch.ones_like(arrays[0])
    attend = torch.nn.functional.scaled_dot_product_attention

    def forward():
        with torch.no_grad():
            attend(*arrays)

    def forward_and_backward():
        inputs = [array.detach().requires_grad_() for array in arrays]
        torch.autograd.grad(attend(*inputs), inputs, cotangent)

    def waited_for(run):
        def call():
            run()
            if device == "cuda":
                torch.cuda.synchronize()

        return call

    times = []
    try:
        for run in (forward, forward_and_backward):
            times.append(milliseconds(waited_for(run), repeats=repeats, jit=False))
    except RuntimeError as error:
        report_failure(dict(attention="full, PyTorch", heads=heads, frames=frames), error)
    forward_ms, both_ms = [*times, None, None][:2]
    yield Measurement(heads, frames, "full, PyTorch", flops(products=2), flops(products=7), forward_ms, both_ms)


def whole_layer(implementation: str, stabilizer: str, tokens_per_frame: int, heads: int) -> tuple[Callable, Any]:
    """(hybrid attention with its feature maps, a function of (query, key, value, parameters); their parameters)."""
    graphs, params = _random_maps(heads)
    attend = hybrid(implementation, stabilizer, tokens_per_frame)

    def layer(query, key, value, params):
        return attend(query, key, value, *(nnx.merge(*pair) for pair in zip(graphs, params, strict=True)))

    return layer, params


def feature_maps(heads: int) -> tuple[Callable, Any]:
    """(both feature maps as one function of (query, parameters); their parameters)."""
    graphs, params = _random_maps(heads)

    def attend(query, params):
        phi_query, phi_key = (nnx.merge(*pair)(query) for pair in zip(graphs, params, strict=True))
        # A cotangent with the shape of the query reaches every feature of both maps.
        return (phi_query + phi_key)[..., :HEAD_DIM] + (phi_query + phi_key)[..., HEAD_DIM:]

    return attend, params


def _random_maps(heads: int) -> tuple[tuple, tuple]:
    """(graph definitions, parameters) of the query's and the key's map."""
    maps = [FeatureMap(FeatureMapConfig(), heads=heads, head_dim=HEAD_DIM, rngs=nnx.Rngs(seed)) for seed in (0, 1)]
    return tuple(zip(*map(nnx.split, maps), strict=True))


def report_failure(case: dict, error: Exception) -> None:
    """Prints on stderr what failed; the benchmark continues."""
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
            f"machine that has one, with {install_command('cuda')} and JAX_PLATFORMS unset"
        ) from error


def benchmark(arguments: argparse.Namespace) -> bool:
    """Runs and prints everything; returns True if all results are right."""
    device = find_device(arguments.device)
    peak = data_sheet_tflops(device.device_kind)
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
    """Runs the benchmark; returns exit code 0, 1 if something failed or was wrong, 2 if it could not run."""
    parser = CommandParser("benchmarks.gpu", __doc__, "--json gpu.json")
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
