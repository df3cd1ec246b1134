"""On-policy training of adapters with the real vLLM, whole: what it samples from is the student with its adapters."""

from __future__ import annotations

import functools
import importlib.util
import json
from pathlib import Path

import pytest
import vllm_server
from checkpoints import tiny_checkpoint
from command_line import train

pytestmark = pytest.mark.vllm
NO_VLLM = "no vLLM in this environment: bash scripts/test.sh runs this in .venv-vllm"
RANK = 8
# After a step at this learning rate B is at 0.05: the student is far from its base.
OPTIONS = (
    *f"--tuner_type lora --lora_rank {RANK} --lora_alpha 32 --lora_dropout 0".split(),
    *"--lmbda 1 --beta 1 --max_completion_length 12 --train_iters 3 --lr 0.05 --lr_decay_style constant".split(),
    *"--export_interval null --save_interval null".split(),
)
STUDENT = functools.partial(tiny_checkpoint, "qwen3", seed=6, head_dim=32)
IN_RANKS = ("--engine", "vllm", "--vllm_kv_cache_gib", "0.03")

OF_BASE = """
import megatron_gkd.runtime.preload
from megatron_gkd import cli
from megatron_gkd.models.megatron_model import MegatronModel

MegatronModel.named_tensors = lambda self, merged_dtype=None: self.base_tensors()
MegatronModel.adapter_tensors = lambda self, tensors=MegatronModel.adapter_tensors: (
    (name, tensor * 0) for name, tensor in tensors(self)
)
cli.run()
"""
"""The command line, whose rollouts are the base's."""


def mismatches(folder: Path, *options: str, program=None) -> list[float]:
    """Train and return `mismatch_kl` of each step."""
    options = ("--model", str(STUDENT()), *OPTIONS, *options, "--output_dir", "runs/lora", "--resume", "never")
    finished = train(folder, *options, program=program)
    assert finished.returncode == 0, finished.stderr[:3000]
    records = [json.loads(line) for line in (folder / "runs/lora/metrics.jsonl").read_text().splitlines()]
    assert (folder / "runs/lora/adapters/adapter_model.safetensors").is_file()
    assert not (folder / "runs/lora/hf").exists()
    found = [record["mismatch_kl"] for record in records if "split" not in record]
    print(f"mismatch_kl {options[-5:]}: {found}")
    return found


def assert_follows_adapters(folder: Path, *options: str) -> None:
    assert max(map(abs, mismatches(folder, *options))) < 1e-5
    (folder / "of_base.py").write_text(OF_BASE)
    first, *others = mismatches(folder, *options, program="of_base.py")
    assert abs(first) < 1e-5 and max(map(abs, others)) > 1e-2, "the base would be noticed"


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason=NO_VLLM)
def test_vllm_in_the_ranks_samples_from_merged_weights(workspace):
    assert_follows_adapters(workspace, *IN_RANKS, "--dtype", "fp32")


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason=NO_VLLM)
@pytest.mark.parametrize("dtype", ["null", "fp32"])
def test_merging_in_bf16(dtype, workspace):
    found = mismatches(workspace, *IN_RANKS, "--dtype", "bf16", "--merge_dtype", dtype)
    assert max(map(abs, found)) < 5e-3


@pytest.mark.parametrize("weight_sync", ["folder", vllm_server.TRANSFER_BACKEND])
def test_servers_sample_from_merged_weights(weight_sync, student_server, workspace):
    server = ("--engine", "vllm_server", "--vllm_server_urls", student_server.url)
    assert_follows_adapters(workspace, *server, "--weight_sync", weight_sync, "--dtype", "fp32")


@pytest.fixture(scope="module")
def lora_server(tmp_path_factory):
    if not vllm_server.is_installed():
        pytest.skip(vllm_server.WHY_ABSENT)
    server = vllm_server.VllmServer(STUDENT(), tmp_path_factory.mktemp("vllm") / "server.log", lora_rank=RANK)
    server.ensure_running()
    yield server
    server.kill()


def test_servers_take_adapters_at_run_time(lora_server, workspace):
    server = ("--engine", "vllm_server", "--vllm_server_urls", lora_server.url)
    assert_follows_adapters(workspace, *server, "--weight_sync", "lora", "--dtype", "fp32")
