"""scripts/gpu_check.sh: refuses without a GPU; otherwise takes every step, whatever became of the one before."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "gpu_check.sh"
# Behaves as a Python that has torch with a GPU, records what it has to run, and fails to build.
FAKE_PYTHON = """\
#!/bin/sh
case "$1" in
    -c) echo 9.0 ;;
    *) echo "ran $*"; [ "$1" != setup.py ] ;;
esac
"""

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")


def run(out, **environment):
    command = ["bash", str(SCRIPT), str(out)]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_refuses_without_a_gpu(tmp_path):
    finished = run(tmp_path)
    assert finished.returncode == 2
    assert "sees no CUDA device" in finished.stderr
    assert not list(tmp_path.iterdir())


def test_later_steps_run_after_a_failed_one(tmp_path):
    fake = tmp_path / "python"
    fake.write_text(FAKE_PYTHON)
    fake.chmod(0o755)
    sanitizer = tmp_path / "compute-sanitizer"
    sanitizer.write_text("#!/bin/sh\necho sanitized\n")
    sanitizer.chmod(0o755)
    out = tmp_path / "out"
    finished = run(out, PYTHON=str(fake), PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert finished.returncode == 1
    lines = (out / "summary.txt").read_text().splitlines()
    verdicts = {line.split()[0]: line for line in lines if line.split()[0] in STEPS}
    assert list(verdicts) == list(STEPS)
    assert "FAILED: exit status 1" in verdicts.pop("build")
    assert all("passed" in line for line in verdicts.values())
    for step, (log, text) in STEPS.items():
        assert text in (out / log).read_text(), step


STEPS = {
    "build": ("build.log", "ran setup.py build_ext --inplace"),
    "tests": ("tests.log", "ran -m pytest -q -m gpu tests/ops"),
    "benchmarks": ("benchmarks.log", "ran scripts/benchmarks/loss.py --device cuda"),
    "memcheck": ("sanitizer.log", "--tool memcheck"),
    "racecheck": ("sanitizer.log", "--tool racecheck"),
}
