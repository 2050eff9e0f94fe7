"""The package as its users get it: the wheel, the command `rehyat`, missing extras, and the files of a release."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import rehyat_jax
from rehyat_jax import __main__ as rehyat
from rehyat_jax import cli, completion
from rehyat_jax.cli import report_input_errors
from rehyat_jax.demo import __main__ as demo
from rehyat_jax.errors import InputError
from rehyat_jax.extras import EXTRAS
from rehyat_jax.files import packaged
from rehyat_jax.planning.table import planned_runs
from rehyat_jax.training.command_line import read_config_file
from rehyat_jax.weights.load import open_checkpoint

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
VERSION = "1.2.3"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of the files that a build reads, made without the network and outside the checkout."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("rehyat_jax", "configs", "assets"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    (source / "tests").mkdir()
    (source / "tests" / "test_nothing.py").touch()
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source]
    environment = os.environ | {"SETUPTOOLS_SCM_PRETEND_VERSION": VERSION}
    built = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A function that runs the wheel's `rehyat` in an empty folder, with the other packages of this environment."""
    site, folder = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("work")
    options = ["--quiet", "--no-deps", "--no-index", "--no-compile", "--target", site]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, wheel], check=True)

    def run(*arguments, paths=()):
        variables = {"PYTHONPATH": os.pathsep.join(map(str, [*paths, site])), "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, site / "bin" / "rehyat", *arguments]
        return subprocess.run(command, cwd=folder, env=os.environ | variables, capture_output=True, text=True)

    run.folder = folder
    return run


def test_the_wheel_has_all_that_its_users_need_and_no_more(wheel):
    assert wheel.name == f"rehyat_jax-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if ".dist-info/" not in name}
        script = file.read(f"rehyat_jax-{VERSION}.dist-info/entry_points.txt").decode()
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "rehyat_jax").rglob("*.py") if path.is_file()}
    with_them = {
        f"rehyat_jax/packaged/{path.relative_to(ROOT)}"
        for folder, kind in (("configs", "*.py"), ("assets", "*.*"))
        for path in (ROOT / folder).rglob(kind)
    }
    assert len(with_them) >= 40
    assert names == {name for name in sources if "/packaged/" not in name} | with_them | {"rehyat_jax/py.typed"}
    assert "rehyat = rehyat_jax.__main__:main" in script
    assert wheel.stat().st_size < 10e6


def test_the_command_starts_without_jax(installed, tmp_path):
    (tmp_path / "jax.py").write_text("raise AssertionError('jax was imported')")
    shown = installed("--help", paths=[tmp_path])
    assert shown.returncode == 0 and all(f"\n    {name}" in shown.stdout for name in rehyat.COMMANDS), shown.stderr
    assert installed("--version", paths=[tmp_path]).stdout == f"rehyat-jax {VERSION}\n"
    unknown = installed("trian", paths=[tmp_path])
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert unknown.stderr == "error: rehyat has no command 'trian'; did you mean 'train'?\n"
    assert installed(paths=[tmp_path]).returncode == 2


def test_a_command_of_the_wheel_reads_packaged_files_outside_a_checkout(installed):
    converted = installed("convert", "from-torch", "assets/demo_teacher", "teacher")
    assert converted.returncode == 0, converted.stderr
    assert "teacher: " in converted.stdout and "site" in converted.stderr
    assert len(re.findall("reading the one of the package", converted.stderr)) == 1
    assert (installed.folder / "teacher" / "model.json").exists()


@pytest.mark.filterwarnings("ignore:.* found in sys.modules after import of package")
@pytest.mark.parametrize("command", rehyat.COMMANDS)
def test_help_through_rehyat_names_rehyat(command, capsys, monkeypatch):
    monkeypatch.setattr(cli, "started_by_rehyat", False)
    monkeypatch.setattr(sys, "argv", [])
    with pytest.raises(SystemExit) as end:
        rehyat.main([command, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert f"  rehyat {command} " in text.split("xample:\n")[1]
    assert "python -m rehyat_jax." not in text


def test_help_through_python_names_the_module(capsys):
    with pytest.raises(SystemExit):
        completion.main(["--help"])
    assert capsys.readouterr().out.startswith("usage: python -m rehyat_jax.completion ")


# ----------------------------------------------------------------------------------------------- files in the package


def test_configurations_of_the_package_import_one_another_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    assert read_config_file("configs/wan_14b_distill.py").preset == "t2v-14B"
    assert sys.path == before
    assert open_checkpoint("assets/demo_teacher").config.num_layers == 6


def test_a_file_here_comes_before_that_of_the_package(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("configs").mkdir()
    lines = "from configs import demo_distill\ndef get_config():\n    config = demo_distill.get_config()\n"
    Path("configs/mine.py").write_text(f"{lines}    config.steps = 7\n    return config\n")
    monkeypatch.delitem(sys.modules, "configs.demo_distill", raising=False)
    assert read_config_file("configs/mine.py").steps == 7
    assert capsys.readouterr().err == ""
    shutil.copy("configs/mine.py", "configs/demo_finetune.py")
    assert read_config_file("configs/demo_finetune.py").stage == "distill"
    monkeypatch.chdir("/")
    assert read_config_file(str(tmp_path / "configs" / "mine.py")).steps == 7


def test_an_unknown_configuration_names_the_nearest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"did you mean configs/demo_distill\.py\?"):
        read_config_file("configs/demo_distil.py")
    with pytest.raises(InputError, match=r"did you mean configs/studies/windows\.py\?"):
        read_config_file("configs/studies/window.py")
    with pytest.raises(InputError, match=r"configs/\.\./configs/demo_distill\.py: cannot be read"):
        read_config_file("configs/../configs/demo_distill.py")


def test_planned_runs_of_configurations_that_import_others_are_found(monkeypatch):
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(ROOT))])
    assert any("wan_14b" in run for run in planned_runs(ROOT / "configs"))


# ------------------------------------------------------------------------------------------------------------ the demo


def test_the_demo_trains_what_its_configurations_say(tmp_path, monkeypatch, capsys):
    runs, trained = tmp_path / "runs", {}
    monkeypatch.setattr(demo, "train", lambda config, workdir: trained.update({workdir.name: config}))
    exported = []
    monkeypatch.setattr(demo, "convert_to_torch", lambda *arguments, **_: exported.append(arguments))
    monkeypatch.setattr(demo, "report_misses", lambda runs: ["a claim"])
    monkeypatch.setattr(demo, "check_installed", lambda *_: None)
    assert demo.main(["--workdir", str(runs)]) == 1
    assert (runs / "teacher" / "model.json").exists()
    assert {name: (config.init_from, config.hybrid.causal, config.steps) for name, config in trained.items()} == {
        "distill": (f"{runs}/teacher", True, 300),
        "distill_bidirectional": (f"{runs}/teacher", False, 300),
        "finetune": (f"{runs}/distill/model", True, 480),
    }
    assert exported == [(runs / "finetune" / "model", runs / "student_pytorch", "diffusers")]
    assert "6 of 6" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------------------- extras


@pytest.mark.parametrize(("arguments", "extras"), [([], "demo,torch"), (["--quick"], "demo")])
def test_the_demo_names_missing_extras_before_it_begins(arguments, extras, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    assert demo.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: the demo needs sklearn") and line.endswith(f": pip install 'rehyat-jax[{extras}]'")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", EXTRAS)
def test_a_missing_optional_package_names_its_extra_wherever_it_is_imported(package, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    assert report_input_errors(lambda: __import__(f"{package}.part")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"pip install 'rehyat-jax[{EXTRAS[package]}]'")


def test_other_failed_imports_are_bugs():
    with pytest.raises(ModuleNotFoundError):
        report_input_errors(lambda: __import__("rehyat_jax.no_such_module"))


def imported(file):
    """(name, whether at the top of the file) of every package that a file imports."""
    tree = ast.parse(file.read_text())
    at_the_top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        else:
            found = [node.module] if isinstance(node, ast.ImportFrom) else []
        yield from ((name.partition(".")[0], id(node) in at_the_top) for name in found)


def test_every_imported_package_is_required_or_of_an_extra():
    canonical = lambda name: re.sub(r"[-_.]+", "-", name).lower()
    of_line = lambda line: canonical(re.match(r"[\w.-]+", line)[0])
    required = {of_line(line) for line in (ROOT / "requirements.txt").read_text().splitlines() if line.strip()}
    of_extra = {name: set(map(of_line, lines)) for name, lines in PROJECT["optional-dependencies"].items()}
    distributions = importlib.metadata.packages_distributions()
    # jax requires the first two; the two files are imported only where PyTorch is needed.
    of_jax, of_torch = {"jaxlib", "ml_dtypes"}, ("pytorch/rehyat_torch.py", "benchmarks/gpu_run/torch_weights.py")
    for file in (ROOT / "rehyat_jax").rglob("*.py"):
        for package, at_the_top in imported(file):
            if package in sys.stdlib_module_names or package in ("rehyat_jax", "configs") or package in of_jax:
                continue
            names = set(map(canonical, distributions.get(package, [package])))
            if package in EXTRAS:
                assert not at_the_top or str(file).endswith(of_torch), f"{file} needs {package} to be imported"
            else:
                assert names & required, f"{file} imports {package}, which no requirement has"
    for package, extra in EXTRAS.items():
        names = set(map(canonical, distributions.get(package, [package])))
        assert names & of_extra[extra] or (package, of_extra[extra]) == ("libtpu", {"jax"}), package


def test_public_names_are_those_that_type_checkers_see():
    tree = ast.parse(Path(rehyat_jax.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {node.names[0].asname: node.module.removeprefix("rehyat_jax.") for node in block.body}
    assert seen == rehyat_jax._HOMES
    assert all(hasattr(rehyat_jax, name) for name in rehyat_jax.__all__)


# ---------------------------------------------------------------------------------------------------------- completion


def test_bash_completes_commands_options_and_fields(tmp_path):
    assert list(completion.PARSERS) == list(rehyat.COMMANDS)
    (tmp_path / "script").write_text(completion.script("bash"))
    lines = {
        "rehyat su": ["surgery"],
        "rehyat train --config.optimizer.lea": ["--config.optimizer.learning_rate"],
        "rehyat surgery --bud": ["--budget"],
        "rehyat train --config.stage fine": ["finetune"],
        "rehyat convert to-torch a b --layout o": ["original"],
        "rehyat plan --hei": ["--height"],
        "rehyat prepare --noi": ["--noises"],
        "rehyat sample --checkpoint scr": ["script"],
    }
    calls = [
        f'COMP_WORDS=({line}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _shtab_rehyat; echo "${{COMPREPLY[@]}}"'
        for line in lines
    ]
    shell = subprocess.run(
        ["bash", "-c", "\n".join(["source ./script", *calls])], cwd=tmp_path, capture_output=True, text=True
    )
    assert shell.stdout.splitlines() == [" ".join(words) for words in lines.values()], shell.stderr


# ------------------------------------------------------------------------------------------------- files of a release

GITHUB = sorted((ROOT / ".github").rglob("*.y*ml"))
RULES = "{extends: default, rules: {document-start: disable, line-length: {max: 120}, truthy: {check-keys: false}}}"


def test_yaml_of_github_is_clean():
    assert {file.parent.name for file in GITHUB} == {".github", "workflows", "ISSUE_TEMPLATE"}
    result = subprocess.run(
        [sys.executable, "-m", "yamllint", "--strict", "-d", RULES, *GITHUB, ROOT / "CITATION.cff"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout


def test_actions_run_targets_of_make_and_nothing_else():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    commands = []
    for file in (ROOT / ".github" / "workflows").glob("*.yml"):
        for job in yaml.safe_load(file.read_text())["jobs"].values():
            commands += [step["run"] for step in job["steps"] if "run" in step]
    assert len(commands) >= 4
    for command in commands:
        words = command.split()
        assert words[0] == "make" and words[1] in targets and all("=" in word for word in words[2:]), command


def test_the_citation_names_this_software_and_the_method():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["type"], citation["license"]) == ("software", PROJECT["license"])
    (method,) = citation["references"]
    assert method["identifiers"][0]["value"] == "arXiv:2601.04342"


def test_files_of_the_package_are_links_to_those_of_the_repository():
    for name in (packaged.CONFIGS, packaged.ASSETS):
        assert (ROOT / "rehyat_jax" / "packaged" / name).resolve() == ROOT / name
