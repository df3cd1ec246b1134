"""scripts/gpu_check.sh refuses without a GPU or a package; otherwise it takes every step, whatever became of others."""

import os
import re
import shutil
import subprocess

import pytest
import torch
from import_closure import ROOT, third_party

SCRIPT = ROOT / "scripts" / "gpu_check.sh"
# Behaves as a Python that has torch with a GPU, records what it has to run, and fails to build.
FAKE_PYTHON = """\
#!/bin/sh
case "$1" in
    -c) echo 9.0 ;;
    -) echo "$FAKE_MISSING" ;;
    *) echo "ran $*"; [ "$1" != setup.py ] ;;
esac
"""
STEPS = {
    "build": ("build.log", "ran setup.py build_ext --inplace"),
    "memcheck": ("sanitizer.log", "--tool memcheck"),
    "racecheck": ("sanitizer.log", "--tool racecheck"),
    "tests": ("tests.log", "ran -m pytest -q -m gpu tests/ops"),
    "transfer": ("tests.log", "test_transfer_groups.py"),
    "training": ("training.log", "ran -m pytest -q -m gpu tests/training/test_gpu_runs.py"),
    "benchmarks": ("benchmarks.log", "ran scripts/benchmarks/loss.py --device cuda"),
}

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")


def run(out, *parts, **environment):
    command = ["bash", str(SCRIPT), str(out), *parts]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=120)


@pytest.fixture
def fakes(tmp_path):
    """Return the environment with a Python and a compute-sanitizer that only record."""
    for name, text in {"python": FAKE_PYTHON, "compute-sanitizer": "#!/bin/sh\necho sanitized\n"}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return {"PYTHON": str(tmp_path / "python"), "PATH": f"{tmp_path}:{os.environ['PATH']}", "FAKE_MISSING": ""}


def verdicts(out):
    lines = (out / "summary.txt").read_text().splitlines()
    return {line.split()[0]: line for line in lines if line.split()[0] in STEPS}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_refuses_without_a_gpu(tmp_path):
    finished = run(tmp_path, "benchmarks")
    assert finished.returncode == 2
    assert "sees no CUDA device" in finished.stderr
    assert not list(tmp_path.iterdir())


def test_later_steps_run_after_a_failed_one(tmp_path, fakes):
    out = tmp_path / "out"
    assert run(out, **fakes).returncode == 1
    found = verdicts(out)
    assert list(found) == list(STEPS)
    assert "FAILED: exit status 1" in found.pop("build")
    assert all("passed" in line for line in found.values())
    for step, (log, text) in STEPS.items():
        assert text in (out / log).read_text(), step


def test_chosen_parts_run_alone_and_in_their_order(tmp_path, fakes):
    assert run(tmp_path / "out", "benchmarks", "sanitizers", **fakes).returncode == 0
    assert list(verdicts(tmp_path / "out")) == ["benchmarks", "memcheck", "racecheck"]


def test_what_is_missing_is_one_line_before_anything_runs(tmp_path, fakes):
    finished = run(tmp_path / "out", **fakes | {"FAKE_MISSING": "httpx setuptools>=77"})
    assert finished.returncode == 2
    assert "lacks httpx setuptools>=77;" in finished.stderr and len(finished.stderr.splitlines()) == 1
    assert not list((tmp_path / "out").iterdir())


def test_parts_that_may_take_too_long_are_refused(tmp_path, fakes):
    finished = run(tmp_path / "out", **fakes | {"MEGATRON_GKD_GPU_CHECK_SECONDS": "300"})
    assert finished.returncode == 2 and "more than the 300 s" in finished.stderr
    assert run(tmp_path / "out", "everything", **fakes).returncode == 2


@pytest.mark.parametrize(
    ("part", "files"),
    [
        ("test_packages", ["tests/conftest.py", "tests/ops/*.py"]),
        ("tests", ["tests/conftest.py", "tests/ops/*.py", "tests/rollout/vllm/test_transfer_groups.py"]),
        ("training", ["tests/conftest.py", "tests/training/test_gpu_runs.py", "megatron_gkd/training/**/*.py"]),
        ("benchmarks", ["scripts/benchmarks/loss.py", "scripts/benchmarks/targets.py"]),
    ],
)
def test_lists_of_packages_are_what_is_imported(part, files):
    text = SCRIPT.read_text()
    common = re.search(r'test_packages="(.*)"', text)[1]
    found = re.search(rf'\[?{part}\]?="(.*torch.*|\$test.*)"', text)[1].replace("$test_packages", common)
    listed = {name.split(".")[0] for name in found.split()}
    paths = [path for pattern in files for path in sorted(ROOT.glob(pattern))]
    assert len(paths) >= len(files)
    assert third_party(paths) - OPTIONAL <= listed


OPTIONAL = {"vllm"}  # imported in functions and in modules of the server only
