"""Markdown pages: links, the site's navigation, and lists that follow the code. `make docs` builds the site."""

import importlib.util
import json
import re
from pathlib import Path

import newcomer
import pytest
from markdown_it import MarkdownIt

import rehyat_jax
from rehyat_jax import __main__ as rehyat

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "launch/*.md", ".github/*.md")
    for path in ROOT.glob(pattern)
    if path.name != "PULL_REQUEST_TEMPLATE.md"
)
DOCS = ROOT / "docs"


def navigation():
    """docs/site/navigation.py, which is no package's module."""
    spec = importlib.util.spec_from_file_location("navigation", DOCS / "site" / "navigation.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tokens(page):
    """All tokens of a page of Markdown, those inside of paragraphs too."""
    for token in MarkdownIt("gfm-like", {"linkify": False}).parse(page.read_text(encoding="utf-8")):
        yield token
        yield from token.children or []


def links(page):
    """Where the links and pictures of a page lead, except to other sites."""
    targets = (token.attrGet("href") or token.attrGet("src") for token in tokens(page))
    return [target for target in targets if target and not re.match(r"\w+:", target)]


def anchors(page):
    """The anchors that GitHub gives to the headings of a page."""
    found, after_heading = {}, False
    for token in MarkdownIt("gfm-like", {"linkify": False}).parse(page.read_text(encoding="utf-8")):
        if after_heading:
            text = "".join(part.content for part in token.children)
            slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            found[slug] = found.get(slug, -1) + 1
            yield slug if not found[slug] else f"{slug}-{found[slug]}"
        after_heading = token.type == "heading_open"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings_that_exist(page):
    for target in links(page):
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(file), f"{page.name} links to {target}"


def test_the_navigation_has_every_page():
    sections = navigation().sections((DOCS / "README.md").read_text())
    listed = [path for entries in sections.values() for _, path in entries]
    assert len(listed) == len(set(listed))
    in_site = {str(path.relative_to(ROOT)) for path in [*PAGES, *ROOT.glob("notebooks/*.ipynb")]}
    assert set(listed) == in_site - {"README.md", "docs/README.md"}


def test_the_reference_has_every_public_name_and_command():
    described = re.findall(r"^\.\. auto\w+:: (?:[\w.]+\.)?(\w+)$", (DOCS / "api.md").read_text(), re.MULTILINE)
    assert sorted(described) == sorted(rehyat_jax.__all__)
    shown = re.findall(r"^```\{command-help\} (\w+)$", (DOCS / "commands.md").read_text(), re.MULTILINE)
    assert shown == list(rehyat.COMMANDS)


def test_every_block_of_the_readme_is_run_or_says_why_not():
    found = newcomer.steps((ROOT / "README.md").read_text())
    run = [step for step in found if not step.skipped]
    assert len(run) >= 20 and len(found) - len(run) <= 7
    assert {step.language for step in run} == {"bash", "python"}


BLOCK = "```bash\nrehyat sample --out a.mp4 \\\n    --steps 4    # four steps\nmake test\n```\n"


def test_comments_change_how_a_block_is_run():
    comment = "<!-- newcomer\nfirst: make x\nskip `make test`: slow\nwith `sample`: --steps 1\nenv `sample`: A=1\n-->\n"
    made = newcomer.steps(f"{comment}{BLOCK}")
    assert [(step.command, step.skipped) for step in made] == [
        ("make x", ""),
        ("A=1 rehyat sample --out a.mp4 --steps 4 --steps 1", ""),
        ("make test", "slow"),
    ]
    assert [step.command for step in newcomer.steps(BLOCK)] == ["rehyat sample --out a.mp4 --steps 4", "make test"]


@pytest.mark.parametrize(
    "markdown",
    [
        "    rehyat demo\n",
        "```\nrehyat demo\n```\n",
        f"<!-- newcomer\nskip `rehyat train`: slow\n-->\n{BLOCK}",
        f"<!-- newcomer\nskip `a`: slow\n-->\n{BLOCK}",
        f"<!-- newcomer\nskip: slow\n-->\n{BLOCK}",
        f"<!-- newcomer\nleave `make test`: slow\n-->\n{BLOCK}",
    ],
)
def test_a_block_that_is_neither_run_nor_marked_is_refused(markdown):
    with pytest.raises(ValueError, match=r"^line \d+: "):
        newcomer.steps(markdown)


def rows(page):
    """The cells of every row of a page's tables, without backticks."""
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("|"):
            yield [cell.strip().strip("`") for cell in line.strip("|").split("|")]


def test_every_row_of_the_page_about_hardware_was_planned_to_fit():
    training = json.loads((DOCS / "measurements" / "planned_runs.json").read_text())
    sampling = json.loads((DOCS / "measurements" / "planned_sampling.json").read_text())
    checked = 0
    for cells in rows(DOCS / "hardware.md"):
        if cells[1].startswith("configs/"):
            _, config, options, topology, mesh = cells
            plan = training[" ".join(f"--config {config} --topology {topology} {options}".split())]
            sizes = {axis: size for axis, size in plan["mesh"].items() if size > 1}
            assert mesh == (", ".join(f"{axis} {size}" for axis, size in sizes.items()) or "one device")
        elif cells[1].startswith("--preset"):
            plan = sampling[cells[1]]
        else:
            continue
        assert plan["fits"], cells
        checked += 1
    assert checked >= 25
    assert not any(plan["fits"] for run, plan in sampling.items() if "t2v-14B" in run and "v5e:1x1" in run)
