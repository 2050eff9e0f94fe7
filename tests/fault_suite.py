"""Runs the train command and does to it what machines do: kills, damage, full disks, signals. Prints a table.

    python tests/fault_suite.py [--seed 0] [--kills 30] [--only kills,damage,...]

Needs root for the full and the read-only disk, which are a tmpfs. Takes about 40 minutes on two slow cores.
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
from fault_runs import DAMAGE, ROOT, FaultRun, fill, saved, saved_model, tmpfs
from safetensors.numpy import load_file
from tiny_runs import digits_config

from rehyat_jax.benchmarks.environment import describe_environment
from rehyat_jax.train import main as train_main
from rehyat_jax.training.checksums import MAY_BE_MISSING, NOT_COVERED
from rehyat_jax.weights.load import load_params
from rehyat_jax.weights.model_checkpoint import save_model

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
def workdirs(suite):
    """A workdir on a full disk, whose checkpoints are elsewhere; one that is full at each of the run's own files."""
    run = suite.run("finetune", "full_workdir", checkpoint_dir=str(suite.folder / "full_workdir_checkpoints"))
    with tmpfs(run.workdir, "2m"):
        run.start()
        run.wait_for(lambda: run.last_step() >= 7)
        file = fill(run.workdir)
        code = run.end()
        told = "No space left on device" in run.log.read_text().splitlines()[-1]
        lost = run.last_step() - run.steps()[-1]
        started = run.start().end()
        file.unlink()
        # The line that did not fit is lost.
        found = run.start().end(seconds=1200), run.metrics(), suite.reference().metrics()
        good = (code, started, found[0]) == (2, 2, 0) and told and lost <= 0
        good = good and len(found[2]) - len(found[1]) <= 1 and all(line in found[2] for line in found[1])
        good = good and suite.is_same(run, suite.reference(), STEPS)
    suite.report.row("workdir full, checkpoints elsewhere, then more room", int(good), 1, f"exit code {code}")

    codes, sizes = [], (4, 8, 12, 20, 40, 80)
    for size in sizes:
        run = suite.run("finetune", f"workdir_{size}k", steps=6, checkpoint_dir=str(suite.folder / f"saved_{size}k"))
        with tmpfs(run.workdir, f"{size}k"):
            codes.append(run.start().end())
            told = run.log.read_text().splitlines()[-1]
            codes[-1] = codes[-1] if "No space left on device" in told else told
    suite.report.row("workdirs of 4 to 80 kB", codes.count(2), len(sizes), "exit code 2")


@section
def neighbours(suite):
    """Another training in the workdir, and a conversion below it."""
    suite.reference()
    run, other = suite.run("finetune", "first"), suite.run("finetune", "first")
    other.log = suite.folder / "second.log"
    convert = [sys.executable, "-m", "rehyat_jax.convert"]
    to_torch = [*convert, "to-torch", suite.folder / "teacher", suite.folder / "torch", "--layout", "diffusers"]
    from_torch = [*convert, "from-torch", suite.folder / "torch", run.workdir / "converted", "--force"]
    subprocess.run(to_torch, check=True, capture_output=True, cwd=ROOT)
    run.workdir.mkdir()
    (run.workdir / "train.lock").touch()
    good, times = 0, 3
    for _ in range(times):
        conversion = subprocess.Popen(from_torch, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        run.start()
        assert run.wait_for(lambda: str(run.process.pid) in (run.workdir / "train.lock").read_text())
        whole = conversion.wait() == 0 and saved_model(run.workdir, "converted") == saved_model(suite.folder, "teacher")
        run.process.send_signal(signal.SIGSTOP)  # or it might come to its end
        code = other.start().end()
        told = f"process {run.process.pid}" in other.log.read_text()
        replaced = subprocess.run([*from_torch[:-2], run.workdir, "--force"], cwd=ROOT, capture_output=True).returncode
        run.process.send_signal(signal.SIGCONT)
        good += (code, replaced) == (2, 2) and told and whole and run.kill()
    suite.report.row("a second training and conversions beside a training", good, times, "exit code 2")
    suite.report.row("the first training, let go to its end", int(suite.ends_exactly(run)), 1)


@section
def inputs(suite):
    """The teacher and the data replaced between two steps, by others of the same shape."""
    reference, run = suite.reference("distill", HALVES), suite.run("distill", "inputs", steps=HALVES)
    run.start()
    run.wait_for(lambda: run.last_step() >= HALVES // 3)
    stopped, teacher = run.end(signal.SIGTERM), suite.folder / "teacher"
    teacher.rename(suite.folder / "own_teacher")
    config, params, metadata = load_params(suite.folder / "own_teacher")
    params["blocks"]["feed_forward"]["up"]["kernel"][-1] += 1
    save_model(teacher, config, params, **metadata)
    code = run.start().end()
    told = "files of config.init_from" in run.log.read_text()
    shutil.rmtree(teacher)
    (suite.folder / "own_teacher").rename(teacher)
    good = (stopped, code) == (75, 2) and told and suite.ends_exactly(run, reference=reference)
    suite.report.row("teacher replaced, then put back", int(good), 1, f"exit code {code}")


@section
def logs(suite):
    """Lines of the metrics that cannot be read."""
    run = suite.run("finetune", "logs", steps=HALVES)
    reference = suite.reference("finetune", HALVES)
    run.start()
    run.wait_for(lambda: run.last_step() >= HALVES // 3)
    code = run.end(signal.SIGTERM)
    with (run.workdir / "metrics.jsonl").open("ab") as file:
        file.write(b'[1]\nnull\n{"step": "x"}\n\xff\xfe\n\0\0\n' + b"[" * 10**5 + b'\n{"step": 1')
    good = code == 75 and suite.ends_exactly(run, reference=reference)
    suite.report.row("lines of the metrics that cannot be read", int(good), 1)


@section
def places(suite):
    """Places that cannot be written, and configurations that memory cannot hold."""
    run = suite.run("finetune", "places")
    (suite.folder / "file").touch()
    (suite.folder / "taken" / "metrics.jsonl").mkdir(parents=True)
    file, taken = suite.folder / "file", suite.folder / "taken"
    cases = [f"--workdir={place}" for place in (file, file / "x", "gs://bucket/x", "", "/proc/x", taken)]
    cases += [f"--config.checkpoint_dir={place}" for place in (file, file / "x", "/proc/x", "foo://x", "gs://x/y")]
    cases += ["--config.batch_size=16777216"]
    good = 0
    for case in cases:
        output = io.StringIO()
        with contextlib.redirect_stderr(output):
            code = train_main([f"--config={suite.folder / 'places.py'}", f"--workdir={run.workdir}", case])
        good += code == 2 and output.getvalue().startswith("error: ") and output.getvalue().count("\n") == 1
    suite.report.row("places that cannot be written, batches beyond memory", good, len(cases), "exit code 2")


@section
def data(suite):
    """A data worker that is killed; shared memory that is full."""
    sizes = ("4k", "64k", "250k", "400k")
    codes = []
    for size in sizes:
        run = suite.run("finetune", f"shm_{size}", steps=HALVES, **{"data.workers": 1})
        script = f'mount -t tmpfs -o size={size} none /dev/shm && exec "$@"'
        codes.append(run.start(within=["unshare", "--mount", "sh", "-c", script, "sh"]).end())
        if "(/dev/shm) is full" not in run.log.read_text():
            codes[-1] = run.log.read_text().splitlines()[-1]
    suite.report.row("shared memory full, with a data worker", codes.count(2), len(sizes), "exit code 2")

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
