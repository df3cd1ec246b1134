"""A whole run by a teacher behind a server that dies for good, or comes back as another."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from checkpoints import tiny_checkpoint
from command_line import train
from teachers.contract import CHECKPOINT
from teachers.fake_server import FakeServer

from megatron_gkd.errors import ServiceError

RECIPE = """
student:  {{model: {student}}}
teacher:  {{}}
distill:  {{beta: 0.5, temperature: 1, gkd_logits_topk: 16, gkd_topk_tail: bucket}}
parallel: {{tensor_model_parallel_size: 2, sequence_parallel: true}}
data:     {{dataset: [train.jsonl], max_length: 128, packing: true}}
train:    {{global_batch_size: 8, train_iters: 30, lr: 1.0e-3, adam_eps: 1.0e-3, dtype: fp32}}
output:   {{output_dir: runs/x}}
"""


def prepare(folder: Path) -> Path:
    """With the recipe and its rows; the teacher is for the command line to name."""
    rows = [
        {"prompt": " ".join(f"w{(3 * row + i) % 60}" for i in range(5)), "response": f"w{row % 60} w{row % 7} w1 w2"}
        for row in range(100)
    ]
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.yaml").write_text(RECIPE.format(student=tiny_checkpoint("qwen3_tied", seed=2)))
    return folder


def steps_of(folder: Path) -> list[dict]:
    """What its metrics.jsonl has by now."""
    path = folder / "runs/x/metrics.jsonl"
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def die(server: FakeServer) -> None:
    server.stop()


def come_back_as_another_model(server: FakeServer) -> None:
    other = tiny_checkpoint("qwen3", seed=1, head_dim=32)
    server.stop()
    server.checkpoint = other
    server.start()


@pytest.mark.parametrize(
    ("change", "max_downtime", "message"),
    [
        (die, "1", "for 1 s (teacher.teacher_server_max_downtime_s)"),
        # Long enough for a slow machine: the run stops at the first response of the other model.
        (come_back_as_another_model, "60", ": serves another model than at the start of the run (as teacher)"),
    ],
)
def test_the_student_is_exported_when_the_run_stops(change, max_downtime, message, tmp_path):
    folder = prepare(tmp_path / "run")
    options = ("--teacher_server_max_downtime_s", max_downtime)
    with FakeServer(CHECKPOINT()) as server, ThreadPoolExecutor(1) as pool:
        run = pool.submit(train, folder, "--teacher_model_server", server.url, *options)
        while len(steps_of(folder)) < 3:
            assert not run.done(), run.result().stderr
            time.sleep(0.02)
        change(server)
        finished = run.result()
    done = len(steps_of(folder))
    assert finished.returncode == ServiceError.exit_code and 3 <= done < 30
    assert server.url in finished.stderr and message in finished.stderr
    assert f"The student of step {done} is in runs/x/hf-step-{done:06}" in finished.stderr
    assert (folder / f"runs/x/hf-step-{done:06}/model.safetensors").exists()
