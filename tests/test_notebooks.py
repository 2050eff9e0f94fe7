"""The stored notebooks: complete, executed in order, for any reader's machine. `make notebooks` executes them."""

import ast
import sys
from typing import Any
from unittest import mock

import jax
import nbformat
import pytest
from jax.experimental.compilation_cache import compilation_cache
from notebook_files import (
    LARGEST_BYTES,
    NOTEBOOKS,
    SETTINGS,
    code_cells,
    missing_imports,
    notebook_files,
    output_problems,
    read_notebook,
    sections,
    undefined_names,
)
from run_notebooks import TINY_SETTINGS

from rehyat_jax.errors import InputError

FILES = notebook_files()


def notebook_of(*cells: str, **outputs) -> nbformat.NotebookNode:
    """A notebook of code cells, each a section of its own, executed in order."""
    made = []
    for number, source in enumerate(cells, 1):
        made.append(nbformat.v4.new_markdown_cell("## A section"))
        made.append(nbformat.v4.new_code_cell(source, execution_count=number, **outputs))
    return nbformat.v4.new_notebook(cells=made)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_notebook_is_stored_as_it_was_executed_from_top_to_bottom(file):
    notebook = read_notebook(file)
    assert output_problems(notebook) == []
    pictures = [
        output for cell in code_cells(notebook) for output in cell.outputs if "image/png" in output.get("data", {})
    ]
    assert pictures, "a notebook has pictures"
    assert file.stat().st_size < LARGEST_BYTES


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_notebook_s_sections_need_only_names_that_exist(file):
    notebook = read_notebook(file)
    assert undefined_names(notebook) == set()
    assert missing_imports(notebook) == []


def test_the_tiny_settings_are_those_of_the_notebook_for_colab():
    (settings,) = [
        cell for file in FILES for cell in read_notebook(file).cells if SETTINGS in cell.metadata.get("tags", ())
    ]
    code = "\n".join(line for line in settings.source.splitlines() if not line.startswith("%"))
    names = lambda code: [node.targets[0].id for node in ast.parse(code).body if isinstance(node, ast.Assign)]
    assert names(code) == names(TINY_SETTINGS)
    assert "Wan-AI/Wan2.1" in code, "the stored settings are not the tiny ones"


def test_the_checks_find_what_they_look_for():
    first = "import rehyat_jax\na = 1"
    assert undefined_names(notebook_of(first, "b = a", "print(b)")) == {"b"}
    assert undefined_names(notebook_of(first, "b = [c for c in (a,)]", "def f(b):\n    return b")) == set()
    wrong = notebook_of(
        "from rehyat_jax.train import no_such\nimport rehyat_jax\nrehyat_jax.neither, rehyat_jax.WanVae"
    )
    assert missing_imports(wrong) == ["rehyat_jax.train.no_such", "rehyat_jax.neither"]
    printed = lambda text: [nbformat.v4.new_output("stream", text=text)]
    assert output_problems(notebook_of("1", "2", outputs=printed("wrote runs/a.mp4"))) == []
    for text in ("/home/me/runs/a.mp4", "WARNING:absl: slow"):
        assert output_problems(notebook_of("1", outputs=printed(text))) == [f"code cell 1: {text}"]
    notebook = notebook_of("1", "2")
    notebook.cells[1].execution_count = 3
    assert output_problems(notebook) == ["code cell 1: expected execution count 1, found 3"]
    notebook.cells[3].outputs = [nbformat.v4.new_output("error", ename="NameError", evalue="", traceback=[])]
    assert output_problems(notebook)[1:] == ["code cell 2: NameError"]


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    """A working folder in which no section has run; the kernel's modules are replaced."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "IPython.display", mock.MagicMock())
    cache = jax.config.jax_compilation_cache_dir
    yield tmp_path
    jax.config.update("jax_compilation_cache_dir", cache)
    compilation_cache.reset_cache()


@pytest.mark.parametrize("name", ["convert_and_distill_the_demo", "colab_v5e"])
def test_a_section_without_the_files_of_earlier_ones_names_what_it_misses(name, empty_folder):
    notebook = read_notebook(NOTEBOOKS / f"{name}.ipynb")
    for cell in notebook.cells:
        if SETTINGS in cell.metadata.get("tags", ()):
            cell.source = TINY_SETTINGS
            (empty_folder / "folder").mkdir()
    first, *others = sections(notebook)
    names: dict[str, Any] = {}
    exec(first, names)
    train = names["train"]

    def train_on_eight_devices(config, workdir):
        config.batch_size = 8
        return train(config, workdir)

    names["train"] = train_on_eight_devices
    refused = 0
    for code in others:
        if "assets/demo_teacher" in code:  # needs no other section
            continue
        with pytest.raises((InputError, FileNotFoundError), match=r"runs/|folder"):
            exec(code, dict(names))
        refused += 1
    assert refused >= 4
