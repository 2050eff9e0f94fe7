"""Runs what README.md tells a newcomer to type, from top to bottom, in a fresh clone: python tests/newcomer.py.

Every fenced block of README.md is one of these:

- bash: each command is run, and must end with exit code 0;
- python: the block is run as one program;
- text: nothing to run.

An invisible comment right before a block changes how it is run. Each of its lines is one of these, where PART stands
for a part of the one command that the line is about:

  first: COMMAND               a command to run before the block
  skip `PART`: REASON          the command is not run
  with `PART`: ARGUMENTS       further arguments, mostly smaller sizes
  env `PART`: NAME=VALUE ...   environment variables

A block without a language, a line that is about no command or about several, and a command that fails are errors. The
clone is of the last commit. It takes its packages from the environment that runs this program.
"""

import argparse
import dataclasses
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[1]
LIMIT_SECONDS = 1800
"""The longest that one command may take."""

COMMENT = re.compile(r"<!-- newcomer\n(.*?)-->", re.DOTALL)
RULE = re.compile(r"(first|skip|with|env)(?: `(.+)`)?: (.+)")


@dataclasses.dataclass
class Step:
    """A command of README.md, or a Python block.

    Attributes:
      line: its block's first line in README.md.
      command: the command as it is run, or the program.
      language: "bash" or "python".
      skipped: the reason if it is not run.
    """

    line: int
    command: str
    language: str = "bash"
    skipped: str = ""


def steps(markdown: str) -> list[Step]:
    """The steps of a page in its order. Raises ValueError for a block that is neither run nor marked."""
    made: list[Step] = []
    comment = ""
    for token in MarkdownIt().parse(markdown):
        if token.type == "html_block" and (found := COMMENT.match(token.content)):
            comment = found[1]
        elif token.type in ("fence", "code_block"):
            line = token.map[0] + 1
            if token.info not in ("bash", "python", "text"):
                raise ValueError(f"line {line}: expected a block with ```bash, ```python or ```text, found another one")
            if token.info != "text":
                made += _block(line, token.info, token.content, comment)
            comment = ""
    return made


def _block(line: int, language: str, content: str, comment: str) -> list[Step]:
    """The steps of one block, with its comment's lines applied."""
    commands = [content] if language == "python" else list(_commands(content))
    block = [Step(line, command, language) for command in commands]
    before = []
    for text in comment.splitlines():
        rule = RULE.fullmatch(text.strip())
        if rule is None:
            raise ValueError(f"line {line}: the comment before the block has {text!r}, which is no rule")
        kind, part, value = rule.groups()
        if kind == "first":
            before.append(Step(line, value))
            continue
        about = [step for step in block if part and part in step.command]
        if len(about) != 1 or (language == "python" and kind != "skip"):
            raise ValueError(f"line {line}: expected `{part}` in one command of the block, found it in {len(about)}")
        if kind == "skip":
            about[0].skipped = value
        else:
            about[0].command = f"{about[0].command} {value}" if kind == "with" else f"{value} {about[0].command}"
    return before + block


def _commands(content: str) -> Iterator[str]:
    """The commands of a shell block, without their comments, each on one line."""
    for command in content.replace("\\\n", " ").splitlines():
        command = re.sub(r"(^|\s\s+)# .*$", "", command)
        if command.strip():
            yield " ".join(command.split())


def make_clone(folder: Path) -> dict[str, str]:
    """Clones the repository into a folder, with an environment in .venv; returns the environment's variables."""
    subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", str(ROOT), str(folder)], check=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder / ".venv")], check=True)
    # Python 3.11 brings one that is older than what the build needs, and it would come first.
    pip = [str(folder / ".venv" / "bin" / "python"), "-m", "pip"]
    subprocess.run([*pip, "uninstall", "--quiet", "--yes", "setuptools"], check=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder / ".venv")}))
    (packages / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (folder / ".venv" / ".installed").touch()  # for make
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    paths = (str(folder / ".venv" / "bin"), str(Path(sys.executable).parent), variables["PATH"])
    return variables | {"PATH": os.pathsep.join(paths), "JAX_PLATFORMS": "cpu"}


def run(step: Step, folder: Path, variables: dict[str, str]) -> str:
    """Runs a step; returns "ok" or why it failed. Its output is shown."""
    program = ["bash", "-euo", "pipefail", "-c"] if step.language == "bash" else ["python", "-c"]
    try:
        ended = subprocess.run([*program, step.command], cwd=folder, env=variables, timeout=LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        return f"took more than {LIMIT_SECONDS} seconds"
    return f"exit code {ended.returncode}" if ended.returncode else "ok"


def main() -> int:
    """Runs all steps and prints their times; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the steps and run none")
    parser.add_argument("--keep-going", action="store_true", help="continue after a command that failed")
    arguments = parser.parse_args()
    todo = steps((ROOT / "README.md").read_text(encoding="utf-8"))
    rows, failed = [], False
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "rehyat_jax"
        variables = {} if arguments.list else make_clone(folder)
        for step in todo:
            shown = step.command if step.language == "bash" else "python: " + step.command.strip().splitlines()[-1]
            start, outcome = time.monotonic(), ""
            if step.skipped:
                outcome = f"skipped: {step.skipped}"
            elif not arguments.list:
                print(f"\nREADME.md:{step.line}: {shown}", flush=True)
                outcome = run(step, folder, variables)
                failed |= outcome != "ok"
            rows.append(f"{time.monotonic() - start:7.1f} s  line {step.line:3d}  {shown}  [{outcome or 'to run'}]")
            if failed and not arguments.keep_going:
                break
    print("\n" + "\n".join(rows))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
