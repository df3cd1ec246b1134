"""The command line, whole: the recipe of the README, and what a run leaves behind."""

from __future__ import annotations

import json
import math
import re
import socket

import numpy as np
import pytest
import torch
import yaml
from command_line import run, train
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_gkd import __version__


def test_a_recipe_becomes_a_checkpoint_metrics_and_curves(workspace):
    options = ("--dtype", "fp32", "--eval_interval=2", "--distill.sft_alpha", "0.1")
    finished = train(workspace, *options, draws_curves=True)
    assert finished.returncode == 0, finished.stderr
    run = workspace / "runs/x"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "split" not in record]
    validation = [record for record in records if record.get("split") == "validation"]
    assert [record["step"] for record in steps] == [1, 2, 3, 4]
    assert [record["step"] for record in validation] == [2, 4]
    for record in steps:
        assert record["loss"] == pytest.approx(record["divergence"] + 0.1 * record["sft_loss"], rel=1e-6)
        assert record["source"] == "dataset" and record["num_tokens"] > 0 and record["grad_norm"] > 0
        for key in ("lr", "teacher_entropy", "student_entropy", "step_time_s", "teacher_time_s", "tokens_per_second"):
            assert math.isfinite(record[key]) and record[key] > 0, key
        assert 0 <= record["top1_agreement"] <= 1 and record["peak_memory_bytes"] > 1e6
    assert validation[1]["divergence"] < validation[0]["divergence"]
    assert validation[0]["num_tokens"] == validation[1]["num_tokens"]
    assert yaml.safe_load((run / "recipe.yaml").read_text())["distill"]["sft_alpha"] == 0.1
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG") and list((run / "tensorboard").iterdir())
    for export in (run / "hf", run / "hf-step-000002"):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(export), AutoTokenizer.from_pretrained(export)
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": "w1 w2"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            assert model(**prompt).logits.isfinite().all()
    for path in ("runs/x/hf", "runs/x/metrics.jsonl", "runs/x/curves.png"):
        assert path in finished.stdout + finished.stderr
    assert "Traceback" not in finished.stderr
    for rank, log in ((0, finished.stdout), (1, (run / "logs/rank_1.log").read_text())):
        assert re.search(rf"^[\d-]+ [\d:]+ INFO rank {rank}: exporting to runs/x/hf$", log, re.MULTILINE)
    before, _, _ = finished.stdout.partition("step 1/4")
    for line in (
        rf"megatron-gkd  {re.escape(__version__)} \(torch {re.escape(torch.__version__)}, megatron-core \S+\)",
        "device        .+, 2 processes on 1 node",
        "layout        2 processes = tensor 2 x context 1 x pipeline 1 x data 1",
        "step          8 rows = data 1 x microbatches 8 x rows 1",
        "precision     fp32 weights, activations, gradients and optimizer",
        r"kernels       (compiled \(.+\)|plain torch)",
        r"attention     sdpa \(torch\)",
        r"student       /.+: qwen3, 46\.6 K parameters, all trainable",
        "teacher       /.+: qwen3, 42\.1 K parameters, in host memory between scorings",
        r"rows          training: \d+ tokens; 40 of 40 rows used",
        r"              validation: \d+ tokens; 11 of 11 rows used",
        r"steps         4 \(0\.8 epochs\), starting at step 1",
        "checkpoints   every 500 steps in runs/x/checkpoints, the newest 3 kept",
        "output        runs/x",
    ):
        assert len(re.findall(f"^{line}$", before, re.MULTILINE)) == 1, line
    assert before.count("Starting megatron-gkd") <= 2, "one rank shows the phases"


@pytest.mark.parametrize("granularity", ["step", "row"])
def test_lambda_selects_the_rows_that_the_student_samples(workspace, granularity):
    with open(workspace / "train.jsonl", "a") as file:
        file.write("".join(json.dumps({"prompt": f"w{i}"}) + "\n" for i in range(8)))
    lmbda = "1" if granularity == "step" else "0.5"
    options = ("--lmbda", lmbda, "--lmbda_granularity", granularity, "--max_completion_length", "12", "--beta", "1")
    options += ("--prompt_only", "on_policy_only")
    logged = ("--log_completions", "--log_completions_interval", "2", "--mismatch_kl_threshold", "1e-12")
    finished = train(workspace, *options, *logged, "--dtype", "fp32", "--truncated_completions", "mask")
    assert finished.returncode == 0, finished.stderr
    records = [json.loads(line) for line in (workspace / "runs/x/metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "split" not in record]
    assert {record["source"] for record in steps} == {"student" if granularity == "step" else "mixed"}
    for record in steps:
        assert record["student_rows"] + record["dataset_rows"] == 8 and record["student_rows"] > 0
        assert 1 <= record["mean_completion_length"] <= 12 and 0 <= record["truncated_share"] <= 1
        assert record["rollout_tokens_per_second"] > 0 and record["rollout_time_s"] < record["step_time_s"]
        assert 0 <= record["sync_time_s"] < record["step_time_s"]
        assert record["mismatch_kl"] is None or abs(record["mismatch_kl"]) < 1e-4
    completions = [json.loads(line) for line in (workspace / "runs/x/completions.jsonl").read_text().splitlines()]
    for step in (1, 3):
        of_step = [completion for completion in completions if completion["step"] == step]
        assert len(of_step) == steps[step - 1]["student_rows"]
        lengths = [completion["completion_length"] for completion in of_step]
        assert np.mean(lengths) == pytest.approx(steps[step - 1]["mean_completion_length"])
        for completion in of_step:
            assert completion["prompt"] and completion["version"] == step - 1
            is_masked = completion["finish_reason"] == "length"
            assert (completion["token_divergence"] is None) == (completion["divergence"] is None) == is_masked
    assert {completion["step"] for completion in completions} == {1, 3}
    assert "step 1: completions" in finished.stdout
    assert ("rollout.mismatch_kl_threshold = 1e-12" in finished.stdout) == any(step["mismatch_kl"] for step in steps)


FAILING = """
import megatron_gkd.runtime.preload
from megatron_gkd import cli
from megatron_gkd.rollout.base import RolloutFailed
from megatron_gkd.rollout.megatron.engine import MegatronEngine

def generate(self, *arguments, generate=MegatronEngine.generate):
    if self.version == 2:
        raise RolloutFailed("http://server:8000: refused for 300 s")
    return generate(self, *arguments)

MegatronEngine.generate = generate
cli.run()
"""
"""The command line with an engine that fails in step 3."""


def test_rollouts_that_fail_for_good_end_the_run_with_an_export(workspace):
    (workspace / "failing.py").write_text(FAILING)
    options = ("--lmbda", "1", "--max_completion_length", "12", "--export_interval", "null", "--dtype", "fp32")
    finished = train(workspace, *options, program="failing.py")
    assert finished.returncode != 0
    assert finished.stderr.count("stopped after step 2 of 4: http://server:8000: refused for 300 s") == 1
    assert "The student of step 2 is in runs/x/hf-step-000002; the same command continues" in finished.stderr
    assert "training/run.py" not in finished.stderr, "a traceback of ours"
    run = workspace / "runs/x"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2]
    assert (run / "curves.png").exists() and not (run / "hf").exists()
    assert AutoModelForCausalLM.from_pretrained(run / "hf-step-000002").num_parameters() > 0


BROKEN = """
import os
import time

import megatron_gkd.runtime.preload
import torch.distributed as dist

from megatron_gkd import cli
from megatron_gkd.training import rescue
from megatron_gkd.training.student import Student

def compute_gradients(self, *arguments, compute=Student.compute_gradients):
    self.count = getattr(self, "count", 0) + 1
    if self.count == 3 and os.environ["RANK"] in "{ranks}":
        raise KeyError("a fault of the program")
    return compute(self, *arguments)

Student.compute_gradients = compute_gradients
rescue.OTHERS_FAIL_WITHIN_S = 3.0
# NCCL's waits for ranks that never come; so may what libraries do at exit.
dist.destroy_process_group = lambda *arguments: time.sleep(600)
try:
    cli.run()
finally:
    time.sleep(600)
"""
"""The command line with a fault in step 3, in some ranks, and a process group that can't be taken down then."""


def test_a_rank_that_fails_alone_leaves_without_waiting_for_the_others(workspace):
    (workspace / "broken.py").write_text(BROKEN.format(ranks="1"))
    finished = train(workspace, "--dtype", "fp32", "--export_interval", "null", program="broken.py")
    assert finished.returncode != 0
    assert "KeyError: 'a fault of the program'" in finished.stderr
    assert "stopped after step 2 of 4. Not every rank failed within 3 s of this one" in finished.stderr


def test_one_process_without_a_launcher_needs_no_port_and_saves_before_it_fails(workspace):
    with socket.socket() as other_run:
        try:
            other_run.bind(("127.0.0.1", 29500))
            other_run.listen()
        except OSError:  # another process listens there, which tests the same
            pass
        (workspace / "broken.py").write_text(BROKEN.format(ranks="0"))
        options = ("--tensor_model_parallel_size", "1", "--dtype", "fp32", "--export_interval", "null")
        finished = run(workspace, "train", "recipe.yaml", *options, program="broken.py")
    assert finished.returncode == 1, finished.stderr
    assert "KeyError: 'a fault of the program'" in finished.stderr and "stopped after step 2 of 4" in finished.stderr
    assert AutoModelForCausalLM.from_pretrained(workspace / "runs/x/hf-step-000002").num_parameters() > 0


def test_a_bad_row_ends_the_run_with_its_file_and_line(workspace):
    with open(workspace / "train.jsonl", "a") as file:
        file.write("{not json\n")
    finished = train(workspace, "--tensor_model_parallel_size", "1", processes=1)
    assert finished.returncode != 0
    assert "train.jsonl, line 41: not JSON" in finished.stderr
    assert "training/run.py" not in finished.stderr, "a traceback of ours"


def test_several_mistakes_are_reported_at_once_before_any_process_group(workspace):
    overrides = ("--beta", "1.5", "--temperature", "0", "--pipeline_model_parallel_size", "3", "--betta", "1")
    finished = train(workspace, *overrides, processes=1)
    assert finished.returncode != 0
    for key in ("distill.beta", "distill.temperature", "betta", "beta"):
        assert key in finished.stderr
    assert not (workspace / "runs").exists()
