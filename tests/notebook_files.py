"""The notebooks of `notebooks/`: their files, and the rules that the stored ones keep."""

import ast
import builtins
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbformat import NotebookNode

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"

SETTINGS = "settings"
"""The tag of a cell that `make notebooks` replaces by settings of a tiny size."""

LARGEST_BYTES = 1_000_000

MACHINE = re.compile(r"/(?:home|root|tmp|work|Users|opt|usr)/|(?i:warning)|\[rank|\bW\d{4} |\bE\d{4} ")
"""Paths and messages of the machine that executed a notebook. No reader can use them."""


def notebook_files() -> list[Path]:
    return sorted(NOTEBOOKS.glob("*.ipynb"))


def read_notebook(file: Path) -> NotebookNode:
    """The notebook of a file, in the format that this program writes. Raises if it is not valid."""
    notebook = nbformat.read(file, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    return notebook


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown_text(cell: NotebookNode) -> str:
    """All text that a cell's outputs show. The bytes of pictures and videos are left out."""
    shown = []
    for output in cell.outputs:
        data = output.get("data", {})
        texts = [output.get("text", ""), *(data.get(kind, "") for kind in ("text/plain", "text/html"))]
        shown += [re.sub(r"data:[\w/]+;base64,[\w+/=]+", "", text) for text in texts]
    return "\n".join(shown)


def output_problems(notebook: NotebookNode) -> list[str]:
    """What the outputs have that a reader should not see: errors, other orders of execution, messages of a machine."""
    problems = []
    for number, cell in enumerate(code_cells(notebook), 1):
        where = f"code cell {number}"
        if cell.execution_count != number:
            problems.append(f"{where}: expected execution count {number}, found {cell.execution_count}")
        problems += [f"{where}: {output.ename}" for output in cell.outputs if output.output_type == "error"]
        problems += [f"{where}: {line}" for line in shown_text(cell).splitlines() if MACHINE.search(line)]
    return problems


def sections(notebook: NotebookNode) -> list[str]:
    """The code of every section. A section begins at a cell of text with a heading "## "."""
    code = [""]
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and re.search(r"^## ", cell.source, re.MULTILINE):
            code.append("")
        elif cell.cell_type == "code":
            code[-1] += "".join(f"{line}\n" for line in cell.source.splitlines() if not line.startswith(("%", "!")))
    return [section for section in code if section]


def undefined_names(notebook: NotebookNode) -> set[str]:
    """Names that a section uses and neither it nor the first section defines.

    A reader may run the first section, and then any other one.
    """
    first, *others = (ast.parse(section) for section in sections(notebook))
    known = set(dir(builtins)) | _defined(first)
    return (_used(first) - known) | {name for other in others for name in _used(other) - known - _defined(other)}


def _defined(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.alias):
            names.add((node.asname or node.name).split(".")[0])
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
    return names


def _used(tree: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}


def missing_imports(notebook: NotebookNode) -> list[str]:
    """The names that are imported from the package, or read as `rehyat_jax.NAME`, and that it lacks."""
    names = [name for section in sections(notebook) for name in _package_names(ast.parse(section))]
    return [f"{module}.{name}" for module, name in names if not _exists(module, name)]


def _package_names(tree: ast.AST) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "rehyat_jax":
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            dotted = [alias.name.rpartition(".") for alias in node.names if alias.name.startswith("rehyat_jax.")]
            yield from ((module, name) for module, _, name in dotted)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "rehyat_jax":
            yield "rehyat_jax", node.attr


def _exists(module: str, name: str) -> bool:
    """Whether `from module import name` would work. Only packages are imported: some modules need torch."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return False
    if spec.submodule_search_locations is not None and importlib.util.find_spec(f"{module}.{name}") is not None:
        return True
    if module == "rehyat_jax":  # which defines its names when they are first used
        return name in dir(importlib.import_module(module))
    body = ast.parse(Path(spec.origin).read_text()).body
    definitions = (ast.FunctionDef, ast.ClassDef)
    return any(node.name == name if isinstance(node, definitions) else name in _defined(node) for node in body)
