"""Sphinx extension: reads the docstrings of this package.

A docstring here is plain text in Google's style. `code` has single backticks, and an indented paragraph is shown as it
is. The other characters that reStructuredText would read as markup, as in |x| or *args, have no meaning.
"""

import itertools
import re
from typing import Any

from sphinx.application import Sphinx
from sphinx.ext.napoleon import Config, GoogleDocstring

import rehyat_jax

CODE = re.compile(r"(`+[^`]+`+)")
MARKUP = re.compile(r"[*|\\]|_(?!\w)")
NAPOLEON = Config(
    napoleon_custom_sections=[("Attributes", "params_style")],  # a dataclass takes its attributes as parameters
    napoleon_use_rtype=False,
)


def as_restructured_text(lines: list[str]) -> list[str]:
    """A docstring's lines with literal blocks for its indented paragraphs, and with all markup but code escaped."""
    result: list[str] = []
    above, literal = 0, False  # the indentation of the last line of text; whether this line is in a literal block
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if line and literal and indent <= above:
            literal = False
        if line and not literal and result and not result[-1] and indent > above:
            literal = True
            result += [" " * above + "::", ""]
        if line and not literal:
            above = indent
        result.append(line if literal else _escaped(line))
    return result


def _escaped(line: str) -> str:
    """A line with backslashes before all markup outside code, and between code and what follows it, as in `name`s."""
    text_and_code = CODE.split(line)
    text = [MARKUP.sub(lambda match: "\\" + match[0], part) for part in text_and_code[::2]]
    code = [f"{part}\\ " for part in text_and_code[1::2]]
    return "".join(itertools.chain.from_iterable(itertools.zip_longest(text, code, fillvalue="")))


def _process(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    # Napoleon's own extension would take the words before a colon as the type of an attribute.
    lines[:] = GoogleDocstring(as_restructured_text(lines), NAPOLEON).lines()


def _skip(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """True for fields of a NamedTuple, which its docstring describes, and for public names, which docs/api.md has."""
    if (getattr(obj, "__doc__", None) or "").startswith("Alias for field number"):
        return True
    in_module_page = what == "module" and app.env.docname.startswith("docs/modules/")
    if in_module_page and name in rehyat_jax.__all__ and obj is getattr(rehyat_jax, name):
        return True
    return None


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers the extension."""
    app.connect("autodoc-process-docstring", _process)
    app.connect("autodoc-skip-member", _skip)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
