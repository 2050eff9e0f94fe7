"""The memory that is free, and the refusal of work that cannot fit into it."""

import gc
import resource
from pathlib import Path

import jax

from rehyat_jax.errors import InputError

WORTH_A_SEARCH = 2**26
"""Bytes of a model from which on a search for garbage is made. It takes up to seconds where much was compiled. The
smallest published model, Wan's VAE in bfloat16, has four times as many, and umT5 may have been dropped before it."""


def free_dropped_models(nbytes: int) -> None:
    """Frees the arrays of models that nothing refers to any more.

    Flax's `to_pure_dict` leaves a cycle of references to every array. Python's own search for garbage may be late.

    Args:
      nbytes: bytes of the model that was dropped, or that is to be loaded. Small ones are left to Python.
    """
    if nbytes >= WORTH_A_SEARCH:
        gc.collect()


def host_bytes() -> int | None:
    """Bytes of memory that this process can still get, by the system's and its own limits; None if that is not known.

    Memory that the system can free at once, such as its cache of files, counts as free.
    """
    try:
        kibibytes = {line.split(":")[0]: int(line.split()[1]) for line in _lines("/proc/meminfo")}
        free = [1024 * (kibibytes["MemAvailable"] + kibibytes["SwapFree"])]
        used = {
            line.split(":")[0]: line.split()[1]
            for line in _lines("/proc/self/status")
            if line.startswith(("Vm", "Rss"))
        }
    except (OSError, KeyError, ValueError, IndexError):
        return None
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        free.append(limit - 1024 * int(used["VmSize"]))
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:  # the limit of a container, most of which its own cache of files may take
            free.append(int(Path(file).read_text()) - 1024 * (int(used["RssAnon"]) + int(used["RssShmem"])))
        except (OSError, ValueError):  # there is none, or it is "max"
            continue
    return max(min(free), 0)


def device_bytes(device: jax.Device) -> int | None:
    """Bytes of memory that a device can still give; None if that is not known. CPU devices share the host's memory."""
    if device.platform == "cpu":
        return host_bytes()
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    return max(stats["bytes_limit"] - stats.get("bytes_in_use", 0), 0)


def check_host_memory(needed: int, what: str, remedy: str) -> None:
    """Raises InputError if the host cannot give `needed` bytes."""
    _check(needed, host_bytes(), what, "of memory", remedy)


def fits_device(needed: int, *, devices: int = 1) -> bool:
    """True unless it is known that `devices` devices of this process cannot give `needed` bytes each."""
    device = jax.local_devices()[0]
    free = device_bytes(device)
    return free is None or needed * (devices if device.platform == "cpu" else 1) <= free


def check_device_memory(needed: int, what: str, remedy: str, *, devices: int = 1) -> None:
    """Raises InputError if `devices` devices of this process, each of which needs `needed` bytes, cannot give them."""
    device = jax.local_devices()[0]
    total = needed * (devices if device.platform == "cpu" else 1)
    _check(total, device_bytes(device), what, f"of memory of {device.device_kind}", remedy)


def check_step_memory(compiled: jax.stages.Compiled, what: str, remedy: str) -> None:
    """Raises InputError if the arrays of a compiled step, except its arguments, do not fit into memory."""
    sizes = compiled.memory_analysis()
    if sizes is None:
        return
    mesh = jax.sharding.get_mesh()
    check_device_memory(
        sizes.temp_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
        what,
        remedy,
        devices=1 if mesh.empty else len(mesh.local_devices),
    )


def _check(needed: int, free: int | None, what: str, place: str, remedy: str) -> None:
    if free is not None and needed > free:
        raise InputError(
            f"{what}: needs at least {needed / 1e9:,.3g} GB {place}, found {free / 1e9:,.3g} GB free; {remedy}"
        )


def _lines(file: str) -> list[str]:
    return Path(file).read_text().splitlines()
