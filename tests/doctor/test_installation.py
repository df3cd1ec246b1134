"""What doctor reports of Python packages, torch, kernels and GPUs."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
from doctor.facts import BROKEN, CPU, GPU, GPUS, KERNELS, found, subject
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from megatron_gkd.doctor import installation, libraries, versions
from megatron_gkd.doctor.processes import Outcome
from megatron_gkd.doctor.torch_facts import Extension, read_facts

ROOT = Path(__file__).parents[2]


def test_the_ranges_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = {one.name: one.specifier for one in map(Requirement, project["dependencies"])}
    for name, allowed in versions.RANGES.items():
        if allowed.is_required:
            assert SpecifierSet(allowed.allowed) == requirements[name], name
    assert versions.PYTHON.allowed == project["requires-python"]


def test_the_tested_versions_are_installed():
    """The tests run with what the table calls tested."""
    assert {one[0] for one in found(versions.find_versions, subject()).values()} == {"ok"}
    assert found(versions.find_python, subject())["python"][0] == "ok"


@pytest.mark.parametrize(
    ("version", "status"), [("2.13.1+cu130", "ok"), ("2.10.0", "warning"), ("2.5.1", "failed"), ("main", "failed")]
)
def test_another_version_of_torch(version, status, monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: version if name == "torch" else "0")
    assert found(versions.find_versions, subject())["version of torch"][0] == status


def test_a_missing_package(monkeypatch):
    def version(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    report = found(versions.find_versions, subject())
    assert report["version of peft"] == ("failed", "not installed", "pip install 'peft==0.20.0'")
    assert report["version of vllm"][0] == "ok"


def test_python_is_too_old(monkeypatch):
    monkeypatch.setattr("platform.python_version", lambda: "3.10.4")
    assert found(versions.find_python, subject())["python"][0] == "failed"


def test_this_machines_torch_is_read_in_another_process():
    facts = read_facts()
    assert facts.has_gloo and facts.extension.exists and facts.extension.problem is None
    assert facts.version == metadata.version("torch")


def test_a_broken_torch_is_a_failed_line(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch_cpu.so: undefined symbol: x')\n")
    monkeypatch.syspath_prepend(tmp_path)
    facts = read_facts()
    status, text, _ = found(installation.find_torch, subject(facts))["torch"]
    assert status == "failed" and text == "can't be used: ImportError: libtorch_cpu.so: undefined symbol: x"


@pytest.mark.parametrize("find", [installation.find_kernels, installation.find_gpus, installation.find_backends])
def test_nothing_else_is_reported_of_a_broken_torch(find):
    assert found(find, subject(BROKEN)) == {}


@pytest.mark.parametrize(
    ("extension", "status", "text"),
    [
        (KERNELS, "ok", "CPU (avx2), built for this torch"),
        (Extension(exists=False), "warning", "not built"),
        (Extension(True, "ImportError: undefined symbol"), "failed", "undefined symbol"),
    ],
)
def test_the_kernels(extension, status, text):
    report = found(installation.find_kernels, subject(replace(CPU, extension=extension)))["compiled kernels"]
    assert report[0] == status and text in report[1]


def test_kernels_that_are_switched_off(monkeypatch):
    monkeypatch.setenv("MEGATRON_GKD_IMPL", "torch")
    assert found(installation.find_kernels, subject())["compiled kernels"][0] == "warning"


def test_kernels_without_cuda_on_gpus():
    report = found(installation.find_kernels, subject(replace(GPUS, extension=KERNELS)))
    assert report["GPU kernels"][0] == "warning"


def test_the_gpus(monkeypatch):
    monkeypatch.setattr(installation, "driver_report", lambda: ["580.1", "580.1"])
    report = found(installation.find_gpus, subject(GPUS, nproc=2))
    assert report["GPU 1"][:2] == ("ok", "NVIDIA H100, 80 GiB, compute capability 9.0, driver 580.1")
    assert found(installation.find_gpus, subject(GPUS, nproc=3))["GPUs"][0] == "failed"
    old = replace(GPUS, gpus=(replace(GPU, capability="7.0", problem="AcceleratorError: no kernel image"),))
    status, text, remedy = found(installation.find_gpus, subject(old))["GPU 0"]
    assert status == "failed" and "no kernel image" in text and "TORCH_CUDA_ARCH_LIST=7.0" in remedy


@pytest.mark.parametrize(
    ("facts", "driver", "status"),
    [(CPU, [], "ok"), (CPU, ["580.1"], "failed"), (replace(CPU, cuda="13.0"), ["525.0"], "failed")],
)
def test_no_gpus(facts, driver, status, monkeypatch):
    monkeypatch.setattr(installation, "driver_report", lambda: driver)
    assert found(installation.find_gpus, subject(facts))["GPUs"][0] == status


def test_nvidia_smi_that_fails(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert installation.driver_report() == []
    program.write_text("#!/bin/sh\necho 580.1\n")
    program.chmod(0o755)
    assert installation.driver_report() == ["580.1"]
    program.write_text("#!/bin/sh\necho 'no devices were found'\nexit 6\n")
    assert installation.driver_report() == []


def test_the_backends():
    assert found(installation.find_backends, subject(replace(CPU, has_gloo=False)))["gloo"][0] == "failed"
    assert found(installation.find_backends, subject(GPUS))["NCCL"] == ("ok", "2.28.9", "")
    assert found(installation.find_backends, subject(replace(GPUS, nccl=None)))["NCCL"][0] == "failed"


@pytest.mark.parametrize(
    ("facts", "name", "version", "outcome", "status"),
    [
        (CPU, "transformer engine", None, None, "ok"),
        (GPUS, "transformer engine", None, None, "warning"),
        (GPUS, "apex", None, None, "ok"),
        (GPUS, "transformer engine", "2.9", Outcome(0, "", ""), "ok"),
        (GPUS, "transformer engine", "2.9", Outcome(1, "", "OSError: libcudart.so.12"), "warning"),
        (GPUS, "vllm", "0.32.0", Outcome(None, "", ""), "warning"),
    ],
)
def test_libraries(facts, name, version, outcome, status, monkeypatch):
    monkeypatch.setattr(libraries, "installed_version", lambda packages: version)
    monkeypatch.setattr(libraries, "run_python", lambda arguments, seconds: outcome)
    report = found(libraries.check_of(name).find, subject(facts))[name]
    assert report[0] == status
    if outcome is not None and outcome.code != 0:
        assert outcome.problem in report[1]
