"""What killed processes leave behind is removed, and nothing else."""

import os
import signal
import subprocess
import sys
import time

import pytest

from rehyat_jax.files.new_directory import new_directory
from rehyat_jax.files.temporary import new_token, remove_leftovers, temporary_path
from rehyat_jax.files.write import written_whole

WRITES_FOR_EVER = """
import sys, time
from pathlib import Path
from rehyat_jax.files.new_directory import new_directory
from rehyat_jax.files.write import written_whole
folder = Path(sys.argv[1])
with written_whole(folder / "file") as file, new_directory(folder / "model", replace=True) as directory:
    file.write_text("half")
    (directory / "half").touch()
    print("ready", flush=True)
    time.sleep(1000)
"""

IS_KILLED_WHILE_IT_REPLACES = """
import os, signal, sys
from pathlib import Path
from rehyat_jax.files.new_directory import new_directory
rename = Path.rename
def rename_once(self, target):
    if self.name.endswith("incomplete"):
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, target)
Path.rename = rename_once
with new_directory(Path(sys.argv[1]) / "model", replace=True) as directory:
    (directory / "new").touch()
"""


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def process(program, folder):
    return subprocess.Popen([sys.executable, "-c", program, str(folder)], stdout=subprocess.PIPE, text=True)


def test_leftovers_of_a_killed_process_are_removed_and_files_of_a_living_one_are_kept(tmp_path):
    with process(WRITES_FOR_EVER, tmp_path) as living, process(WRITES_FOR_EVER, tmp_path) as killed:
        assert living.stdout.readline() == killed.stdout.readline() == "ready\n"
        assert len(names(tmp_path)) == 4
        killed.kill()
        killed.wait()
        remove_leftovers(tmp_path)
        assert len(names(tmp_path)) == 2 and all(f"-{living.pid}-" in name for name in names(tmp_path))
        living.kill()
    # A later conversion next to them removes them, too.
    with new_directory(tmp_path / "other", replace=False):
        pass
    assert names(tmp_path) == ["other"]


def test_what_a_killed_process_was_replacing_is_put_back(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").touch()
    with process(IS_KILLED_WHILE_IT_REPLACES, tmp_path) as killed:
        assert killed.wait() == -signal.SIGKILL
    assert "model" not in names(tmp_path) and len(names(tmp_path)) == 2
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["model"] and names(tmp_path / "model") == ["old"]


@pytest.mark.parametrize("kind", ["partial", "incomplete"])
def test_a_number_that_belongs_to_a_newer_process_is_no_longer_the_maker(tmp_path, kind):
    host, number, start, digits = new_token().split("-")
    earlier = temporary_path(tmp_path / "x", f"{host}-{number}-{int(start) - 1}-{digits}", kind)
    mine = temporary_path(tmp_path / "x", f"{host}-{number}-{start}-{digits}", kind)
    elsewhere = temporary_path(tmp_path / "x", f"another_{host}-{number}-{int(start) - 1}-{digits}", kind)
    for path in (earlier, mine, elsewhere):
        path.mkdir()
    remove_leftovers(tmp_path)
    assert names(tmp_path) == sorted([mine.name, elsewhere.name])


def test_other_programs_files_are_kept(tmp_path):
    others = [
        ".download.partial",
        ".x.incomplete",
        ".y.replaced",
        f".z.{os.getpid()}.incomplete",
        ".v.0123abcd.partial",
    ]
    for name in others:
        (tmp_path / name).touch()
    with written_whole(tmp_path / "file") as file:
        file.write_text("new")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == sorted([*others, "file"])


def test_two_processes_write_one_directory_and_the_first_to_end_keeps_it(tmp_path):
    with new_directory(tmp_path / "model", replace=True) as first:
        with process(WRITES_FOR_EVER, tmp_path) as other:
            assert other.stdout.readline() == "ready\n"
            assert first.is_dir()
            other.kill()
        time.sleep(0.1)
        (first / "mine").touch()
    assert names(tmp_path / "model") == ["mine"]
