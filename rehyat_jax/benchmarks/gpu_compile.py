"""Compiles hybrid attention for an H100 without a GPU: python -m rehyat_jax.benchmarks.gpu_compile.

JAX's CUDA plugin compiles forward, and forward + backward, without GPU and driver (`pip install "jax[cuda13]"`). For
every program, the table has:

  - the attention kernels that it calls
  - the bytes that XLA's other operations read and write, and a bound on their time at the H100's 3.35 TB/s
  - its temporary memory
  - ptxas's remarks on the project's own kernel, only where it is compiled for the first time

cuDNN chooses its kernels on the GPU itself, so the table has nothing about them.
"""

import contextlib
import dataclasses
import os
import re
import sys
import tempfile
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from rehyat_jax.attention.hybrid.api import STABILIZERS
from rehyat_jax.attention.hybrid.backend import Request, get_backend
from rehyat_jax.attention.hybrid.geometry import ChunkGeometry
from rehyat_jax.benchmarks.gpu import CHUNK_FRAMES, FEATURES, HEAD_DIM, OVERLAP_FRAMES, output_and_gradients
from rehyat_jax.cli import CommandParser, report_input_errors
from rehyat_jax.cost_model.gpu_target import gpu_devices
from rehyat_jax.cost_model.hlo_arrays import arrays_of

IMPLEMENTATIONS = ("cudnn", "pallas_gpu")

BYTES_A_SECOND = 3.35e12

_OPERATION = re.compile(r"\s+(?:ROOT )?%([\w.\-]+) = (.*?) ([\w\-]+)\((.*?)\)(?:, |$)")
# Operations that move no bytes.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One program: its attention kernels in order, other operations' bytes, temporary bytes, and ptxas's remarks."""

    kernels: list[str]
    other_bytes: int
    temporary_bytes: int
    ptxas: str


def moved_bytes(hlo: str) -> tuple[list[str], int]:
    """The custom calls of an optimised HLO module's entry, and the bytes that its other operations read and write."""
    kernels, total, bytes_of = [], 0, {}
    for line in hlo[hlo.index("\nENTRY") :].splitlines():
        if not (match := _OPERATION.match(line)):
            continue
        name, shapes, kind, operands = match.groups()
        bytes_of[name] = sum(array.bytes for array in arrays_of(shapes))
        if target := re.search(r'custom_call_target="([^"]*)"', line):
            kernels.append(target[1])
        elif kind not in _FREE:
            total += bytes_of[name] + sum(bytes_of[operand] for operand in re.findall(r"%([\w.\-]+)", operands))
    return kernels, total


def compile_attention(
    implementation: str, stabilizer: str, *, backward: bool, heads: int, frames: int, tokens_per_frame: int = 1560
) -> Compiled:
    """Compiles causal hybrid attention of one bfloat16 video for an H100; `backward` adds all inputs' gradients."""
    geometry = ChunkGeometry(frames, tokens_per_frame, CHUNK_FRAMES, OVERLAP_FRAMES)

    def attend(*arrays):
        return get_backend(implementation)(Request(*arrays, geometry, causal=True, stabilizer=stabilizer))[0]

    sharding = SingleDeviceSharding(gpu_devices("h100", 1)[0])
    shape = lambda width: (1, frames * tokens_per_frame, heads, width)
    array = lambda width: jax.ShapeDtypeStruct(shape(width), jnp.bfloat16, sharding=sharding)
    inputs = [array(HEAD_DIM)] * 3 + [array(FEATURES)] * 2
    with ptxas_output() as output:
        if backward:
            lowered = jax.jit(output_and_gradients(attend)).lower(inputs, array(HEAD_DIM))
        else:
            lowered = jax.jit(attend).lower(*inputs)
        compiled = lowered.compile()
    kernels, other_bytes = moved_bytes(compiled.as_text())
    said = re.findall(r"Used \d+ registers|\d+ bytes spill stores|(?<=Performance Loss: )[^\n]*", "".join(output))
    ptxas = ", ".join(dict.fromkeys(said))
    return Compiled(kernels, other_bytes, compiled.memory_analysis().temp_size_in_bytes, ptxas)


@contextlib.contextmanager
def ptxas_output() -> Iterator[list[str]]:
    """Collects ptxas's output. Mosaic GPU prints it from C++, so the process's output is redirected meanwhile."""
    os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"
    lines: list[str] = []
    with tempfile.TemporaryFile("w+") as file:
        sys.stdout.flush()
        stdout = os.dup(1)
        os.dup2(file.fileno(), 1)
        try:
            yield lines
        finally:
            os.dup2(stdout, 1)
            os.close(stdout)
            file.seek(0)
            lines += file


def main(argv: list[str] | None = None) -> int:
    """Prints the table."""
    parser = CommandParser("benchmarks.gpu_compile", __doc__, "--heads 12 --frames 21")
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--frames", type=int, default=21, help="latent frames of 1560 tokens")
    arguments = parser.parse_args(argv)

    def run():
        gpu_devices("h100", 1)
        print(
            "| implementation | stabilizer | direction | attention kernels "
            "| beside them, GB | ms | temporary, GB | ptxas |"
        )
        print("|---" * 8 + "|")
        for implementation in IMPLEMENTATIONS:
            for stabilizer in STABILIZERS:
                for direction in ("forward", "forward + backward"):
                    compiled = compile_attention(
                        implementation, stabilizer, backward="back" in direction, **vars(arguments)
                    )
                    cells = [
                        implementation,
                        stabilizer,
                        direction,
                        ", ".join(compiled.kernels),
                        f"{compiled.other_bytes / 1e9:.2f}",
                        f"{compiled.other_bytes / BYTES_A_SECOND * 1e3:.2f}",
                        f"{compiled.temporary_bytes / 1e9:.2f}",
                        compiled.ptxas,
                    ]
                    print(f"| {' | '.join(cells)} |", flush=True)

    return report_input_errors(run)


if __name__ == "__main__":
    sys.exit(main())
