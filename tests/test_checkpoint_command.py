"""`megatron-gkd checkpoint` on a whole run, and how that run goes on when a checkpoint is damaged."""

from __future__ import annotations

import json

from checkpoints import tiny_checkpoint
from command_line import run, train

OPTIONS = "--tensor_model_parallel_size 1 --eval_interval 2 --export_interval 2 --save_interval 2 --save_total_limit 1"


def checkpoint(folder, *arguments):
    return run(folder, "checkpoint", *arguments)


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_run_and_its_checkpoints(workspace):
    # A student that begins as its teacher and learns from the labels moves away from it: the first is the best.
    teacher = ("--teacher_model", str(tiny_checkpoint("qwen3_tied", seed=2)), "--sft_alpha", "1")
    options = (*OPTIONS.split(), *teacher, "--lr_decay_style", "constant")
    assert train(workspace, *options, "--train_iters", "6", processes=1).returncode == 0
    folder = workspace / "runs/x/checkpoints"
    records = [json.loads(line) for line in (workspace / "runs/x/metrics.jsonl").read_text().splitlines()]
    scores = {record["step"]: record["divergence"] for record in records if record.get("split") == "validation"}
    assert scores.keys() == {2, 4, 6} and min(scores, key=scores.__getitem__) == 2
    assert sorted(path.name for path in folder.iterdir()) == ["best", "last", "step-000002", "step-000006"]
    assert (str((folder / "best").readlink()), str((folder / "last").readlink())) == ("step-000002", "step-000006")
    for step in (2, 6):
        assert json.loads((folder / f"step-00000{step}/run.json").read_text())["validation"] == scores[step]

    listed = checkpoint(workspace, "list", "runs/x").stdout.splitlines()
    assert [line.split()[0] for line in listed] == ["step", "2", "6"]
    assert listed[1].endswith("whole, best") and listed[2].endswith("whole, last") and "1 process" in listed[1]

    refused = checkpoint(workspace, "export", "runs/x", "best")
    message = "--output = runs/x/hf-step-000002: exists already; must be a folder that does not\n"
    assert refused.returncode == 2 and refused.stderr == message
    exported = checkpoint(workspace, "export", "runs/x", "best", "--output", "again")
    assert exported.returncode == 0, exported.stderr
    assert "exported runs/x/checkpoints/step-000002 to again" in exported.stdout
    assert files_of(workspace / "again") == files_of(workspace / "runs/x/hf-step-000002")

    shard = next(folder.glob("step-000006/*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    damage = f"{shard.relative_to(workspace)}: damaged: its SHA-256 is not the one that it was written with"
    verified = checkpoint(workspace, "verify", "runs/x")
    assert verified.returncode == 2 and verified.stderr == damage + "\n"
    assert verified.stdout.startswith("runs/x/checkpoints/step-000002: intact (")
    refused = checkpoint(workspace, "export", "runs/x", "--output", "third")
    assert refused.returncode == 2 and refused.stderr == damage + "\n" and not (workspace / "third").exists()

    resumed = train(workspace, *options, "--train_iters", "4", processes=1)
    assert resumed.returncode == 0 and "Traceback" not in resumed.stderr, resumed.stderr
    assert (
        f"WARNING rank 0: {damage}" in resumed.stdout
        and "resumed from runs/x/checkpoints/step-000002" in resumed.stdout
    )
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["best", "last", "step-000002", "step-000004", "step-000006.1"]
    assert str((folder / "last").readlink()) == "step-000004"
    assert "set aside (step-000006.1)" in checkpoint(workspace, "list", "runs/x").stdout
