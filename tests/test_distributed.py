"""How processes of one run find each other: what is recognised, what is refused; two that compute together."""

import os
import socket
import subprocess
import sys

import jax
import pytest

from rehyat_jax import distributed
from rehyat_jax.errors import InputError

SLURM_STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "a[1-2]", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
INDEXED_POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}
NO_METADATA = {"TPU_SKIP_MDS_QUERY": "1"}


@pytest.fixture
def calls(monkeypatch):
    """Calls of jax.distributed.initialize, which does nothing; no metadata server, and no launcher's variables."""
    made = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **options: made.append(options))
    monkeypatch.setattr(distributed, "_metadata", lambda attribute: "")
    for name in list(os.environ):
        if name.startswith(("OMPI_", "SLURM_", "TPU_", "MEGASCALE_", "KUBERNETES_", "JOB_COMPLETION_INDEX")):
            monkeypatch.delenv(name)
    return made


@pytest.fixture
def port():
    with socket.create_server(("", 0)) as server:
        number = server.getsockname()[1]
    return number


@pytest.mark.parametrize(
    ("environment", "launcher"),
    [
        ({}, None),
        (SLURM_STEP | {"SLURM_NTASKS": "16", "SLURM_STEP_NUM_TASKS": "16"}, distributed.SLURM),
        # One task, and a shell in an allocation of 16 tasks.
        (SLURM_STEP | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, distributed.OPEN_MPI),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
        # TPU pods of GKE: several hosts, one host, one host in each of two slices.
        (INDEXED_POD | {"TPU_WORKER_HOSTNAMES": "a,b,c,d"}, distributed.CLOUD_TPU),
        (INDEXED_POD | {"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, distributed.CLOUD_TPU),
        ({"TPU_PROCESS_ADDRESSES": "a:1,b:1"}, distributed.CLOUD_TPU),
        # GPU pods of Kubernetes; a pod that is not one of several.
        (INDEXED_POD, distributed.KUBERNETES),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
    ],
)
def test_several_processes_are_recognised_by_their_launcher(environment, launcher, calls):
    assert distributed.find_launcher(NO_METADATA | environment) == launcher


@pytest.mark.parametrize(
    ("metadata", "launcher"),
    [
        ({"worker-network-endpoints": "n:0:10.0.0.2,n:1:10.0.0.3"}, distributed.CLOUD_TPU),
        ({"worker-network-endpoints": "n:0:10.0.0.2"}, None),
        (
            {"worker-network-endpoints": "n:0:10.0.0.2", "tpu-env": "ZONE: 'z'\nMEGASCALE_NUM_SLICES: '2'\n"},
            distributed.CLOUD_TPU,
        ),
        ({"worker-network-endpoints": "n:0:10.0.0.2", "tpu-env": "ZONE: 'z'\n"}, None),
        ({}, None),
    ],
)
def test_tpu_vms_are_counted_by_their_metadata(metadata, launcher, calls, monkeypatch):
    monkeypatch.setattr(distributed, "_metadata", lambda attribute: metadata.get(attribute, ""))
    assert distributed.find_launcher({}, "tpu,cpu") == launcher
    assert distributed.find_launcher({}, "cpu") is None


def test_a_single_process_is_left_alone(calls):
    distributed.initialize(None, None, None)
    distributed.initialize("localhost:1", 1, 0)
    assert calls == []


def test_jax_finds_the_others_where_a_launcher_is_recognised(calls, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    distributed.initialize(None, None, None)
    assert calls == [{"initialization_timeout": distributed.WAIT_SECONDS}]
    assert "Slurm" in capsys.readouterr().out


def test_what_jax_does_not_find_is_told_with_the_remedy(calls, monkeypatch):
    def fail(**options):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"Open MPI: .*coordinator_address should be defined.*mpirun.*--coordinator"):
        distributed.initialize(None, None, None)


def test_options_go_before_the_environment(calls, port, monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "16")
    distributed.initialize(f"localhost:{port}", 2, 0)
    assert calls == [
        {
            "coordinator_address": f"localhost:{port}",
            "num_processes": 2,
            "process_id": 0,
            "cluster_detection_method": "deactivate",
            "initialization_timeout": distributed.WAIT_SECONDS,
        }
    ]
    assert jax.config.jax_cpu_collectives_implementation == "gloo"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("localhost:1", None, None), "^--num_processes and --process_id: expected with --coordinator"),
        ((None, 2, 0), "^--coordinator: expected with --num_processes and --process_id"),
        (("localhost:1", 2, 2), "^--process_id: expected 0 to 1.*found 2"),
        (("localhost:1", 2, -1), "^--process_id: expected 0 to 1.*found -1"),
        (("localhost", 2, 0), "^--coordinator: expected HOST:PORT, found 'localhost'"),
    ],
)
def test_wrong_options_are_refused(options, message, calls):
    with pytest.raises(InputError, match=message):
        distributed.initialize(*options)
    assert calls == []


def test_a_coordinator_that_is_not_there_is_named(calls, port, monkeypatch):
    monkeypatch.setattr(distributed, "WAIT_SECONDS", -1)
    with pytest.raises(InputError, match=f"process 0 to listen at localhost:{port} .*refused.*start process 0"):
        distributed.initialize(f"localhost:{port}", 2, 1)
    assert calls == []


def test_a_taken_port_is_named(calls):
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(InputError, match=f"listen on port {port}, found: .*in use.*another port"):
            distributed.initialize(f"localhost:{port}", 2, 0)
    assert calls == []


SUM_OVER_ALL = """
import sys
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from rehyat_jax import distributed

process = int(sys.argv[2])
if process == 0:
    import rehyat_jax.train  # must not touch a backend: initialize() would fail
distributed.initialize(sys.argv[1], 2, process)
mesh = jax.make_mesh((4,), ("data",))
sharding = NamedSharding(mesh, PartitionSpec("data"))
values = jax.make_array_from_callback((4,), sharding, lambda index: np.arange(4.0)[index])
total = jax.shard_map(lambda x: jax.lax.psum(x, "data"), mesh=mesh, in_specs=PartitionSpec("data"),
                      out_specs=PartitionSpec())
print(distributed.is_main_process(), jax.process_count(), jax.local_device_count(), float(jax.jit(total)(values)[0]))
"""


def test_two_processes_with_two_devices_each_sum_over_all(port):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    environment.pop("XLA_FLAGS", None)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SUM_OVER_ALL, f"localhost:{port}", str(process)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    try:
        for number, process in enumerate(processes):
            stdout, stderr = process.communicate(timeout=120)
            assert process.returncode == 0, stderr
            assert stdout.splitlines()[-1] == f"{number == 0} 2 2 6.0"
    finally:
        for process in processes:
            process.kill()
