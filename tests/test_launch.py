"""The launchers print, without the platform's tool, the commands that they run; arguments reach training unharmed."""

import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from rehyat_jax.errors import InputError, RunDivergedError, RunStoppedError

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
NO_LAUNCHERS = {"common.sh", "offline_wheels.sh"}
SCRIPTS = sorted(path.name for path in LAUNCH.glob("*.sh") if path.name not in NO_LAUNCHERS)
YAMLS = sorted(path.name for path in LAUNCH.glob("*.yaml"))
TOOL = Path(sys.executable).parent

AWKWARD = [
    "--config",
    "configs/with space.py",
    "--workdir",
    "/shared/it's * [a-z]?",
    "--config.hybrid.blocks=(1, 2)",
    '--config.data.path=$(id) $HOME `id` "&\\ \n;|<>#~{a,b}!',
]
NEEDED = {
    "gke_jobset.sh": {"NAME": "wan", "IMAGE": "registry/image:1", "CLAIM": "shared"},
    "gke_xpk.sh": {
        "PROJECT": "project",
        "ZONE": "us-west4-a",
        "CLUSTER": "cluster",
        "WORKLOAD": "wan",
        "IMAGE": "registry/image:1",
        "STORAGE": "shared",
    },
    "local.sh": {"PROCESSES": "2"},
    "skypilot.sh": {"CLUSTER": "wan", "ACCELERATORS": "tpu-v6e-16", "BUCKET": "bucket"},
    "slurm.sh": {"NODES": "2", "GPUS_PER_NODE": "8"},
    "tpu_vm.sh": {"TPU_NAME": "wan", "ZONE": "us-west4-a"},
}
TRAIN = {"tpu_vm.sh": ["train"]}
"""The action before the arguments, where there is one."""


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A PATH with little more than a shell, so that no platform's tool is found."""
    folder = tmp_path_factory.mktemp("bin")
    for tool in ("bash", "dirname", "sed", "env"):
        (folder / tool).symlink_to(shutil.which(tool))
    return str(folder)


def launch(script, *arguments, path, **environment):
    return subprocess.run(
        [LAUNCH / script, *arguments], env={"PATH": path, **environment}, capture_output=True, text=True, cwd="/"
    )


def dry_run(script, *arguments, path, **environment):
    """The printed commands, as lists of words."""
    result = launch(script, "--dry-run", *arguments, path=path, **(NEEDED[script] | environment))
    assert result.returncode == 0, result.stderr
    commands = [[]]
    lexer = shlex.shlex(result.stdout, posix=True, punctuation_chars="\n")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t", True, ""
    for word in lexer:
        if word.strip("\n") or not word:
            commands[-1].append(word)
        else:
            commands.append([])
    return [command for command in commands if command]


def option(command, name):
    """The value of --name=value."""
    (value,) = [word.partition("=")[2] for word in command if word.startswith(f"--{name}=")]
    return value


def test_every_script_is_known_here():
    assert sorted(NEEDED) == SCRIPTS
    readme = (LAUNCH / "README.md").read_text()
    assert [script for script in SCRIPTS if f"`{script}" not in readme] == []


def test_shellcheck_has_nothing_to_say():
    result = subprocess.run(
        [TOOL / "shellcheck", "--external-sources", *sorted(LAUNCH.glob("*.sh"))],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("name", YAMLS)
def test_yaml_is_clean(name):
    rules = "{extends: default, rules: {document-start: disable, line-length: {max: 120}}}"
    result = subprocess.run(
        [sys.executable, "-m", "yamllint", "--strict", "-d", rules, LAUNCH / name], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout
    assert isinstance(yaml.safe_load((LAUNCH / name).read_text()), dict)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_how_to_call_it(script, path):
    result = launch(script, "--help", path=path)
    assert result.returncode == 0
    assert f"launch/{script} [--dry-run]" in result.stdout


@pytest.mark.parametrize(("script", "name"), [(script, name) for script in SCRIPTS for name in NEEDED[script]])
def test_a_missing_variable_is_named(script, name, path):
    environment = {key: value for key, value in NEEDED[script].items() if key != name}
    result = launch(script, "--dry-run", *TRAIN.get(script, []), *AWKWARD, path=path, **environment)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"{script}: {name} is not set: expected ")


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("name", ["config", "workdir"])
def test_a_missing_argument_is_named(script, name, path):
    arguments = ["--config.seed=1", *[f"--{other}=x" for other in ("config", "workdir") if other != name]]
    result = launch(script, "--dry-run", *TRAIN.get(script, []), *arguments, path=path, **NEEDED[script])
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"{script}: --{name} is missing")


def test_tpu_vm_trains_on_all_workers(path):
    (command,) = dry_run("tpu_vm.sh", "train", *AWKWARD, path=path)
    assert command[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "wan"]
    assert command[6:8] == ["--zone=us-west4-a", "--worker=all"]
    remote = shlex.split(option(command, "command"))
    assert remote == ["cd", "rehyat_jax", "&&", ".venv/bin/python", "-m", "rehyat_jax.train", *AWKWARD]


def test_tpu_vm_trains_on_all_slices(path):
    (command,) = dry_run("tpu_vm.sh", "train", *AWKWARD, path=path, SLICES="2")
    assert command[:6] == ["gcloud", "compute", "tpus", "queued-resources", "ssh", "wan"]
    assert command[6:10] == ["--zone=us-west4-a", "--node=all", "--worker=all", "--batch-size=all"]
    assert shlex.split(option(command, "command"))[-len(AWKWARD) :] == AWKWARD


def test_tpu_vm_creates_a_pod_or_several_slices(path):
    queue = ["gcloud", "compute", "tpus", "queued-resources", "create", "wan", "--zone=us-west4-a"]
    v5e = ["--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite"]
    assert dry_run("tpu_vm.sh", "create", path=path) == [[*queue, "--node-id=wan", *v5e]]
    assert dry_run("tpu_vm.sh", "create", path=path, SLICES="2", SPOT="1") == [
        [*queue, "--node-count=2", *v5e, "--spot"]
    ]
    v6e = ["--accelerator-type=v6e-8", "--runtime-version=v2-alpha-tpuv6e"]
    assert dry_run("tpu_vm.sh", "create", path=path, ACCELERATOR_TYPE="v6e-8") == [[*queue, "--node-id=wan", *v6e]]


def test_tpu_vm_asks_for_the_runtime_of_other_tpus(path):
    result = launch("tpu_vm.sh", "--dry-run", "create", path=path, ACCELERATOR_TYPE="v4-32", **NEEDED["tpu_vm.sh"])
    assert result.returncode == 2
    assert "RUNTIME_VERSION is not set: expected the TPU software version for v4-32" in result.stderr


def test_tpu_vm_installs_the_commit_on_all_workers(path):
    archive, copy, install = dry_run("tpu_vm.sh", "install", path=path, TMPDIR="/scratch")
    assert archive[3:] == ["archive", "--prefix=rehyat_jax/", "--output=/scratch/rehyat_jax.tar.gz", "HEAD"]
    assert copy[4:7] == ["scp", "/scratch/rehyat_jax.tar.gz", "wan:"]
    assert "--worker=all" in copy and "--worker=all" in install
    assert shlex.split(option(install, "command"))[-4:] == [".venv/bin/pip", "install", "-e", ".[tpu]"]


def test_tpu_vm_refuses_other_actions(path):
    result = launch("tpu_vm.sh", "--dry-run", "launch", path=path, **NEEDED["tpu_vm.sh"])
    assert result.returncode == 2
    assert "expected create, status, install, run, train or delete, found launch" in result.stderr


def test_xpk_trains_on_slices(path):
    (command,) = dry_run("gke_xpk.sh", *AWKWARD, path=path, SLICES="2")
    assert command[:3] == ["xpk", "workload", "create"]
    for name, value in {
        "tpu-type": "v5litepod-16",
        "num-slices": "2",
        "storage": "shared",
        "cluster": "cluster",
        "restart-on-exit-codes": str(RunStoppedError.exit_code),
    }.items():
        assert option(command, name) == value
    assert shlex.split(option(command, "command")) == ["python", "-m", "rehyat_jax.train", *AWKWARD]


def test_jobset_runs_a_pod_on_every_host_of_every_slice(path):
    arguments = ["--config=a", "--workdir=/shared/it's", "a\\n & * ${NAME}x", "$(id)", "#no: comment"]
    result = launch("gke_jobset.sh", "--dry-run", *arguments, path=path, SLICES="2", **NEEDED["gke_jobset.sh"])
    first, *manifest, last = result.stdout.splitlines()
    assert (first, last) == ("kubectl apply --filename=- <<'EOF'", "EOF")
    jobset = yaml.safe_load("\n".join(manifest))
    assert jobset["metadata"]["name"] == "wan"
    (slices,) = jobset["spec"]["replicatedJobs"]
    assert slices["replicas"] == 2
    job = slices["template"]["spec"]
    assert (job["parallelism"], job["completions"], job["completionMode"]) == (4, 4, "Indexed")
    # What a restart cannot mend ends the whole; everything else begins it again.
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"]["values"] == [InputError.exit_code, RunDivergedError.exit_code]
    assert jobset["spec"]["failurePolicy"]["rules"] == [
        {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    ]
    pod = job["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] == 600 and pod["restartPolicy"] == "Never"
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4"
    (container,) = pod["containers"]
    assert container["name"] == rule["onExitCodes"]["containerName"]
    assert container["image"] == "registry/image:1"
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["command"] == ["python", "-m", "rehyat_jax.train"]
    # Kubernetes gives $$ to the program as $, and would put a variable's value in the place of $(id).
    assert [argument.replace("$$", "$") for argument in container["args"]] == arguments
    assert "$$(id)" in container["args"]


def test_slurm_runs_a_process_for_every_gpu(path):
    (command,) = dry_run("slurm.sh", *AWKWARD, path=path)
    assert command[0] == "sbatch"
    for name, value in {"nodes": "2", "ntasks-per-node": "8", "gpus-per-node": "8"}.items():
        assert option(command, name) == value
    step = shlex.split(option(command, "wrap"))
    assert step == ["srun", "--kill-on-bad-exit=1", "python", "-m", "rehyat_jax.train", *AWKWARD]


def sky_environment(command):
    return dict(command[at + 1].split("=", 1) for at, word in enumerate(command) if word == "--env")


@pytest.mark.parametrize(
    ("accelerators", "extra", "processes"),
    [
        ("tpu-v6e-16", "tpu", []),
        ("H100:8", "cuda", ["--coordinator", "10.0.0.5:12355", "--num_processes", "2", "--process_id", "1"]),
    ],
)
def test_skypilot_trains_on_every_host(accelerators, extra, processes, path, tmp_path):
    _, command = dry_run("skypilot.sh", *AWKWARD, path=path, ACCELERATORS=accelerators, NODES="2")
    assert command[:2] == ["sky", "launch"]
    assert command[command.index("--gpus") + 1] == accelerators
    assert command[command.index("--num-nodes") + 1] == "2"
    environment = sky_environment(command)
    assert environment["EXTRA"] == extra
    # What the task runs on a host, with a Python that shows its arguments.
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!{shutil.which('bash')}\nprintf '%s\\0' \"$@\"\n")
    python.chmod(0o755)
    node = {"SKYPILOT_NODE_IPS": "10.0.0.5\n10.0.0.6", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())["run"]
    shown = subprocess.run(
        ["bash", "-c", task],
        env={"PATH": os.environ["PATH"], **node, **environment},
        cwd=tmp_path,
        capture_output=True,
        check=True,
        text=True,
    ).stdout
    assert shown.split("\0")[:-1] == ["-m", "rehyat_jax.train", *processes, *AWKWARD]


def test_local_prints_a_command_for_every_process(path):
    commands = dry_run("local.sh", *AWKWARD, path=path, DEVICES="2", PORT="1234")
    for process, command in enumerate(commands):
        run = "env JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=2 python -m rehyat_jax.train --coordinator localhost:1234 "
        assert command == [*run.split(), "--num_processes", "2", "--process_id", str(process), *AWKWARD]
    assert len(commands) == 2
    first, second = dry_run("local.sh", *AWKWARD, path=path, PLATFORM="cuda")
    assert (first[1], second[1]) == ("JAX_LOCAL_DEVICE_IDS=0", "JAX_LOCAL_DEVICE_IDS=1")


def test_local_ends_with_the_first_process_that_fails(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/usr/bin/env bash\ntrap '' TERM\n[[ $* == *'--process_id 1'* ]] && exit 3\nexec sleep 60\n")
    python.chmod(0o755)
    start = time.monotonic()
    result = launch("local.sh", "--config=x", "--workdir=y", path=os.environ["PATH"], PROCESSES="2", PYTHON=str(python))
    assert result.returncode == 3
    assert time.monotonic() - start < 30
