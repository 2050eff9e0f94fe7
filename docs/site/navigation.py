"""Sphinx extension: the navigation of the site is the list of pages in docs/README.md.

That page is a list for readers of the repository. Every section becomes a part of the navigation, and every list item
that begins with a link becomes an entry with the link's text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sphinx.application import Sphinx  # tests read the list without Sphinx

LIST = "docs/README.md"
SECTION = re.compile(r"^## (.+)$", re.MULTILINE)
ENTRY = re.compile(r"^- \[(.+?)\]\(([^)#]+)\)", re.MULTILINE)


def sections(text: str) -> dict[str, list[tuple[str, str]]]:
    """Title of a section of docs/README.md -> its entries (title, path from the repository's root)."""
    _, *parts = SECTION.split(text)
    return {
        title: [(name, posixpath.normpath(posixpath.join("docs", path))) for name, path in ENTRY.findall(body)]
        for title, body in zip(parts[::2], parts[1::2], strict=True)
    }


def toctrees(text: str) -> str:
    """The hidden tables of contents, in Sphinx's Markdown, of the text of docs/README.md."""
    made = []
    listed = sections(text)
    listed[next(iter(listed))].append(("All pages", LIST))
    for title, entries in listed.items():
        lines = [f"{name} </{posixpath.splitext(path)[0]}>" for name, path in entries]
        made += ["```{toctree}", ":hidden:", f":caption: {title}", "", *lines, "```", ""]
    return "\n".join(made)


def _append_to_start_page(app: Sphinx, docname: str, source: list[str]) -> None:
    if docname == app.config.root_doc:
        file = Path(app.srcdir, LIST)
        app.env.note_dependency(str(file))
        source[0] += "\n" + toctrees(file.read_text(encoding="utf-8"))


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers the extension."""
    app.connect("source-read", _append_to_start_page)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
