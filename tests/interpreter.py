"""Triton's interpreter, in which kernels run on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_interpreted(file: Path) -> None:
    """Run a file of tests in it, in a process of its own: it has to be told before Triton is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-rA", str(file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout and "skipped" not in done.stdout
