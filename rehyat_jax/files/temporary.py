"""Names of files and directories that are being written, which say who writes them.

A process that is killed leaves them behind. Another process removes them only if their maker is known to be gone: it
ran on this machine, and no process of its number and start time is there. Numbers alone do not tell, as a container
gives its first process the same number every time.
"""

import contextlib
import os
import re
import shutil
import socket
import uuid
from pathlib import Path

KINDS = ("partial", "incomplete", "replaced")
"""A file, a directory, and what a finished directory replaces."""

LONGEST_NAME = 255
"""Most bytes of a name in the usual file systems."""

_MAKER = re.compile(r"^\.(?P<name>.+)\.(?P<host>\w+)-(?P<number>\d+)-(?P<start>\d+)-[0-9a-f]{8}\.(?P<kind>\w+)$")


def new_token() -> str:
    """This process's mark in a name, different in every call: host, process number, start time, random digits."""
    return f"{_host()}-{os.getpid()}-{_start_time(os.getpid())}-{uuid.uuid4().hex[:8]}"


def temporary_path(path: Path, token: str, kind: str) -> Path:
    """The temporary path next to `path`, for one of `KINDS`. A long name is shortened, except of what is replaced."""
    end = f".{token}.{kind}"
    name = path.name
    if kind != "replaced" and len(os.fsencode(name)) <= LONGEST_NAME:
        # The token makes the name unique. What is replaced is put back under its complete name.
        room = LONGEST_NAME - len(os.fsencode(end)) - 1
        name = os.fsencode(name)[:room].decode(errors="ignore")
    return path.with_name(f".{name}{end}")


def remove_leftovers(folder: Path) -> None:
    """Removes what killed processes of this machine left in a folder.

    If one was killed while it replaced a directory, and that directory is missing, it is put back. Leftovers
    of other users, and those that another process removes at the same time, are skipped.
    """
    for path in folder.glob(".*"):
        found = _MAKER.match(path.name)
        if found is None or found["kind"] not in KINDS or not _is_gone(found):
            continue
        replaced = path.with_name(found["name"])
        with contextlib.suppress(OSError):
            if found["kind"] == "replaced" and not os.path.lexists(replaced):
                path.rename(replaced)
            else:
                remove(path)


def remove(path: Path) -> None:
    """Removes a directory, file or link, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _is_gone(maker: re.Match[str]) -> bool:
    number, start = int(maker["number"]), int(maker["start"])
    return maker["host"] == _host() and _start_time(number) != start


def _host() -> str:
    return re.sub(r"\W", "_", socket.gethostname())[:40]


def _start_time(number: int) -> int:
    """When a process began, in clock ticks since the machine started; -1 if there is none of that number.

    Without /proc, as on macOS, 0 for every process that is there.
    """
    try:
        # The name, in parentheses, may hold spaces. The start is the 20th field after it.
        return int(Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        pass
    if Path("/proc/self/stat").exists():
        return -1
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return -1
    except PermissionError:
        pass
    return 0
