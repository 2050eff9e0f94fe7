"""Sphinx extension: the directive `command-help` shows what a command prints with --help."""

import contextlib
import io
import os
import sys
from unittest import mock

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.application import Sphinx

from rehyat_jax import __main__ as rehyat


def help_of(command: str) -> str:
    """What `rehyat COMMAND --help` prints, in lines of at most 100 characters. Raises ValueError if that is no help."""
    printed = io.StringIO()
    sys.modules.pop(f"rehyat_jax.{command.split()[0]}", None)  # runpy warns of a module that was imported
    with (
        mock.patch.object(sys, "argv", []),
        mock.patch.dict(os.environ, {"COLUMNS": "100"}),
        contextlib.redirect_stdout(printed),
        contextlib.suppress(SystemExit),
    ):
        rehyat.main([*command.split(), "--help"])
    if "xample:" not in printed.getvalue():
        raise ValueError(f"rehyat {command} --help printed no help: {printed.getvalue()[:200]!r}")
    return printed.getvalue().strip("\n")


class CommandHelp(Directive):
    """A block with the help of a command, such as "prepare latents"."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        """The block, as Sphinx wants it."""
        text = help_of(self.arguments[0])
        return [nodes.literal_block(text, text, language="text")]


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers the extension."""
    app.add_directive("command-help", CommandHelp)
    return {"parallel_read_safe": False, "parallel_write_safe": True}
