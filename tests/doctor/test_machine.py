"""What doctor reports of limits, folders, the network and servers."""

from __future__ import annotations

import os
import resource
import shutil
import socket
from pathlib import Path

import fake_vllm
import httpx
import pytest
from checkpoints import tiny_checkpoint
from doctor.facts import BROKEN, GPUS, found, subject
from recipe_workspace import Workspace
from teachers.fake_server import FakeServer

from megatron_gkd.doctor import checkpoint_size, limits, network, servers, storage
from megatron_gkd.runtime import servers as http_servers


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Workspace(tmp_path)


def load(workspace, *overrides, **options):
    return subject(recipe=workspace.load(*overrides, require_paths=False, **options))


def test_shared_memory(monkeypatch):
    monkeypatch.setattr(limits, "shared_memory_bytes", lambda: 64 * 2**20)
    status, text, remedy = found(limits.find_shared_memory, subject(nproc=8))["shared memory"]
    assert status == "warning" and "0.1 GiB" in text and "--shm-size=4g" in remedy
    monkeypatch.setattr(limits, "shared_memory_bytes", lambda: 2**33)
    assert found(limits.find_shared_memory, subject(nproc=8))["shared memory"][0] == "ok"
    monkeypatch.undo()
    monkeypatch.setattr(limits, "SHARED_MEMORY", "/nowhere")
    assert found(limits.find_shared_memory, subject())["shared memory"][0] == "warning"


def test_locked_memory(workspace, monkeypatch):
    monkeypatch.setattr(limits, "locked_memory_limit", lambda: 2**23)
    assert found(limits.find_locked_memory, subject())["locked memory"][0] == "ok"
    assert "InfiniBand" in found(limits.find_locked_memory, subject(GPUS))["locked memory"][1]
    offloading = subject(GPUS, recipe=workspace.load())
    status, text, _ = found(limits.find_locked_memory, offloading)["locked memory"]
    assert status == "warning" and text == "limited to 8 MiB, too little with teacher.offload_teacher_model"
    monkeypatch.setattr(limits, "locked_memory_limit", lambda: None)
    assert found(limits.find_locked_memory, offloading)["locked memory"][0] == "ok"


@pytest.mark.parametrize(
    ("soft", "hard", "status"), [(65536, 65536, "ok"), (1024, 1024, "warning"), (resource.RLIM_INFINITY,) * 2 + ("ok",)]
)
def test_open_files(soft, hard, status, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    assert found(limits.find_open_files, subject())["open files"][0] == status


def folder(path, **options):
    return storage.Folder("output_dir", Path(path), "output.output_dir", **options)


def test_a_folder_that_can_be_written(tmp_path):
    status, text, _ = found(storage.find, folder(tmp_path / "runs/x"), subject())["output_dir"]
    assert status in ("ok", "warning") and str(tmp_path / "runs/x") in text and "GiB free" in text
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_place_of_a_folder(tmp_path):
    (tmp_path / "file").touch()
    status, text, _ = found(storage.find, folder(tmp_path / "file"), subject())["output_dir"]
    assert status == "failed" and "is a file" in text


@pytest.mark.parametrize(
    ("name", "doing"),
    [("tempfile.mkdtemp", "make a folder"), ("os.fsync", "flush and rename"), ("fcntl.flock", "lock a file")],
)
def test_an_operation_that_the_file_system_lacks(name, doing, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(name, fail)
    status, text, _ = found(storage.find, folder(tmp_path), subject())["output_dir"]
    assert status == "failed" and f"can't {doing}" in text and text.endswith("Input/output error")


@pytest.mark.parametrize(
    ("kind", "free", "status"),
    [("ext4", 2**40, "ok"), ("tmpfs", 2**40, "warning"), ("ext4", 2**20, "warning"), ("nfs4", 2**40, "ok")],
)
def test_where_a_folder_is(kind, free, status, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "file_system_of", lambda path: kind)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: os.terminal_size((free, free)))
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": free}))
    report = found(storage.find, folder(tmp_path, holds_results=True), subject())["output_dir"]
    assert report[0] == status and f"on {kind}" in report[1]


def test_too_little_space_for_the_checkpoints_of_a_recipe(workspace, monkeypatch):
    student = tiny_checkpoint("qwen3", seed=1)
    made = load(workspace, "--model", str(student), "--dtype", "fp32", "--save_total_limit", "2")
    numbers = sum(file.stat().st_size for file in student.glob("*.safetensors")) // 4
    needed = checkpoint_size.estimate_bytes(made.recipe)
    assert needed == pytest.approx(numbers * (4 + 4 * 12), rel=0.1)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": needed - 1}))
    (check,) = [one for one in storage.checks_of(made) if one.name == "output_dir"]
    status, _, remedy = found(check.find, made)["output_dir"]
    assert status == "failed" and "save_total_limit" in remedy


def test_the_size_is_unknown_without_the_students_files(workspace):
    assert checkpoint_size.estimate_bytes(workspace.load()) is None
    assert checkpoint_size.estimate_bytes(workspace.load("--model", "hub/id", require_paths=False)) is None


def test_the_folders_of_a_recipe(workspace, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", "/hub")
    names = {one.name: str(one.path) for one in storage.folders_of(subject())}
    assert names == {"dataset cache": str(Path.home() / ".cache/megatron_gkd/datasets"), "hub cache": "/hub"}
    server = ("--lmbda", "1", "--engine", "vllm_server", "--vllm_server_urls", "http://a:1")
    made = load(workspace, "--dataset_cache_dir", "/cache", *server)
    names = {one.name: str(one.path) for one in storage.folders_of(made)}
    assert names["dataset cache"] == "/cache" and names["weight_sync_dir"] == "runs/x/rollout_weights"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Set `hub.problem` to an exception or a status."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)

    class Hub:
        problem: Exception | int = 200

    def head(address, **_):
        if isinstance(Hub.problem, Exception):
            raise Hub.problem
        return httpx.Response(Hub.problem)

    monkeypatch.setattr(httpx, "head", head)
    return Hub


def test_the_hub(hub, workspace, monkeypatch, tmp_path):
    named = load(workspace, "--model", "some/model")
    assert found(network.find_hub, named)["hub"][0] == "ok"
    for hub.problem in (httpx.ConnectError("no route"), httpx.ReadTimeout(""), 503):
        assert found(network.find_hub, subject())["hub"][0] == "warning"
        assert found(network.find_hub, load(workspace))["hub"][0] == "warning"  # its models are folders
        status, text, _ = found(network.find_hub, named)["hub"]
        assert status == "failed" and "the cache lacks some/model" in text
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert found(network.find_hub, subject())["hub"][0] == "ok"
    assert found(network.find_hub, named)["hub"][0] == "failed"
    cached = tmp_path / "hub/models--some--model/snapshots/abc"
    cached.mkdir(parents=True)
    (cached / "config.json").touch()
    assert found(network.find_hub, named)["hub"][0] == "failed", "a plan has left the configuration alone"
    (cached / "model.safetensors").touch()
    assert found(network.find_hub, named)["hub"][0] == "ok"


def test_the_host_name(monkeypatch):
    def unknown(name):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "gethostbyname", unknown)
    assert found(network.find_host_name, subject())["host name"][0] == "warning"
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "203.0.113.7")  # of no interface
    assert found(network.find_host_name, subject())["host name"][0] == "failed"
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.0.1")
    assert found(network.find_host_name, subject())["host name"][0] == "ok"


@pytest.mark.parametrize(
    ("value", "status"), [("lo", "ok"), ("=lo", "ok"), ("l", "ok"), ("=l", "failed"), ("ib7", "failed"), ("^ib7", "ok")]
)
def test_interfaces(value, status, monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", value)
    monkeypatch.setattr("psutil.net_if_addrs", lambda: {"lo": [], "eth0": []})
    assert found(network.find_interfaces, subject())["NCCL_SOCKET_IFNAME"][0] == status


def teacher_server(workspace, url, student):
    overrides = ("--teacher_model=null", "--offload_teacher_model=false", "--teacher_model_server", url)
    overrides += ("--gkd_logits_topk", "5", "--temperature", "1", "--max_length", "256", "--model", str(student))
    return load(workspace, *overrides)


def test_a_teacher_server(workspace):
    student, other = tiny_checkpoint("qwen3", seed=1), tiny_checkpoint("qwen3", seed=1, vocab_size=64)
    with FakeServer(student) as fake:
        made = teacher_server(workspace, fake.url, student)
        (check,) = servers.checks_of(made)
        assert check.name == f"teacher.teacher_model_server {fake.url}"
        assert found(check.find, made)[check.name] == ("ok", "serves teacher", "")
        fake.max_model_len = 100
        status, text, _ = found(check.find, made)[check.name]
        assert status == "failed" and "--max-model-len 257" in text
        assert found(check.find, subject(BROKEN, recipe=made.recipe))[check.name][0] == "warning"
    status, text, _ = found(check.find, made)[check.name]
    assert status == "failed" and fake.url in text
    assert other != student


def test_a_rollout_server(workspace, monkeypatch):
    fake = fake_vllm.FakeVllm()
    monkeypatch.setattr(
        http_servers, "open_client", lambda *_: httpx.Client(transport=fake_vllm.transport({"a": fake}))
    )
    made = load(workspace, "--lmbda", "1", "--engine", "vllm_server", "--vllm_server_urls", "http://a:1")
    (check,) = servers.checks_of(made)
    assert found(check.find, made)[check.name] == ("ok", "serves fake", "")

    def refuse(path):
        raise httpx.ConnectError("refused")

    fake.before = refuse
    assert found(check.find, made)[check.name][0] == "failed"
    fake.before = lambda path: None
    fake.server_info = lambda **_: {"vllm_config": {"model_config": {"logprobs_mode": "processed_logprobs"}}}
    status, text, _ = found(check.find, made)[check.name]
    assert status == "failed" and "--logprobs-mode raw_logprobs" in text
