"""Listings of the TPU kernels that a compiled program calls. Separate processes compile each kernel by itself.

With listings, libtpu takes several times as long to compile a program: it forms and writes the bundles of every fusion
in several ways. Only the kernels' listings are read. Compiled by itself, with its arrays in the same memories, a kernel
has the same bundles. This is the command of a process; FILE has the calls of kernels:

  python -m rehyat_jax.cost_model.tpu_kernels FILE TOPOLOGY DIRECTORY

A cache keeps the listings of a kernel, for the same generation of TPUs and the same version of libtpu.
"""

import argparse
import contextlib
import gzip
import hashlib
import importlib.metadata
import json
import math
import os
import re
import shutil
import sys
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax

from rehyat_jax.cost_model.hlo_arrays import arrays_of
from rehyat_jax.cost_model.hlo_operations import Operation, executed_operations, types_of
from rehyat_jax.cost_model.tpu_bundles import LISTINGS, generation_of, listing_file
from rehyat_jax.cost_model.tpu_target import described_topology, on_one_chip, running
from rehyat_jax.errors import InputError
from rehyat_jax.files.caches import cache_folder
from rehyat_jax.files.write import written_whole

# Kernels for which starting a further process is worth its imports.
_KERNELS_A_PROCESS = 4
_CONFIG = "backend_config="
_ALIASES = re.compile(r"output_to_operand_aliasing=\{(.*?\})\}, \w+=")
# HBM and VMEM: XLA moves no other arrays.
_COLORS = (0, 1)
# libtpu's default limit for the VMEM of a kernel, on the chips with the least.
_LEAST_KIB = 16 * 1024


class KernelCall(NamedTuple):
    """A call of a kernel in compiled HLO.

    Attributes:
      operands, results: types of the arrays, as HLO has them.
      aliases: number of the operand and of the result that takes its memory, of each such pair.
      config: the kernel and its options, as HLO has them.
      vmem_kib: VMEM that the kernel uses in addition to arrays in VMEM.
    """

    operands: list[str]
    results: str
    aliases: list[tuple[int, int]]
    config: dict[str, Any]
    vmem_kib: int

    @classmethod
    def of(cls, operation: Operation, types: dict[str, str]) -> "KernelCall":
        """The call that is an operation; `types` has the types of its operands."""
        text = operation.text
        aliasing = _ALIASES.search(text)
        pairs = re.findall(r"\{(\d*)\}: \((\d+), ", aliasing.group(1)) if aliasing else []
        config, _ = json.JSONDecoder().raw_decode(text, text.index(_CONFIG) + len(_CONFIG))
        used = [int(scoped["size"]) for scoped in config.get("used_scoped_memory_configs", ())]
        return cls(
            [types[operand] for operand in operation.operands],
            operation.result,
            [(int(operand), int(result or 0)) for result, operand in pairs],
            {name: config[name] for name in ("custom_call_config", "scoped_memory_configs") if config.get(name)},
            max(used, default=0) // 1024,
        )

    def digest(self, generation: str) -> str:
        """Names the kernel's listings, for a generation of TPUs, by the libtpu that is installed."""
        content = json.dumps([self, generation, importlib.metadata.version("libtpu")])
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def is_placed(self) -> bool:
        """True if an array is not in HBM."""
        return any(not array.in_hbm for text in (*self.operands, self.results) for array in arrays_of(text))

    def program(self, *, is_placed: bool) -> tuple[jax.stages.Wrapped, list[jax.ShapeDtypeStruct]]:
        """A program that only calls the kernel, and its abstract arguments.

        Args:
          is_placed: True to have the arrays in the same memories as in the program that the call is from.
        """
        operands, results = (
            [x for text in texts for x in arrays_of(text)] for texts in (self.operands, [self.results])
        )
        config = self.config
        if is_placed:
            inputs = [{"operand_index": n, "color": x.memory} for n, x in enumerate(operands) if x.memory in _COLORS]
            shape_index = lambda n: {"shape_index": [n]} if self.results.startswith("(") else {}
            outputs = [{"color": x.memory, **shape_index(n)} for n, x in enumerate(results) if x.memory in _COLORS]
            colors = {"input_memory_space_colors": inputs, "output_memory_space_colors": outputs}
            config = config | {"custom_call_config": config["custom_call_config"] | colors}
        abstract = lambda arrays: [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]
        aliases = dict(self.aliases)
        call = jax.ffi.ffi_call(
            "tpu_custom_call",
            abstract(results) if self.results.startswith("(") else abstract(results)[0],
            input_output_aliases=aliases,
            custom_call_api_version=1,
            legacy_backend_config=json.dumps(config),
        )

        def run(*arrays: jax.Array):
            # An argument of the program cannot be in VMEM, so a result cannot take its memory.
            return call(*(-x if n in aliases else x for n, x in enumerate(arrays)))

        limit = {"xla_tpu_scoped_vmem_limit_kib": str(self.vmem_kib)} if self.vmem_kib > _LEAST_KIB else {}
        return jax.jit(run, compiler_options=limit), abstract(operands)


def kernel_calls(hlo: str) -> dict[str, KernelCall]:
    """All calls of kernels in the text of a compiled HLO module, by the operation's name."""
    types = types_of(hlo)
    return {
        operation.name: KernelCall.of(operation, types)
        for operation in executed_operations(hlo)
        if operation.kernel_body is not None
    }


def list_kernels(hlo: str, topology: str, directory: Path) -> None:
    """Lists all kernels of a compiled HLO module into `directory`.

    Raises RuntimeError if the compiler fails.
    """
    generation = generation_of(topology)
    calls = {call.digest(generation): call for call in kernel_calls(hlo).values()}
    new = [(digest, call) for digest, call in calls.items() if not _taken_from_cache(digest, directory)]
    processes = min(os.cpu_count() or 1, math.ceil(len(new) / _KERNELS_A_PROCESS))
    with contextlib.ExitStack() as stack:
        started = []
        for number in range(processes):
            folder = directory / f"listings_{number}"
            folder.mkdir()
            file, log = folder / "calls.json", folder / "log.txt"
            file.write_text(json.dumps(new))
            # The listings of all seventy passes of a large kernel would be half a gigabyte.
            options = (
                f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
                f"--xla_jf_dump_llo_pass_label_regex={'|'.join(LISTINGS)}"
            )
            # Each process takes the next kernel that none has taken.
            command = [sys.executable, "-m", __spec__.name, str(file), topology, str(folder)]
            started.append((stack.enter_context(running(command, log, options)), folder, log))
        for process, folder, log in started:
            if process.wait():
                raise RuntimeError(f"a kernel cannot be compiled for {topology}: {log.read_text()}")
            for listing in folder.glob("*.gz"):
                listing.rename(directory / listing.name)


def _taken_from_cache(digest: str, directory: Path) -> bool:
    # A damaged file in the cache, or a missing one, only makes this slow.
    try:
        for label in LISTINGS:
            content = listing_file(_cache(), digest, label).read_bytes()
            gzip.decompress(content)
            listing_file(directory, digest, label).write_bytes(content)
    except (OSError, EOFError, zlib.error):
        return False
    return True


def _cache() -> Path:
    return cache_folder() / "kernels"


def _list(calls: list[tuple[str, KernelCall]], topology: str, directory: Path) -> None:
    """Compiles kernels in the child process, whose libtpu writes listings to `directory`."""
    device = described_topology(topology)[0]
    for digest, call in calls:
        try:
            directory.parent.joinpath(f"{digest}.taken").touch(exist_ok=False)
        except FileExistsError:
            continue
        name = _compile(call, device)
        for label in LISTINGS:
            pattern = re.compile(rf"\d+-{re.escape(name)}-\d+-{label}\.txt")
            written = [file for file in directory.iterdir() if pattern.fullmatch(file.name)]
            if not written:
                raise RuntimeError(f"expected libtpu to list {label} of {name}, found nothing")
            listing = listing_file(directory, digest, label)
            listing.write_bytes(gzip.compress(max(written).read_bytes(), 1))
            for file in written:
                file.unlink()
            # A cache that cannot be written only makes the next program slow.
            cached = listing_file(_cache(), digest, label)
            with contextlib.suppress(OSError, InputError), written_whole(cached) as temporary:
                shutil.copy(listing, temporary)


def _compile(call: KernelCall, device: jax.Device) -> str:
    """Compiles a kernel, and returns its name in the program. Arrays that do not fit into VMEM are in HBM instead."""
    for is_placed in (True, False) if call.is_placed else (False,):
        try:
            compiled = on_one_chip(device, call.program, {"is_placed": is_placed}).compile()
            break
        except jax.errors.JaxRuntimeError:
            if not is_placed:
                raise
    (name,) = (operation.name for operation in executed_operations(compiled.as_text()) if operation.kernel_body)
    return name


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog=f"python -m {__spec__.name}",
        description=__doc__,
        epilog=f"example:\n  python -m {__spec__.name} calls.json v5e:2x2 listings",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", metavar="FILE", type=Path, help="digests and calls of kernels, JSON")
    parser.add_argument("topology", metavar="TOPOLOGY", help="a slice of TPUs, v5e:2x2")
    parser.add_argument("directory", metavar="DIRECTORY", type=Path, help="where libtpu's options tell it to write")
    given = parser.parse_args()
    _list(
        [(digest, KernelCall(*call)) for digest, call in json.loads(given.file.read_text())],
        given.topology,
        given.directory,
    )
