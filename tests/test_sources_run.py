"""A run whose rows come from several sources: drawn, renamed, divided, scored by source, and continued."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re

import pytest
import yaml
from command_line import run, train

PLUGIN = """
import os
from pathlib import Path

from megatron_gkd.data import register_dataset

Path(f"loaded-{os.environ.get('RANK', 'alone')}").touch()

@register_dataset("hub_copy")
def turns(row):
    return {"prompt": row["question"], "response": row["answer"]}
"""
OPTIONS = (
    *("--dtype", "fp32", "--tensor_model_parallel_size", "1", "--global_batch_size", "4", "--export_interval", "null"),
    *("--save_interval", "2", "--lr_decay_style", "constant", "--dataset_cache_dir", "cache", "--val_dataset", "[]"),
    *("--split_dataset_ratio", "0.2", "--eval_interval", "2", "--external_plugins", "plugin.py"),
)
DATASET = (
    "--dataset",
    "hub_copy:main#12",
    "{path: rows/*.csv.gz#9, columns: {question: prompt, answer: response}}",
)
TAGS = ("--teacher_model", "null", "--offload_teacher_model", "false", "--teacher_tag_key", "dataset", "--teachers")


@pytest.fixture
def folder(workspace):
    (workspace / "plugin.py").write_text(PLUGIN)
    (workspace / "rows").mkdir()
    for name in ("a", "b"):
        text = io.StringIO()
        table = csv.DictWriter(text, ["question", "answer"])
        table.writeheader()
        table.writerows({"question": f"w{index} ", "answer": f"w{index} w1"} for index in range(3))
        (workspace / "rows" / f"{name}.csv.gz").write_bytes(gzip.compress(text.getvalue().encode()))
    (workspace / "hub_copy").mkdir()
    rows = [{"question": f"w{index} w2 ", "answer": f"w{index}"} for index in range(30)]
    (workspace / "hub_copy" / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (workspace / "hub_copy" / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files: data.jsonl\n---\n"
    )
    return workspace


def losses(path):
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [(record["step"], record.get("split"), record["loss"]) for record in records]


def test_a_run_and_its_continuation(folder):
    whole = train(folder, *OPTIONS, *DATASET, "--train_iters", "4", "--output_dir", "runs/whole")
    assert whole.returncode == 0, whole.stderr
    assert re.search(r"training: .*15 of 15 rows used", whole.stdout), whole.stdout
    assert re.search(r"validation: .*3 of 3 rows used", whole.stdout), whole.stdout
    assert "Flattening" not in whole.stderr, "a progress bar of datasets"
    assert {path.name for path in folder.glob("loaded-*")} == {"loaded-0", "loaded-1"}

    assert train(folder, *OPTIONS, *DATASET, "--train_iters", "2").returncode == 0
    for path in folder.glob("loaded-*"):
        path.unlink()
    other = train(folder, *OPTIONS, *DATASET[:1], "hub_copy:main#13", *DATASET[2:], "--train_iters", "4")
    assert other.returncode == 2
    assert other.stderr.count("data.dataset (rows, weight and hash of each file) = ") == 1
    assert {path.name for path in folder.glob("loaded-*")} == {"loaded-0", "loaded-1"}, "the rows are in the cache"

    continued = train(folder, *OPTIONS, *DATASET, "--train_iters", "4")
    assert continued.returncode == 0, continued.stderr
    assert losses(folder / "runs/x") == losses(folder / "runs/whole")
    weights = [(folder / f"runs/{name}/hf/model.safetensors").read_bytes() for name in ("x", "whole")]
    assert weights[0] == weights[1]


def test_teachers_by_source(folder):
    teacher = yaml.safe_load((folder / "recipe.yaml").read_text())["teacher"]["teacher_model"]
    tags = ("hub_copy:main", "rows/*.csv.gz")
    teachers = json.dumps([{"tags": [tag], "teacher_model": teacher} for tag in tags])
    one = train(folder, *OPTIONS, *DATASET, "--train_iters", "2", "--output_dir", "runs/one")
    several = train(folder, *OPTIONS, *DATASET, "--train_iters", "2", *TAGS, teachers)
    assert one.returncode == several.returncode == 0, one.stderr + several.stderr
    assert "of rows with the tags rows/*.csv.gz" in several.stdout
    found, expected = losses(folder / "runs/x"), losses(folder / "runs/one")
    assert [loss for _, _, loss in found] == pytest.approx([loss for _, _, loss in expected], rel=1e-5)


@pytest.mark.parametrize("command", [("check", "--nproc", "2"), ("train",), ("generate", "--from", "student")])
def test_a_plugin_that_fails_is_one_line(folder, command):
    (folder / "plugin.py").write_text("1 / 0\n")
    name, *options = command
    output = ("--output", "rows.jsonl", "--lmbda", "1") if name == "generate" else ()
    one_process = () if name == "check" else ("--tensor_model_parallel_size", "1")
    finished = run(folder, name, "recipe.yaml", "--external_plugins", "plugin.py", *options, *output, *one_process)
    assert finished.returncode == 2
    assert "external_plugins: plugin.py: ZeroDivisionError: division by zero" in finished.stderr
    assert "Traceback" not in finished.stderr
