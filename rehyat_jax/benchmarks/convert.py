"""Time and memory of converting a full-size checkpoint: python -m rehyat_jax.benchmarks.convert [--preset t2v-1.3B].

Writes a random float32 checkpoint in diffusers' layout, and converts it to a model checkpoint and back, each in a
separate process. Checks that the bytes are equal and that memory stayed below two parameters and 1 GB. Prints a
markdown table and deletes its files. It needs three times the checkpoint's size on disk (17 GB for t2v-1.3B).
"""

import filecmp
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
from tqdm import tqdm

from rehyat_jax.benchmarks.environment import describe_environment
from rehyat_jax.cli import CommandParser
from rehyat_jax.models.wan.config import WAN_PRESETS, WanConfig
from rehyat_jax.weights.streamed import StreamedArray, StreamedModel
from rehyat_jax.weights.table import Layout
from rehyat_jax.weights.torch_checkpoint import MAX_SHARD_BYTES, write_torch_checkpoint
from rehyat_jax.weights.wan.names import wan_table
from rehyat_jax.weights.wan.spec import WAN


def write_random_checkpoint(folder: Path, config: WanConfig, layout: Layout) -> StreamedModel:
    """Writes a PyTorch checkpoint of standard normal float32 values to a new folder, one parameter at a time."""
    rng = np.random.default_rng(0)
    params = {}
    for row in wan_table(config):
        shape = row.stacked_shape
        draw = lambda shape=shape: rng.standard_normal(shape, dtype=np.float32)
        params[row.path] = StreamedArray(shape, np.dtype(np.float32), draw)
    model = StreamedModel(config, dict(WAN.metadata), params)
    folder.mkdir()
    with tqdm(total=model.nbytes, unit="B", unit_scale=True, desc="random checkpoint") as bar:
        write_torch_checkpoint(folder, model, layout, progress=bar.update, max_shard_bytes=MAX_SHARD_BYTES)
    return model


def run_convert(*arguments: str | Path) -> tuple[float, int]:
    """(seconds, peak resident memory in bytes) of the conversion's command line in a new process."""
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "rehyat_jax.convert", *map(str, arguments)])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"the conversion ended with exit code {process.returncode}; its message is above")
    return time.monotonic() - start, usage.ru_maxrss * 1024


def benchmark(preset: str, folder: Path) -> str:
    """Converts a checkpoint and converts it back, inside an existing folder; returns the table."""
    random, model_checkpoint, back = folder / "random", folder / "model", folder / "back"
    model = write_random_checkpoint(random, WAN_PRESETS[preset], "diffusers")
    results = {
        "from-torch": run_convert("from-torch", random, model_checkpoint),
        "to-torch": run_convert("to-torch", model_checkpoint, back, "--layout", "diffusers"),
    }
    names = sorted(file.name for file in random.iterdir())
    same, different, missing = filecmp.cmpfiles(random, back, names, shallow=False)
    if different or missing or len(same) != len(list(back.iterdir())):
        raise RuntimeError(f"not the same bytes after the way back: {different + missing}")

    largest = max(array.nbytes for array in model.params.values())
    if (peak := max(peak for _, peak in results.values())) > 2 * largest + 10**9:
        raise RuntimeError(f"{peak / 1e9:.2f} GB of memory at the peak, more than two parameters and 1 GB")

    packages = ", ".join(f"{name} {version(name)}" for name in ("orbax-checkpoint", "tensorstore", "numpy"))
    lines = [
        f"{preset}, float32, {model.nbytes / 1e9:.2f} GB, the largest stacked parameter {largest / 1e9:.2f} GB; every "
        f"byte equal after the way back. {describe_environment()}, {packages}.",
        "",
        "| conversion | seconds | GB/s | peak memory (RSS) |",
        "|---|---|---|---|",
    ]
    for name, (seconds, peak) in results.items():
        lines.append(f"| {name} | {seconds:.0f} | {model.nbytes / 1e9 / seconds:.2f} | {peak / 1e9:.2f} GB |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark and prints its table."""
    parser = CommandParser("benchmarks.convert", __doc__, "--preset t2v-1.3B --workdir /tmp")
    parser.add_argument("--preset", choices=sorted(WAN_PRESETS), default="t2v-1.3B", help="size of the model")
    parser.add_argument("--workdir", type=Path, help="where to put the files meanwhile; default: the system's /tmp")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=arguments.workdir, prefix="convert-") as folder:
        print(benchmark(arguments.preset, Path(folder)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
