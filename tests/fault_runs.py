"""Runs of the train command as processes, to be killed, and what they left on disk."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from tiny_runs import write_config

ROOT = Path(__file__).parent.parent


class FaultRun:
    """One run of the train command, started as often as it takes.

    Args:
      folder: receives everything; its `cache` keeps what was compiled, for other runs beside it too.
      config: of the run.
    """

    def __init__(self, folder, config, name="run"):
        self.folder, self.workdir = folder, folder / name
        self.checkpoints = Path(config.checkpoint_dir or self.workdir / "checkpoints")
        self._config_file, self.log = folder / f"{name}.py", folder / f"{name}.log"
        write_config(self._config_file, config)
        self.process = None

    def start(self, *arguments, within=(), **environment):
        """Starts the command anew, `within` another one; what it prints goes to `log`."""
        command = [*within, sys.executable, "-m", "rehyat_jax.train"]
        command += [f"--config={self._config_file}", f"--workdir={self.workdir}", *arguments]
        environment = (
            os.environ
            | environment
            | {
                "JAX_PLATFORMS": "cpu",
                "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
                "JAX_COMPILATION_CACHE_DIR": str(self.folder / "cache"),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            }
        )
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log)
        return self

    def wait_for(self, condition, seconds=300):
        """Whether a condition came to hold before the process ended."""
        deadline = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None:
                return False
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.003)
        return True

    def end(self, number=None, seconds=300):
        """Sends a signal, if any, and waits for the exit code."""
        if number is not None and self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise

    def kill(self):
        """kill -9; whether the process was still there to be killed."""
        return self.end(signal.SIGKILL) == -signal.SIGKILL

    def steps(self):
        """Steps of the checkpoints that are there."""
        if not self.checkpoints.exists():
            return []
        return sorted(int(path.name) for path in self.checkpoints.iterdir() if path.name.isdecimal())

    def is_saving(self):
        return self.checkpoints.exists() and any("tmp" in path.name for path in self.checkpoints.iterdir())

    def metrics(self):
        """The lines of metrics.jsonl, but for one that a kill left half written."""
        file = self.workdir / "metrics.jsonl"
        if not file.exists():
            return []
        return [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def last_step(self):
        return max((line["step"] for line in self.metrics()), default=0)


def saved(checkpoint):
    """Everything in a checkpoint, {name: bytes}: arrays, and the description as JSON."""
    state = ocp.PyTreeCheckpointer().restore(checkpoint / "state")
    leaves = jax.tree_util.tree_leaves_with_path(state)
    found = {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}
    return found | {"run": (checkpoint / "run" / "metadata").read_bytes()}


def saved_model(workdir, name="model"):
    """The resulting model's arrays, {name: bytes}."""
    params = ocp.PyTreeCheckpointer().restore((workdir / name / "params").absolute())
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}


@contextlib.contextmanager
def tmpfs(folder, size):
    """A small disk at a folder, which is made if needed; yields a function that mounts it again with other options."""
    folder.mkdir(exist_ok=True)

    def mount(options):
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(folder)], check=True, capture_output=True)

    mount(f"size={size}")
    try:
        yield lambda options: mount(f"remount,{options}")
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder):
    """Leaves no room on a disk; returns the file that takes it."""
    file = folder / "filling"
    with contextlib.suppress(OSError), file.open("wb", buffering=0) as stream:
        while stream.write(bytes(2**12)):
            pass
    return file


def flip(path, rng):
    """One bit of a file, at random."""
    content = bytearray(path.read_bytes())
    bit = int(rng.integers(8 * len(content)))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def truncate(path, rng):
    size = path.stat().st_size
    os.truncate(path, int(rng.integers(size)))


def delete(path, rng):
    path.unlink()


DAMAGE = {"flip": flip, "truncate": truncate, "delete": delete}
