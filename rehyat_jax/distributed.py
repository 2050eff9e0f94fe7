"""Joins several processes into one JAX run: detects whether there are several, and lets them find each other."""

import os
import re
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import NamedTuple

import jax

from rehyat_jax.errors import InputError
from rehyat_jax.extras import install_command

WAIT_SECONDS = 300
"""Seconds that processes wait for each other: nodes of one job start minutes apart. It equals JAX's default."""


class Launcher(NamedTuple):
    """The program that started this process as one of several; `remedy` helps if JAX does not find the others."""

    name: str
    remedy: str


OPEN_MPI = Launcher("Open MPI", "start the processes with Open MPI 4's mpirun")
SLURM = Launcher("Slurm", "start the processes with srun")
CLOUD_TPU = Launcher("Cloud TPU", f"install libtpu on every worker: {install_command('tpu')}")
KUBERNETES = Launcher(
    "Kubernetes",
    f"{install_command('k8s')} and let the service account read pods, services and jobs; for a Job of one pod alone, "
    "--coordinator localhost:1234 --num_processes 1 --process_id 0",
)


def initialize(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Joins this process to the others of its run. Call it before any use of a JAX backend.

    With all three options, they define the run, and the process owns every device it sees (`JAX_LOCAL_DEVICE_IDS=0,1`
    or `CUDA_VISIBLE_DEVICES` restrict it). With none of them, `jax.distributed.initialize` finds the other processes if
    the environment shows that there are several. It supports:

      - Slurm and Open MPI, with one process per GPU
      - Cloud TPU pods and multislices
      - indexed Jobs of Kubernetes

    A single process is left unchanged.

    JAX aborts without an exception if some of the other processes do not join within WAIT_SECONDS. SIGTERM does not end
    a process that has joined others: JAX takes it as notice of a preemption (`training.stop_signal`).

    Args:
      coordinator: HOST:PORT where process 0 listens, reachable from all processes.
      num_processes: number of processes.
      process_id: index of this process, in 0..num_processes-1.

    Raises:
      InputError: an option is missing or wrong, the coordinator cannot be reached or its port is in use, or JAX cannot
        find the other processes.
    """
    options = {"--coordinator": coordinator, "--num_processes": num_processes, "--process_id": process_id}
    missing = [name for name, value in options.items() if value is None]
    if not missing:
        _join_at(coordinator, num_processes, process_id)
    elif len(missing) < len(options):
        raise InputError(
            f"{' and '.join(missing)}: expected with {' and '.join(name for name in options if name not in missing)}, "
            "found nothing; give all three, or none where the launcher is Slurm, Open MPI, Cloud TPU or Kubernetes"
        )
    elif launcher := find_launcher(os.environ, jax.config.jax_platforms or ""):
        _join_by(launcher)


def is_main_process() -> bool:
    """True in the process that writes the run's logs, reports and configuration files."""
    return jax.process_index() == 0


def find_launcher(environment: Mapping[str, str], platforms: str = "") -> Launcher | None:
    """The launcher that started several processes, detected from the environment; None for a single process.

    The order of the checks is JAX's, so that both find the same launcher. Only the tasks of this process's Slurm step
    count: the allocation may have more, for example around an interactive shell, which is a single process.

    Args:
      environment: environment of this process, after JAX was imported.
      platforms: `jax.config.jax_platforms`; empty if JAX chooses.
    """
    if int(environment.get("OMPI_COMM_WORLD_SIZE") or 1) > 1:
        return OPEN_MPI
    if int(environment.get("SLURM_STEP_NUM_TASKS") or 1) > 1:
        return SLURM
    if not platforms or "tpu" in platforms:
        workers = environment.get("TPU_PROCESS_ADDRESSES", environment.get("TPU_WORKER_HOSTNAMES"))
        if int(environment.get("MEGASCALE_NUM_SLICES") or 1) > 1 or "," in (workers or ""):
            return CLOUD_TPU
        if workers is not None:
            return None
        # JAX sets this on import if it sees no TPU. The metadata of TPU VMs outside of Kubernetes list the workers.
        if "TPU_SKIP_MDS_QUERY" not in environment and _tpu_vm_processes() > 1:
            return CLOUD_TPU
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        return KUBERNETES
    return None


def _join_by(launcher: Launcher) -> None:
    """Lets JAX find the other processes."""
    print(f"joining the processes of {launcher.name}, for up to {WAIT_SECONDS} s", flush=True)
    try:
        _initialize()
    except (ValueError, RuntimeError, OSError) as error:
        raise InputError(
            f"{launcher.name}: expected one of several processes, and JAX to find the others, found: "
            f"{str(error).rstrip('.')}; {launcher.remedy}, or give --coordinator, --num_processes and --process_id"
        ) from error


def _join_at(coordinator: str, num_processes: int, process_id: int) -> None:
    """Joins the processes that the options name."""
    if not 0 <= process_id < num_processes:
        raise InputError(
            f"--process_id: expected 0 to {num_processes - 1}, as --num_processes is {num_processes}, found "
            f"{process_id}; number the processes from 0"
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise InputError(
            f"--coordinator: expected HOST:PORT, found {coordinator!r}; give the address of process 0 and a free port"
        )
    if num_processes == 1:
        return
    # Checked before JAX connects, because JAX would abort the process without a Python exception.
    if process_id == 0:
        _check_port_is_free(int(port))
    else:
        _wait_for(host.strip("[]"), int(port))
    print(f"joining process {process_id} of {num_processes} at {coordinator}, for up to {WAIT_SECONDS} s", flush=True)
    _initialize(
        coordinator_address=coordinator,
        num_processes=num_processes,
        process_id=process_id,
        cluster_detection_method="deactivate",
    )


def _initialize(**options) -> None:
    if (jax.config.jax_platforms or "").startswith("cpu"):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(**options, initialization_timeout=WAIT_SECONDS)


def _check_port_is_free(port: int) -> None:
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        raise InputError(
            f"--coordinator: expected that process 0 can listen on port {port}, found: {error}; "
            "end what listens there, perhaps an earlier run, or give all processes another port"
        ) from error


def _wait_for(host: str, port: int) -> None:
    """Returns when something listens there; process 0 and host names may become available after this process starts."""
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise InputError(
                    f"--coordinator: expected process 0 to listen at {host}:{port} within {WAIT_SECONDS} s, found: "
                    f"{error}; start process 0 on that host, and open the port to this one"
                ) from error
        time.sleep(1)


def _tpu_vm_processes() -> int:
    """Number of workers in all slices, from the TPU VM's metadata; 1 without such metadata."""
    workers = _metadata("worker-network-endpoints").split(",")
    slices = re.search(r"^MEGASCALE_NUM_SLICES: *'?(\d+)", _metadata("tpu-env"), re.MULTILINE)
    return len(workers) * (int(slices[1]) if slices else 1)


def _metadata(attribute: str, attempts: int = 3) -> str:
    """An attribute of this virtual machine from Google's metadata server; empty if there is none."""
    request = urllib.request.Request(
        f"http://metadata.google.internal/computeMetadata/v1/instance/attributes/{attribute}",
        headers={"Metadata-Flavor": "Google"},
    )
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for _ in range(attempts):
        try:
            with direct.open(request, timeout=5) as response:
                return response.read().decode()
        except urllib.error.HTTPError:
            return ""
        except OSError:
            time.sleep(1)
    return ""
