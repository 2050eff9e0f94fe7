"""Executes notebooks and stores their outputs: python tests/run_notebooks.py [NAME ...].

Without names, it executes all of `notebooks/`, each in a kernel and a folder of its own, on the CPU. It prints the
seconds of each. A notebook with an error keeps its earlier outputs. The exit code is 1 if a notebook fails, takes
longer than LIMIT_SECONDS, or its outputs would tell of this machine.

The notebook for Colab is executed at a tiny size: another cell replaces its cell of settings.
"""

import argparse
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from notebook_files import LARGEST_BYTES, SETTINGS, notebook_files, output_problems, read_notebook

LIMIT_SECONDS = 300
"""For each notebook, on two CPU cores."""

ROOT = Path(__file__).parents[1]

KERNEL_LOG = "kernel.log"
"""The file for what a kernel prints outside of its notebook, also when it ends as it should."""


def execute(notebook: NotebookNode, folder: Path) -> None:
    """Executes all cells in the folder; the notebook gets their outputs. Raises nbclient's errors."""
    from nbclient import NotebookClient

    for name in ("assets", "configs"):  # as in the root of a clone, where packaged files need no announcement
        (folder / name).symlink_to(ROOT / name)
    tiny = [cell for cell in notebook.cells if SETTINGS in cell.metadata.get("tags", ())]
    sources = [cell.source for cell in tiny]
    for cell in tiny:
        cell.source = tiny_settings(folder)
    variables = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        startup_timeout=LIMIT_SECONDS,
        timeout=2 * LIMIT_SECONDS,
        resources={"metadata": {"path": str(folder)}},
        coalesce_streams=True,
        record_timing=False,
    )
    with open(folder / KERNEL_LOG, "wb") as log:
        client.execute(env=variables, stdout=log, stderr=log)
    for cell, source in zip(tiny, sources, strict=True):
        cell.source = source
    notebook.metadata.language_info = {"name": "python"}  # not the version of this machine's Python


TINY_SETTINGS = """\
from pathlib import Path

MODELS = "folder"
RUNS = Path("runs")
PROMPTS = ["a cat runs across the green field", "dogs watch the waves"]
VIDEO = ["--frames=13", "--size=32x32", "--dtype=float32", "--steps=6"]
TRAJECTORIES = ["--steps=6", "--keep=3"]
DISTILL = {"steps": 12, "batch_size": 2, "hybrid.blocks": (1,), "data.workers": 0, "dtype": "float32"}
"""
"""In place of those of the notebook for Colab: a pipeline like that of Wan2.1, tiny and random."""


def tiny_settings(folder: Path) -> str:
    """`TINY_SETTINGS`, with their pipeline in the folder."""
    from test_pipeline import save_random_pipeline

    save_random_pipeline(folder)
    return TINY_SETTINGS


def run(file: Path) -> list[str]:
    """Executes one notebook and stores its outputs; returns what is wrong."""
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    notebook = read_notebook(file)
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        try:
            execute(notebook, Path(folder))
        except (CellExecutionError, CellTimeoutError) as error:
            return [re.sub(r"\x1b\[[\d;]*m", "", str(error))]
        except DeadKernelError as error:
            return [f"{error}\n{Path(folder, KERNEL_LOG).read_text(errors='replace')}"]
        seconds = time.monotonic() - start
    print(f"{file.name}: {seconds:.0f} seconds", flush=True)
    problems = output_problems(notebook)
    if len(nbformat.writes(notebook).encode()) > LARGEST_BYTES:
        problems.append(f"its outputs make the file larger than {LARGEST_BYTES:,} bytes")
    if not problems:
        nbformat.write(notebook, file)
    return problems + [f"it took longer than {LIMIT_SECONDS} seconds"] * (seconds > LIMIT_SECONDS)


def main() -> int:
    """Runs the notebooks of the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    files = {file.stem: file for file in notebook_files()}
    parser.add_argument("names", metavar="NAME", nargs="*", help=f"of {', '.join(files)}")
    names = parser.parse_args().names or list(files)
    if unknown := set(names) - files.keys():
        parser.error(f"expected names of {', '.join(files)}, found {', '.join(sorted(unknown))}")
    failed = False
    for name in names:
        for problem in run(files[name]):
            failed = True
            print(f"{files[name].name}: {problem}", file=sys.stderr, flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
