"""Permissions: tests/unprivileged.py, run without root's right to read and write everything."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent / "unprivileged.py"
RIGHTS = "-dac_override,-dac_read_search,-fowner"


@pytest.mark.skipif(os.geteuid() == 0 and not shutil.which("setpriv"), reason="root cannot give up its rights here")
def test_commands_obey_and_explain_permissions():
    give_up = ["setpriv", f"--bounding-set={RIGHTS}", f"--inh-caps={RIGHTS}"] if os.geteuid() == 0 else []
    command = [*give_up, sys.executable, "-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider", str(TESTS)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
