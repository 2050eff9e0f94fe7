"""Installs a wheel into an empty environment and runs its quick demo: python tests/wheel_check.py WHEEL.

It prints the seconds of every part. The first video, downloads aside, must be there within three minutes. Commands that
need other extras must name them.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LIMIT_SECONDS = 180
"""From the beginning of the installation to the first video of the demo's teacher."""

EXTRAS = "cpu,demo"

NEEDS_MORE = {
    "demo": "torch",
    "completion bash": "completion",
    "plan --config configs/wan_1_3b_distill.py --topology v5e:4x4": "tpu",
}
"""Arguments of `rehyat` -> the extra that they need in addition."""


def main() -> int:
    """Checks the wheel of the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel", type=Path)
    wheel = parser.parse_args().wheel.resolve()
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        # Without the checkout's own modules, and without packages that are installed elsewhere.
        variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        variables["JAX_PLATFORMS"] = "cpu"

        def run(part: str, *command: str | Path) -> None:
            print(f"{part}: {' '.join(map(str, command))}", flush=True)
            start = time.time()
            subprocess.run(command, cwd=folder, env=variables, check=True)
            seconds[part] = time.time() - start

        requirement, pip = f"{wheel}[{EXTRAS}]", folder / "venv" / "bin" / "pip"
        run("environment", sys.executable, "-m", "venv", "venv")
        run("download", pip, "download", "--quiet", "--dest", "wheels", requirement)
        installing = time.time()
        run("installation", pip, "install", "--quiet", "--no-index", "--find-links", "wheels", requirement)
        run("rehyat --help", folder / "venv" / "bin" / "rehyat", "--help")
        run("rehyat demo --quick", folder / "venv" / "bin" / "rehyat", "demo", "--quick")
        first_video = (folder / "runs" / "demo_quick" / "teacher.mp4").stat().st_mtime - installing
        (folder / "runs" / "demo_quick" / "student.mp4").stat()
        for arguments, extra in NEEDS_MORE.items():
            command = [folder / "venv" / "bin" / "rehyat", *arguments.split()]
            refused = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
            found = refused.stderr.strip().splitlines() or [""]
            print(f"rehyat {arguments}: {found[-1]}", flush=True)
            assert refused.returncode == 2 and found[-1].endswith(f"pip install 'rehyat-jax[{extra}]'"), refused
    for part, took in seconds.items():
        print(f"{took:7.1f} s  {part}")
    print(f"{first_video:7.1f} s  from the beginning of the installation to the first video (limit: {LIMIT_SECONDS})")
    return 0 if first_video < LIMIT_SECONDS and seconds["rehyat --help"] < 1 else 1


if __name__ == "__main__":
    sys.exit(main())
