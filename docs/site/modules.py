"""Sphinx extension: writes docs/modules/, a page for every package, with the docstrings of its modules.

Git ignores these pages; a build writes them anew, and leaves alone those that did not change.
"""

from pathlib import Path

from sphinx.application import Sphinx

PACKAGE = "rehyat_jax"
FOLDER = "docs/modules"
NO_MODULES = {"packaged", "__pycache__"}


def pages(root: Path) -> dict[str, str]:
    """Name of every package, as in "rehyat_jax.attention.hybrid" -> its page, in Sphinx's Markdown."""
    made = {}
    for init in sorted((root / PACKAGE).rglob("__init__.py")):
        folder = init.parent
        if not NO_MODULES.intersection(folder.relative_to(root).parts):
            made[".".join(folder.relative_to(root).parts)] = _page(root, folder)
    return made


def _page(root: Path, folder: Path) -> str:
    dotted = lambda path: ".".join(path.relative_to(root).with_suffix("").parts)
    packages = [path for path in sorted(folder.iterdir()) if (path / "__init__.py").exists() and path.is_dir()]
    modules = [path for path in sorted(folder.glob("*.py")) if not path.name.startswith("__")]
    lines = [f"# `{dotted(folder)}`", "", *_docstrings(dotted(folder))]
    if listed := [path for path in packages if path.name not in NO_MODULES]:
        lines += ["```{toctree}", ":maxdepth: 1", "", *map(dotted, listed), "```", ""]
    for module in modules:
        lines += [f"## `{dotted(module)}`", "", *_docstrings(dotted(module))]
    return "\n".join(lines)


def _docstrings(module: str) -> list[str]:
    # What a package only imports is described where it is defined.
    return ["```{eval-rst}", f".. automodule:: {module}", "   :ignore-module-all:", "```", ""]


def _write_pages(app: Sphinx) -> None:
    folder = Path(app.srcdir, FOLDER)
    folder.mkdir(exist_ok=True)
    made = {folder / f"{name}.md": page for name, page in pages(Path(app.srcdir)).items()}
    for file in set(folder.iterdir()) - made.keys():
        file.unlink()
    for file, page in made.items():
        if not file.exists() or file.read_text(encoding="utf-8") != page:
            file.write_text(page, encoding="utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers the extension."""
    app.connect("builder-inited", _write_pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
