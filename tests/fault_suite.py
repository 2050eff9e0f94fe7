"""Runs the train command and does to it what machines do: kills, damage, full disks, signals. Prints a table.

    python tests/fault_suite.py [--seed 0] [--kills 30] [--only kills,damage,...]

Needs root for the full and the read-only disk, which are a tmpfs. Takes about 20 minutes on two quiet cores.
"""

import argparse
import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from fault_runs import DAMAGE, FaultRun, saved, saved_model
from safetensors.numpy import load_file
from tiny_runs import digits_config

from rehyat_jax.benchmarks.environment import describe_environment
from rehyat_jax.train import main as train_main
from rehyat_jax.training.checksums import MAY_BE_MISSING, NOT_COVERED

STEPS, EVERY = 240, 5
HALVES = 12
"""Steps of the runs that are stopped half way."""
STAGES = {
    "pretrain": {"accumulation_steps": 2},
    "distill": {"ema_decay": 0.0, "optimizer.clip_norm": 0.0},
    "finetune": {"optimizer.name": "muon", "accumulation_steps": 2},
}
SECTIONS = {}


def section(function):
    SECTIONS[function.__name__] = function
    return function


class Report:
    """Rows of the table, printed as they come."""

    def __init__(self):
        self.failures = 0
        print("| what | times | exactly as without it | worst case |\n|---|---|---|---|", flush=True)

    def row(self, what, good, times, worst=""):
        self.failures += good != times
        print(f"| {what} | {times} | {good} | {worst} |", flush=True)


class Suite:
    def __init__(self, folder, seed, kills):
        self.folder, self.rng, self.kills = folder, np.random.default_rng(seed), kills
        self.report = Report()
        self._references = {}

    def run(self, stage, name, **changes):
        """A run yet to be started."""
        changes = {"steps": STEPS, "checkpoint_every": EVERY, **STAGES[stage], **changes}
        return FaultRun(self.folder, digits_config(self.folder, stage, **changes), name)

    def reference(self, stage="finetune", steps=STEPS):
        """A run that nothing happens to, all of whose checkpoints stay."""
        if (stage, steps) not in self._references:
            run = self.run(stage, f"reference_{stage}_{steps}", steps=steps, keep_every=1)
            assert run.start().end(seconds=1200) == 0, run.log.read_text()
            self._references[stage, steps] = run
        return self._references[stage, steps]

    def newest_is_exact(self, run):
        """Whether the newest checkpoint is, to the bit, the reference's of that step."""
        return not run.steps() or self.is_same(run, self.reference(), run.steps()[-1])

    def is_same(self, run, reference, step):
        found, expected = (saved(r.checkpoints / str(step)) for r in (run, reference))
        descriptions = [json.loads(checkpoint.pop("run")) for checkpoint in (found, expected)]
        return found == expected and descriptions[0]["data"] == descriptions[1]["data"]

    def ends_exactly(self, run, *arguments, reference=None):
        """Lets a run go to its end; whether losses, state and model are, to the bit, the reference's."""
        reference = reference or self.reference()
        return (
            run.start(*arguments).end(seconds=1200) == 0
            and run.metrics() == reference.metrics()
            and not list(run.workdir.glob(".*"))
            and saved_model(run.workdir) == saved_model(reference.workdir)
            and self.is_same(run, reference, run.steps()[-1])
        )


@section
def resume(suite):
    """Half of every stage in one process, the other half in another, with another number of workers."""
    for stage in STAGES:
        reference = suite.reference(stage, HALVES)
        run = suite.run(stage, f"halves_{stage}", steps=HALVES, checkpoint_every=100, **{"data.workers": 2})
        run.start()
        run.wait_for(lambda run=run: run.last_step() >= HALVES // 3)
        code = run.end(signal.SIGTERM)
        stopped = run.last_step()
        good = code == 75 and stopped < HALVES
        good = good and suite.ends_exactly(run, "--config.data.workers=1", reference=reference)
        suite.report.row(f"{stage}: stopped, 2 data workers before and 1 after", int(good), 1, f"after step {stopped}")


@section
def kills(suite):
    """kill -9 of one run, again and again: at random, while it trains, while it saves."""
    suite.reference()
    run = suite.run("finetune", "killed")
    outcomes = {"at any moment": [], "while it trains": [], "while it saves": []}
    while (number := sum(map(len, outcomes.values()))) < suite.kills:
        kind = list(outcomes)[number % 3]
        before = run.steps()
        run.start()
        if kind == "at any moment":
            time.sleep(suite.rng.uniform(0, 15))
        else:
            run.wait_for(lambda before=before: run.steps() != before)
            if kind == "while it saves":
                run.wait_for(run.is_saving)
            time.sleep(suite.rng.uniform(0, 0.5 if kind == "while it trains" else 0.05))
        if not run.kill():
            # It had come to its end: another one.
            assert suite.ends_exactly(run)
            shutil.rmtree(run.workdir)
            continue
        lost = run.last_step() - max(run.steps(), default=0)
        whole = suite.newest_is_exact(run) and max(run.steps(), default=0) >= max(before, default=0)
        outcomes[kind].append((whole, lost))
    for kind, found in outcomes.items():
        if found:
            worst = f"{max(lost for _, lost in found)} steps to be made again"
            suite.report.row(f"kill -9 {kind}", sum(good for good, _ in found), len(found), worst)
    suite.report.row("the run that was killed, let go to its end", int(suite.ends_exactly(run)), 1)


@section
def damage(suite):
    """Every file of the newest checkpoint: a bit flipped, cut short, deleted; then on to the end by the command."""
    base = suite.run("finetune", "damaged", steps=20)
    # A shorter run, whose schedule is another: its own reference.
    assert base.start().end(seconds=600) == 0, base.log.read_text()
    expected_state, expected_model = saved(base.checkpoints / "20"), saved_model(base.workdir)
    files = sorted(path.relative_to(base.workdir) for path in (base.checkpoints / "20").rglob("*") if path.is_file())
    arguments = [f"--config={base.folder / 'damaged.py'}", f"--workdir={base.folder / 'damaged_copy'}"]
    for kind, harm in DAMAGE.items():
        good, aside = 0, 0
        for file in files:
            copy = base.folder / "damaged_copy"
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(base.workdir, copy)
            harm(copy / file, suite.rng)
            output = io.StringIO()
            with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
                code = train_main(arguments)
            was_set_aside = (copy / "checkpoints" / "damaged-20").exists()
            told = "checkpoint 20 is damaged" in output.getvalue() and "after step 15" in output.getvalue()
            aside += was_set_aside
            is_needed = file.name not in NOT_COVERED[1:] or len(file.parts) > 3
            is_needed &= kind != "delete" or str(file).removeprefix("checkpoints/20/") not in MAY_BE_MISSING
            good += (
                code == 0
                and was_set_aside == told == is_needed
                and saved(copy / "checkpoints" / "20") == expected_state
                and saved_model(copy) == expected_model
            )
        suite.report.row(f"each file of the newest checkpoint: {kind}", good, len(files), f"found in {aside}")


@section
def signals(suite):
    """SIGTERM while the run compiles, between steps, while it saves."""
    run = suite.run("finetune", "stopped")
    cases = {
        "while it compiles": lambda: run.wait_for(lambda: "finetune:" in run.log.read_text()),
        "while it trains": lambda: run.wait_for(lambda: run.last_step() >= 7),
        "while it saves": lambda: run.wait_for(lambda: run.last_step() >= 30 and run.is_saving()),
    }
    for kind, wait in cases.items():
        cache = {"JAX_ENABLE_COMPILATION_CACHE": "0"} if kind == "while it compiles" else {}
        run.start(**cache)
        wait()
        if kind == "while it compiles":
            time.sleep(1)
        started = time.monotonic()
        code = run.end(signal.SIGTERM)
        took = time.monotonic() - started
        lost = run.last_step() - max(run.steps(), default=0)
        suite.report.row(f"SIGTERM {kind}", int((code, lost) == (75, 0)), 1, f"{took:.1f} s to exit code {code}")
    suite.report.row("the run that was stopped, let go to its end", int(suite.ends_exactly(run)), 1)


@section
def disks(suite):
    """A full disk and a read-only one: a tmpfs as large as two checkpoints and a bit."""
    size = sum(path.stat().st_size for path in (suite.reference().checkpoints / "5").rglob("*"))
    with tempfile.TemporaryDirectory(dir=suite.folder) as disk:
        mount = lambda options: subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "none", disk], check=True, capture_output=True
        )
        for what, kilobytes in (("before a save", 2.2), ("in the middle of one", 2.9)):
            mount(f"size={int(kilobytes * size / 1000)}k")
            run = suite.run("finetune", f"full_{kilobytes}", checkpoint_dir=f"{disk}/checkpoints")
            code = run.start().end()
            told = "space" in run.log.read_text() and "give the same command again" in run.log.read_text()
            exact = suite.newest_is_exact(run)
            mount("remount,size=100m")
            good = code == 2 and told and exact and bool(run.steps()) and suite.ends_exactly(run)
            suite.report.row(f"disk full {what}, then more room", int(good), 1, f"exit code {code}")
            mount("remount,ro")
            code = run.start().end()
            told = "Read-only file system" in run.log.read_text()
            suite.report.row("checkpoints on a read-only disk", int(code == 2 and told), 1, f"exit code {code}")
            subprocess.run(["umount", disk], check=True)


@section
def data(suite):
    """A data worker that is killed."""
    run = suite.run("finetune", "worker", **{"data.workers": 1})
    run.start()
    run.wait_for(lambda: run.last_step() >= 12)
    children = subprocess.run(["pgrep", "-P", str(run.process.pid)], capture_output=True, text=True).stdout.split()
    for child in children:
        os.kill(int(child), signal.SIGKILL)
    code = run.end()
    lost = run.last_step() - max(run.steps(), default=0)
    good = code == 2 and lost == 0 and suite.ends_exactly(run, "--config.data.workers=0")
    suite.report.row("data worker killed, then none", int(good), 1, f"exit code {code}, {lost} steps to be made again")


@section
def divergence(suite):
    """A learning rate that makes every later loss overflow."""
    changes = {"optimizer.learning_rate": 1e25, "optimizer.muon_learning_rate": 1e25, "max_skipped": 5}
    run = suite.run("finetune", "diverged", **changes)
    code = run.start().end()
    batch = load_file(next(run.workdir.glob("skipped_step_*.safetensors")))
    kept = saved(run.checkpoints / str(run.steps()[-1]))
    finite = all(
        np.isfinite(np.frombuffer(kept[name], np.float32)).all() for name in kept if name.startswith("['params']")
    )
    good = code == 4 and finite and batch["latents"].ndim == 6
    suite.report.row("loss that is not finite from some step on", int(good), 1, f"exit code {code}")


@section
def cache(suite):
    """Entries of the compilation cache cut short, as a kill may leave them."""
    for entry in (suite.folder / "cache").iterdir():
        DAMAGE["truncate"](entry, suite.rng)
    run = suite.run("finetune", "cache")
    good = suite.ends_exactly(run)
    suite.report.row("every entry of the compilation cache cut short", int(good), 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--only", type=lambda names: names.split(","), default=list(SECTIONS))
    arguments = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        # For what runs in this process, as in the others.
        jax.config.update("jax_disable_most_optimizations", True)
        jax.config.update("jax_compilation_cache_dir", f"{folder}/cache")
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        suite = Suite(Path(folder), arguments.seed, arguments.kills)
        for name in arguments.only:
            SECTIONS[name](suite)
        print(f"\n{describe_environment()}; {(time.monotonic() - started) / 60:.0f} minutes", flush=True)
    return 1 if suite.report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
