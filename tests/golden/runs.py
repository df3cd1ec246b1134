"""The recipes whose numbers the golden files keep: five steps in fp32, each of one kind of run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import forked_launch
import yaml
from checkpoints import tiny_checkpoint
from faults.configurations import teacher_model, write_rows
from forked_launch import Launch

KEYS = ("loss", "grad_norm", "divergence")
STEPS = 5
RECIPE: dict[str, dict[str, Any]] = {
    "student": {},
    "teacher": {},
    "distill": {"beta": 0.5, "sft_alpha": 0.1, "temperature": 0.9},
    "parallel": {},
    "data": {"dataset": ["train.jsonl"], "max_length": 64, "dataset_cache_dir": "rows"},
    "train": {"global_batch_size": 4, "lr": 1e-4, "train_iters": STEPS, "seed": 1234, "dtype": "fp32"},
    "output": {"output_dir": "run", "save_interval": None},
}
TOP_K = {"distill": {"gkd_logits_topk": 6, "gkd_topk_tail": "bucket"}}


@dataclass(frozen=True)
class GoldenRun:
    """One recipe.

    Attributes:
        changes: over RECIPE, by section.
        family, layers: of the student.
        caches_teacher: the teacher is first scored into a cache, from which the run trains.
    """

    processes: int
    changes: Mapping[str, Mapping[str, Any]]
    family: str = "qwen3_tied"
    layers: int = 2
    caches_teacher: bool = False

    def recipe(self) -> dict[str, dict[str, Any]]:
        recipe = {section: values | self.changes.get(section, {}) for section, values in RECIPE.items()}
        recipe |= {section: dict(values) for section, values in self.changes.items() if section not in RECIPE}
        recipe["student"]["model"] = str(tiny_checkpoint(self.family, seed=2, num_hidden_layers=self.layers))
        recipe["teacher"]["teacher_model"] = teacher_model()
        return recipe


RUNS = {
    "one_process": GoldenRun(1, {}),
    "tp2": GoldenRun(2, {"parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True}}),
    "pp2_cp2": GoldenRun(4, {"parallel": {"pipeline_model_parallel_size": 2, "context_parallel_size": 2}}),
    "moe_ep2": GoldenRun(2, {"parallel": {"expert_model_parallel_size": 2}}, family="qwen3_moe"),
    "on_policy_megatron": GoldenRun(
        1, {"distill": {"lmbda": 1.0}, "rollout": {"max_completion_length": 8, "rollout_temperature": 1.0}}
    ),
    "top_k_bucket": GoldenRun(1, TOP_K),
    "cached_teacher": GoldenRun(1, TOP_K, caches_teacher=True),
}


def numbers_of(name: str, folder: Path) -> list[dict[str, float]]:
    """Run `name` in `folder`. Returns the values of KEYS in each step."""
    run = RUNS[name]
    write_rows(folder)
    recipe = run.recipe()
    if run.caches_teacher:
        _start(run, folder, recipe, "score", "--output", "cache")
        recipe["teacher"] = {"teacher_cache": "cache"}
    _start(run, folder, recipe, "train")
    lines = (folder / "run/metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if "loss" in record]
    return [{key: record[key] for key in KEYS} for record in records]


def _start(run: GoldenRun, folder: Path, recipe: dict[str, Any], command: str, *arguments: str) -> None:
    path = folder / f"{command}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    start = Launch((command, str(path), *arguments), run.processes, folder, folder / f"{command}-logs")
    ended = forked_launch.run(start)
    if not ended.succeeded:
        raise RuntimeError(f"{command} ended with {ended.codes}:\n{forked_launch.printed(start)}")
