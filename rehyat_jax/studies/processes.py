"""Runs commands as processes, some side by side, with one progress bar, and stops them together.

A task is a list of commands that run one after another, such as the training runs of one variant and its measurement.
A command whose result exists is not repeated. A command that fails ends its task and no other.
"""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, Self

from tqdm import tqdm

from rehyat_jax.errors import RunStoppedError
from rehyat_jax.files.json_files import read_json_object
from rehyat_jax.files.shown import shown
from rehyat_jax.files.write import reported_write_errors, written_whole
from rehyat_jax.training.metrics import last_step

POLL_SECONDS = 0.2


@dataclasses.dataclass(frozen=True)
class Command:
    """One process.

    Attributes:
      name: a word for it, unique in its task.
      argv: its command line.
      result: file or folder that exists as soon as it has succeeded.
      log: file to which its output is appended.
      steps: its part of the progress bar: the steps of a training run, 1 for other commands.
      workdir: the directory of its training run; None for other commands.
    """

    name: str
    argv: tuple[str, ...]
    result: Path
    log: Path
    steps: int = 1
    workdir: Path | None = None

    def steps_made(self) -> int:
        """The number of its steps that were logged; all of them if it has its result."""
        if self.result.exists():
            return self.steps
        return 0 if self.workdir is None else min(last_step(self.workdir), self.steps)


@dataclasses.dataclass(frozen=True)
class Task:
    """Commands that run one after another.

    Attributes:
      name: a few words for messages.
      commands: its commands in order.
      seconds: JSON file with the seconds that each command took, over all attempts.
    """

    name: str
    commands: tuple[Command, ...]
    seconds: Path


@dataclasses.dataclass
class _Running:
    """A task's current process."""

    task: Task
    command: Command
    process: subprocess.Popen
    log: IO[bytes]
    started: float


def run_tasks(tasks: Sequence[Task], jobs: int, environment: Mapping[str, str]) -> dict[str, str]:
    """Runs all tasks, `jobs` of them at a time.

    SIGTERM and Ctrl-C send SIGTERM to all processes, so that training runs save, and wait for them. A second Ctrl-C
    kills them.

    Args:
      tasks: the tasks, with different names.
      jobs: number of processes at a time.
      environment: variables of all processes, in addition to those of this one.

    Returns:
      Name of each task that failed -> the reason, with the log that has more.

    Raises:
      RunStoppedError: SIGTERM asked to stop. KeyboardInterrupt: Ctrl-C did.
      InputError: a log cannot be written.
    """
    waiting, failures = list(tasks), {}
    running: list[_Running] = []
    sent = 0  # the number of stop signals that were passed on
    total = sum(command.steps for task in tasks for command in task.commands)
    made = lambda: sum(command.steps_made() for task in tasks for command in task.commands)
    # The average rate from the beginning: starts and measurements are part of the time that remains.
    with _StopRequest() as stop, tqdm(total=total, initial=made(), unit="step", smoothing=0, mininterval=1) as bar:
        try:
            while waiting or running:
                while waiting and len(running) < jobs and not stop.number:
                    _start_next(waiting.pop(0), running, environment)
                if stop.count > sent:
                    waiting.clear()
                    for current in running:
                        current.process.send_signal(signal.SIGTERM) if stop.count == 1 else _kill(current.process)
                    sent = stop.count
                for current in [current for current in running if current.process.poll() is not None]:
                    running.remove(current)
                    reason = _finish(current)
                    if reason is None and not stop.number:
                        _start_next(current.task, running, environment)
                    elif reason is not None and not stop.number:
                        failures[current.task.name] = reason
                        bar.write(f"{current.task.name}: failed, {reason}", file=sys.stderr)
                        bar.total -= sum(command.steps - command.steps_made() for command in current.task.commands)
                bar.set_description(", ".join(f"{now.task.name} {now.command.name}" for now in running)[:60], False)
                bar.update(made() - bar.n)
                time.sleep(POLL_SECONDS)
        finally:
            for current in running:
                _kill(current.process)
                current.process.wait()
                current.log.close()
    if stop.number == signal.SIGINT:
        raise KeyboardInterrupt
    if stop.number:
        raise RunStoppedError("stopped by SIGTERM; training runs were saved, and the same command resumes")
    return failures


def _start_next(task: Task, running: list[_Running], environment: Mapping[str, str]) -> None:
    """Starts the first command of a task whose result is missing, if there is one."""
    for command in task.commands:
        if command.result.exists():
            continue
        with reported_write_errors(command.log):
            command.log.parent.mkdir(parents=True, exist_ok=True)
            log = command.log.open("ab")
        # A session of its own: Ctrl-C reaches this process alone, which then lets the others save.
        process = subprocess.Popen(
            command.argv,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | dict(environment),
            start_new_session=True,
        )
        running.append(_Running(task, command, process, log, time.monotonic()))
        return


def _finish(current: _Running) -> str | None:
    """Closes the log of a process that has ended and notes its seconds; returns the reason if it failed."""
    current.log.close()
    command, path = current.command, current.task.seconds
    spent = read_json_object(path) if path.exists() else {}
    spent[command.name] = round(spent.get(command.name, 0) + time.monotonic() - current.started, 1)
    with reported_write_errors(path), written_whole(path) as temporary:
        temporary.write_text(json.dumps(spent) + "\n")
    code = current.process.returncode
    if code == 0 and command.result.exists():
        return None
    lines = command.log.read_text(errors="replace").replace("\r", "\n").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
    how = f"exit code {code}" if code >= 0 else f"signal {-code}"
    return f"{command.name} ended with {how}: {shown(last, 500)} ({command.log})"


def _kill(process: subprocess.Popen) -> None:
    """Kills a process and those that it started, such as its data workers."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


class _StopRequest:
    """Notes SIGINT and SIGTERM while the block runs.

    Attributes:
      number: the first signal; 0 if there was none.
      count: 1 after the first signal, and 1 more after every further Ctrl-C.
    """

    def __init__(self) -> None:
        self.number = self.count = 0
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._stack.callback(signal.signal, number, signal.signal(number, self._note))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.count += number == signal.SIGINT or not self.number
        self.number = self.number or number
