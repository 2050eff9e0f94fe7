"""Sphinx's configuration of the documentation site: `make docs` builds it, docs/development.md describes it.

The source folder is the repository itself, so that the same relative links work on GitHub and in the site.
"""

import sys
import tomllib
from importlib.metadata import version as version_of
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT), str(HERE)]

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

project = PROJECT["name"]
author = "the authors of rehyat_jax"
release = version = version_of(project)
repository = PROJECT["urls"].get("Repository", "")
"""The public address of the repository: set it in pyproject.toml. Without it the site has no links to GitHub."""

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    # docs/site/
    "command_help",
    "docstrings",
    "modules",
    "navigation",
]

# ------------------------------------------------------------------------------------------------------------- pages

root_doc = "README"
include_patterns = ["*.md", "docs/**", "launch/*.md", "notebooks/*.ipynb"]
exclude_patterns = [".*", "assets", "build", "dist", "docs/site", "rehyat_jax", "runs", "tests"]
templates_path = ["_templates"]
html_additional_pages = {"index": "index.html"}  # leads to the start page, README.html

myst_heading_anchors = 4
myst_links_external_new_tab = True
highlight_language = "text"  # of indented blocks: commands, equations and what programs print
linkcheck_ignore = ["http://localhost"]
nb_execution_mode = "off"  # `make notebooks` executes them; the site shows the outputs that they store

# -------------------------------------------------------------------------------------------------------- docstrings

autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
add_module_names = False
viewcode_follow_imported_members = False  # every name is documented by its own module
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 100
suppress_warnings = ["ref.python"]  # a type such as bytes is also the name of some attributes
default_role = "py:obj"  # `name`: a link if the site has that name, otherwise code

# -------------------------------------------------------------------------------------------------------- appearance

html_theme = "sphinx_book_theme"
html_title = "rehyat_jax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_theme_options = {
    "home_page_in_toc": True,
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "use_download_button": False,
    **({"repository_url": repository, "use_repository_button": True} if repository else {}),
}
