"""Checks text from files that are not trusted, and prepares it for a terminal."""

import difflib
from collections.abc import Iterable
from pathlib import Path

from rehyat_jax.errors import InputError


def shown(text: object, width: int = 200) -> str:
    """A text on one line of at most `width` characters, at least 60; the middle of a longer text is left out.

    Control characters and lone surrogates are escaped as `repr` does, so that a terminal obeys none of them.
    """
    text = str(text)
    # An escape is never shorter than its character, so neither end needs more than `width` characters of the text.
    head = _escaped(text[:width])
    if len(text) <= width and len(head) <= width:
        return head
    gap = f" ... ({len(text)} characters) ... "
    kept = width - len(gap)
    return head[: kept - kept // 2] + gap + _escaped(text[-width:])[-(kept // 2) :]


def _escaped(text: str) -> str:
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def is_text(text: str) -> bool:
    """False for text that has no UTF-8 form: Python keeps other bytes of file names and command lines as surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_path(path: Path) -> None:
    """Raises InputError for a path that is not UTF-8, which TensorStore and ArrayRecord cannot open."""
    if not is_text(str(path)):
        raise InputError(f"{path}: expected a path in UTF-8, found other bytes in it; choose another place")


def closest(name: str, known: Iterable[str]) -> list[str]:
    """All known names, the one most like `name` first. A long name is compared by its beginning."""
    known = list(known)
    return difflib.get_close_matches(name[:200], known, n=len(known), cutoff=0)
