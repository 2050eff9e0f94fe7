"""Runs sections in processes of their own, within their time limits and the budget, and collects their rows."""

import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from rehyat_jax.benchmarks.gpu_run.results import COMPLETE, CUT_OFF, FAILED, RUNNING, SKIPPED, Results, is_right
from rehyat_jax.benchmarks.gpu_run.sections import SECTIONS, Section

LEAST_SECONDS = 15
"""With less than this left, a section would give nothing."""


def run_sections(names: list[str], results: Results, *, budget: float, device: str, tiny: bool) -> None:
    """Runs the sections one after another, those that need no GPU beside them, until the budget is spent."""
    start = time.monotonic()
    arguments = [device, *(["tiny"] if tiny else [])]
    processes: set[subprocess.Popen] = set()

    def run(name: str) -> None:
        section, left = SECTIONS[name], budget - (time.monotonic() - start)
        if left < LEAST_SECONDS:
            results.update(name, status=SKIPPED, rows=[], error="the budget was spent")
            return
        if section.requires in results.sections and not is_right(results.sections[section.requires]):
            results.update(name, status=SKIPPED, rows=[], error=f"{section.requires} is not right")
            return
        print(f"== {name}: {time.monotonic() - start:.0f} of {budget:.0f} seconds used", flush=True)
        _run_section(name, section, min(section.seconds, left), arguments, results, processes)

    with _ended_with_this_process(processes), ThreadPoolExecutor(1) as beside:
        futures = [beside.submit(run, name) for name in names if SECTIONS[name].beside]
        for name in names:
            if not SECTIONS[name].beside:
                run(name)
        for future in futures:
            future.result()


def _run_section(
    name: str, section: Section, limit: float, arguments: list[str], results: Results, processes: set[subprocess.Popen]
) -> None:
    """Runs one section and keeps its rows as they come."""
    started = time.monotonic()
    results.update(name, status=RUNNING, date=datetime.date.today().isoformat(), rows=[])
    environment = os.environ | {"XLA_PYTHON_CLIENT_MEM_FRACTION": str(section.memory_fraction)}
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        # A session of its own, so that what the section starts ends with it.
        process = subprocess.Popen(
            command(name, section, arguments),
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
            start_new_session=True,
        )
        processes.add(process)
        timer = threading.Timer(limit, kill, [process])
        timer.start()
        for number, line in enumerate(process.stdout):
            if not line.endswith("\n"):
                break  # cut off while it was written
            if number == 0:
                results.update(name, environment=json.loads(line))
                continue
            row = json.loads(line)
            results.add_row(name, row)
            print(f"{name}: {line.strip()[:300]}", flush=True)
        code, was_cut = process.wait(), not timer.is_alive()
        timer.cancel()
        processes.discard(process)
        status = COMPLETE if code == 0 else CUT_OFF if was_cut else FAILED
        results.update(name, status=status, seconds=round(time.monotonic() - started, 1))
        if code:
            log.seek(0)
            error = log.read()[-4000:]
            results.update(name, error=error)
            print(
                f"{name}: {status} after {time.monotonic() - started:.0f} seconds\n{error}", file=sys.stderr, flush=True
            )


def command(name: str, section: Section, arguments: list[str]) -> list[str]:
    """What runs a section."""
    measure = [sys.executable, "-m", f"{__package__}.process", name, *arguments]
    return ["nice", "-n", "19", *measure] if section.beside else measure


def kill(process: subprocess.Popen) -> None:
    """Ends a process and what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


@contextlib.contextmanager
def _ended_with_this_process(processes: set[subprocess.Popen]) -> Iterator[None]:
    """Where this process is stopped, so are the sections; what they have yielded is in the file."""

    def stop(*_) -> None:
        for process in list(processes):
            kill(process)
        os._exit(128 + signal.SIGTERM)

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except BaseException:
        for process in list(processes):
            kill(process)
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)
