"""Packages for a machine without network: what it lacks is found and downloaded, and nothing half done is kept."""

import os
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "launch/offline_wheels.sh"

REGISTRY = """#!/usr/bin/env bash
# pip, with a folder for a registry: `pip download` alone is not itself.
if [[ $* == '-m pip download '* ]]; then
  while [[ $1 != --dest ]]; do shift; done
  for requirement in "${@:3}"; do
    name=${requirement%%[<>=!]*}
    cp "$REGISTRY/${name//-/_}"-*.whl "$2" || exit
  done
else
  exec "$REAL_PYTHON" "$@"
fi
"""
UP_TO_DATE = {
    "accelerate": "1.15.0",
    "array-record": "0.8.6",
    "absl-py": "2.5.1",
    "av": "18.1.0",
    "diffusers": "0.42.1",
    "einops": "0.8.2",
    "etils": "1.15.0",
    "flax": "0.12.10",
    "ftfy": "6.3.1",
    "grain": "0.2.18",
    "huggingface-hub": "2.4.0",
    "imageio-ffmpeg": "0.6.0",
    "jax": "0.11.2",
    "matplotlib": "3.11.2",
    "ml-collections": "1.1.0",
    "numpy": "2.5.2",
    "optax": "0.2.8",
    "orbax-checkpoint": "0.12.8",
    "safetensors": "0.8.0",
    "scipy": "1.17.1",
    "sentencepiece": "0.2.3",
    "tensorboard": "2.21.0",
    "tensorstore": "0.1.86",
    "tokenizers": "0.23.3",
    "torch": "2.11.0+cu130",
    "tqdm": "4.70.1",
}
"""What a machine has that lacks nothing."""


def offline_wheels(*arguments, cwd, **environment):
    return subprocess.run(
        [SCRIPT, *arguments],
        env=os.environ | {"PYTHON": sys.executable} | environment,
        capture_output=True,
        text=True,
        cwd=cwd,
    )


def installed(folder, **changes):
    """The option for a machine with `changes` in what it has; None where it lacks the package."""
    versions = UP_TO_DATE | {name.replace("_", "-"): version for name, version in changes.items()}
    lines = [f"{name}=={version}\n" for name, version in versions.items() if version]
    (folder / "installed.txt").write_text("".join(lines))
    return "--installed", str(folder / "installed.txt")


def requirements(result):
    """The names in a dry run's command -> the whole requirements."""
    assert result.returncode == 0, result.stderr
    words = shlex.split(result.stdout)
    return {re.split("[<>=!]", word)[0]: word for word in words[words.index("--dest") + 2 :]}


@pytest.fixture
def registry(tmp_path):
    """A folder of wheels, made by its `add`, as environment variables for the script."""
    folder = tmp_path / "registry"
    folder.mkdir()
    python = folder / "python"
    python.write_text(REGISTRY)
    python.chmod(0o755)

    def add(name, version, *requires, size=0):
        with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
            metadata = "".join(f"Requires-Dist: {line}\n" for line in requires)
            about = f"{name}-{version}.dist-info"
            wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{metadata}")
            wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{about}/RECORD", "")
            wheel.writestr(f"{name}.py", "#" * size)

    add.environment = {"PYTHON": str(python), "REAL_PYTHON": sys.executable, "REGISTRY": str(folder)}
    return add


def test_help_shows_how_to_call_it(tmp_path):
    result = offline_wheels("--help", cwd=tmp_path)
    assert result.returncode == 0
    assert "launch/offline_wheels.sh [--dry-run] FOLDER" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "FOLDER is missing"),
        (["a", "b"], "expected one FOLDER, found a and b"),
        (["--verbose", "a"], "expected FOLDER, --python or --installed, found --verbose"),
        (["a", "--python"], "--python: expected a value"),
        (["a", "--python", "3.10"], "--python: expected 3.11 or newer, found 3.10"),
        (["a", "--python=3.12.3"], "--python: expected 3.11 or newer, found 3.12.3"),
        (["."], ".: expected a new folder, found one that exists"),
        (["no/a"], "no/a: cannot be made; choose a new folder within one that exists"),
    ],
    ids=" ".join,
)
def test_wrong_arguments_are_named(arguments, message, tmp_path):
    result = offline_wheels(*arguments, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert f"offline_wheels.sh: {message}" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("PYTHON", "false", "PYTHON: expected Python 3.11 or newer with pip, found false"),
        ("MAX_MB", "30M", "MAX_MB: expected a whole number of megabytes, found 30M"),
    ],
)
def test_wrong_variables_are_named(name, value, message, tmp_path):
    result = offline_wheels("--dry-run", "a", cwd=tmp_path, **{name: value})
    assert (result.returncode, result.stdout) == (2, "") and message in result.stderr


@pytest.mark.parametrize("text", ["", "-e git+https://host/x\n", "jax @ file:///jax\n", "jax==new\n", None])
def test_a_list_that_pip_did_not_write_is_named(text, tmp_path):
    if text is not None:
        (tmp_path / "list.txt").write_text(text)
    result = offline_wheels("--dry-run", "a", "--installed", "list.txt", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("list.txt") and "expected " in result.stderr and ", found" in result.stderr


def test_the_dry_run_prints_the_download_for_the_usual_machine(tmp_path):
    result = offline_wheels("--dry-run", "new wheels/", cwd=tmp_path)
    words = shlex.split(result.stdout)
    assert words[1:4] == ["-m", "pip", "download"] and words[words.index("--dest") + 1] == "new wheels"
    assert words[words.index("--python-version") + 1] == "3.12" and "manylinux_2_28_x86_64" in words
    found = requirements(result)
    assert list(found) == ["array-record", "av", "diffusers", "grain", "ml-collections", "orbax-checkpoint"]
    # Versions are those that the project requires.
    assert found["orbax-checkpoint"] in (ROOT / "requirements.txt").read_text()
    assert list(tmp_path.iterdir()) == []


def test_what_a_machine_lacks_or_has_too_old_is_downloaded(tmp_path):
    changes = {"orbax_checkpoint": "0.12.4", "einops": None, "diffusers": "0.43.0", "numpy": "2.6.0rc1", "torch": None}
    result = offline_wheels("--dry-run", "a", "--python=3.13", *installed(tmp_path, **changes), cwd=tmp_path)
    assert requirements(result).keys() == {"orbax-checkpoint", "einops", "diffusers"}
    words = shlex.split(result.stdout)
    assert words[words.index("--python-version") + 1] == "3.13"


def test_a_machine_that_has_everything_needs_no_folder(tmp_path):
    for dry_run in (["--dry-run"], []):
        result = offline_wheels(*dry_run, "a", *installed(tmp_path, jax="0.9.0", imageio_ffmpeg=None), cwd=tmp_path)
        assert result.returncode == 0 and "nothing to download" in result.stdout
        assert re.search(r"not downloaded: jax\S*>=0\.\S+, found 0\.9\.0 there", result.stderr)
        assert re.search(r"not downloaded: imageio-ffmpeg\S+, found none there", result.stderr)
        assert [path.name for path in tmp_path.iterdir()] == ["installed.txt"]


def test_what_the_wheels_require_in_turn_is_downloaded_too(registry, tmp_path):
    registry(
        "einops",
        "0.8.2",
        "optax>=0.2",
        "jaxlib>=0.5; extra == 'jax'",
        "torch",
        "tomli; python_version < '3.11'",
        "uvloop; platform_system != 'Windows'",
        "chained[deep]>=2",
    )
    registry("uvloop", "1.0")
    registry("chained", "2.0", "deepest; extra == 'deep'", "nvidia-cudnn-cu13")
    registry("deepest", "1.0")
    arguments = installed(tmp_path, einops=None, chained="1.0")
    result = offline_wheels("wheels", *arguments, cwd=tmp_path, **registry.environment)
    assert result.returncode == 0, result.stderr
    wheels = {path.name.split("-")[0]: path.stat().st_size for path in (tmp_path / "wheels").iterdir()}
    assert wheels.keys() == {"einops", "uvloop", "chained", "deepest"}
    assert f"{sum(wheels.values())} bytes in 4 wheels" in result.stdout
    for name, size in wheels.items():
        assert re.search(rf"^ *{size} {name}-", result.stdout, re.MULTILINE)
    assert "not downloaded: nvidia-cudnn-cu13, found none there" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["installed.txt", "registry", "wheels"]
    # The first command that it prints installs them.
    (command, _) = [line for line in result.stdout.splitlines() if line.startswith("  python3 -m pip install ")]
    command = command.replace("python3", shlex.quote(sys.executable), 1) + " --target site"
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "site/deepest.py").exists()


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("missing", "pip could not download einops>=0.8 ml-collections>=1.1; look at its message above"),
        ("large", "expected at most 1 MB of wheels, found 1101"),
        ("conflict", "etils: the packages together need"),
    ],
)
def test_a_failed_download_leaves_nothing(case, message, registry, tmp_path):
    registry("einops", "0.8.2", "etils>=2", size=1_100_000 if case == "large" else 0)
    registry("etils", "2.0", "etils<2; python_version > '3.0'")
    if case != "missing":
        registry("ml_collections", "1.1.0")
    arguments = installed(tmp_path, einops=None, ml_collections=None)
    result = offline_wheels("wheels", *arguments, cwd=tmp_path, **registry.environment, MAX_MB="1")
    assert result.returncode == 2 and message in result.stderr and "nothing was kept" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["installed.txt", "registry"]


def test_pip_finds_wheels_of_another_python(tmp_path):
    # From the package registry, for another version of Python than this one's: 3.9 MB.
    arguments = installed(tmp_path, array_record=None)
    other = "3.13" if sys.version_info[:2] != (3, 13) else "3.12"
    result = offline_wheels("wheels", "--python", other, *arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (wheel,) = (tmp_path / "wheels").iterdir()
    assert re.fullmatch(rf"array_record-.*-cp{other.replace('.', '')}-manylinux.*_x86_64.*\.whl", wheel.name)
