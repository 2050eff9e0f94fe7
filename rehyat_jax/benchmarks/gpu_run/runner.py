"""Runs sections in separate processes, within their time limits and the budget, and collects their rows."""

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

from rehyat_jax.benchmarks.gpu_run.results import COMPLETE, CUT_OFF, FAILED, SKIPPED, Results, is_right
from rehyat_jax.benchmarks.gpu_run.sections import SECTIONS, Section

LEAST_SECONDS = 15
"""Seconds of the budget below which a section is skipped, because it would give no result."""


def run_sections(names: list[str], results: Results, *, budget: float, device: str, tiny: bool) -> None:
    """Runs the sections one after another until the budget is spent; those that need no GPU run next to them.

    A section that is skipped keeps the rows of an earlier run.
    """
    start = time.monotonic()
    arguments = [device, *(["tiny"] if tiny else [])]
    processes: set[subprocess.Popen] = set()

    def run(name: str) -> None:
        section, used = SECTIONS[name], time.monotonic() - start
        reason = None
        if budget - used < LEAST_SECONDS:
            reason = "the budget was spent"
        elif section.requires in results.sections and not is_right(results.sections[section.requires]):
            reason = f"{section.requires} is not right"
        if reason:
            print(f"== {name}: skipped, {reason}", flush=True)
            if not results.has_rows(name):
                results.start(name, status=SKIPPED, error=reason)
            return
        print(f"== {name}: {used:.0f} of {budget:.0f} seconds used", flush=True)
        _run_section(name, section, min(section.seconds, budget - used), arguments, results, processes)

    with ThreadPoolExecutor(1) as beside, _ended_with_this_process(processes):
        futures = [beside.submit(run, name) for name in names if SECTIONS[name].beside]
        for name in names:
            if not SECTIONS[name].beside:
                run(name)
        for future in futures:
            future.result()


def _run_section(
    name: str, section: Section, limit: float, arguments: list[str], results: Results, processes: set[subprocess.Popen]
) -> None:
    """Runs one section and stores its rows as they arrive."""
    started = time.monotonic()
    results.start(name, date=datetime.date.today().isoformat())
    environment = os.environ | {
        "XLA_PYTHON_CLIENT_MEM_FRACTION": str(section.memory_fraction),
        # The last line of a traceback is then the error, and not a remark on hidden frames.
        "JAX_TRACEBACK_FILTERING": "off",
    }
    environment.pop("XLA_CLIENT_MEM_FRACTION", None)  # jaxlib refuses both
    was_cut = threading.Event()

    def cut() -> None:
        was_cut.set()
        kill(process)

    with tempfile.TemporaryFile("w+", errors="replace") as log:
        # A separate session, so that processes that the section starts end with it.
        process = subprocess.Popen(
            command(name, section, arguments),
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
            start_new_session=True,
        )
        processes.add(process)
        timer = threading.Timer(limit, cut)
        timer.daemon = True
        timer.start()
        try:
            for number, line in enumerate(process.stdout):
                if not line.endswith("\n"):
                    break  # the process ended while it wrote the line
                if number == 0:
                    results.update(name, environment=json.loads(line))
                    continue
                results.add_row(name, json.loads(line))
                print(f"{name}: {line.strip()[:300]}", flush=True)
            code = process.wait()
        finally:
            timer.cancel()
            processes.discard(process)
        status = COMPLETE if code == 0 else CUT_OFF if was_cut.is_set() else FAILED
        results.update(name, status=status, seconds=round(time.monotonic() - started, 1))
        if code:
            log.seek(0)
            error = log.read()[-4000:]
            results.update(name, error=error)
            print(f"{name}: {status}\n{error}", file=sys.stderr, flush=True)


def command(name: str, section: Section, arguments: list[str]) -> list[str]:
    """The command line of a section's process."""
    measure = [sys.executable, "-m", f"{__package__}.process", name, *arguments]
    return ["nice", "-n", "19", *measure] if section.beside else measure


def kill(process: subprocess.Popen) -> None:
    """Kills a process and all processes that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


@contextlib.contextmanager
def _ended_with_this_process(processes: set[subprocess.Popen]) -> Iterator[None]:
    """Kills all sections when this process is stopped. The file already holds their rows."""

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
