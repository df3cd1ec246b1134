"""The runs that are killed: eight ways to train, with small models and few rows."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoints import tiny_checkpoint

K = 6
RECIPE: dict[str, dict[str, Any]] = {
    "student": {},
    "teacher": {},
    "distill": {"beta": 0.5, "sft_alpha": 0.1},
    "parallel": {},
    "data": {"dataset": ["train.jsonl"], "max_length": 64, "dataset_cache_dir": "rows"},
    "train": {"global_batch_size": 4, "lr": 5e-3, "lr_warmup_iters": 3, "seed": 1234},
    "output": {"save_interval": 3, "save_total_limit": 2, "completions_to_print": 1},
}
VALIDATION = {"data": {"val_dataset": ["val.jsonl"]}, "train": {"eval_interval": 5}}
SAMPLING = {
    "distill": {"lmbda": 0.6, "lmbda_granularity": "row"},
    "rollout": {"max_completion_length": 8, "mismatch_kl_threshold": None},
    "output": {"log_completions": True, "log_completions_interval": 2},
}
MODELS = {
    "tied": ("qwen3_tied", {"num_hidden_layers": 2}),
    "tied, 4 layers": ("qwen3_tied", {}),
    "experts": ("qwen3_moe", {"num_hidden_layers": 2}),
}


@dataclass(frozen=True)
class Configuration:
    """A run's recipe, in 2 processes.

    Attributes:
        changes: in RECIPE, each applied over those before it.
        has: what the run does beside steps and checkpoints; see `points.Point.needs`.
        bad_steps: whose loss is made NaN.
    """

    changes: tuple[Mapping[str, Mapping[str, Any]], ...]
    has: frozenset[str] = frozenset()
    student: str = "tied"
    has_teacher: bool = True
    bad_steps: frozenset[int] = frozenset()
    processes: int = field(default=2, init=False)

    def recipe(self, steps: int) -> dict[str, dict[str, Any]]:
        """Return the recipe of `steps` steps, without an output folder."""
        recipe = {section: dict(values) for section, values in RECIPE.items()}
        family, sizes = MODELS[self.student]
        recipe["student"]["model"] = str(tiny_checkpoint(family, seed=2, **sizes))
        if self.has_teacher:
            recipe["teacher"]["teacher_model"] = teacher_model()
        recipe["train"]["train_iters"] = steps
        for changes in self.changes:
            for section, values in changes.items():
                recipe[section] = recipe.get(section, {}) | values
        return recipe


def teacher_model() -> str:
    return str(tiny_checkpoint("qwen3", seed=1, num_hidden_layers=2, hidden_size=48))


def write_rows(folder: Path) -> None:
    """Write train.jsonl and val.jsonl."""
    generator = random.Random(0)

    def words() -> str:
        return " ".join(f"w{generator.randrange(60)}" for _ in range(generator.randrange(3, 12)))

    for name, count in {"train": 50, "val": 7}.items():
        turns = [
            [{"role": "user", "content": words()}, {"role": "assistant", "content": words()}] for _ in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns))


CONFIGURATIONS = {
    "offline TP2": Configuration(
        (
            {"parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True}},
            VALIDATION,
            {"data": VALIDATION["data"] | {"dataloader_num_workers": 1}},
        ),
        frozenset({"validation", "bad steps"}),
        bad_steps=frozenset({2, 7, 8, 11, 22, 39}),
    ),
    "PP2xVPP2 tied": Configuration(
        (
            {"parallel": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}},
            {"train": {"dtype": "fp32"}},
        ),
        student="tied, 4 layers",
    ),
    "MoE EP2": Configuration(
        ({"parallel": {"expert_model_parallel_size": 2}, "output": {"async_save": False}}, VALIDATION),
        frozenset({"validation"}),
        student="experts",
    ),
    "on-policy megatron": Configuration(
        (
            SAMPLING,
            {"rollout": {"steps_per_generation": 2, "num_generations": 4}},  # checkpoints are in the middle of one
            {"parallel": {"tensor_model_parallel_size": 2}},
        ),
        frozenset({"rollouts", "embedded engine", "completions"}),
    ),
    "steps_ahead 1": Configuration(
        (
            SAMPLING,
            {
                "rollout": {
                    "engine": "vllm_server",
                    "steps_ahead": 1,
                    "steps_per_generation": 2,
                    "num_generations": 2,
                    "vllm_server_timeout_s": 20.0,
                }
            },
        ),
        frozenset({"rollouts", "servers", "completions"}),
    ),
    "EMA self-teacher": Configuration(
        ({"teacher": {"teacher_kind": "self", "teacher_ema": 0.9}}, VALIDATION),
        frozenset({"validation"}),
        has_teacher=False,
    ),
    "cached teacher": Configuration(
        (
            {"teacher": {"teacher_cache": "cache"}, "distill": {"gkd_logits_topk": K, "gkd_topk_tail": "bucket"}},
            {"parallel": {"context_parallel_size": 2}},
            VALIDATION,
        ),
        frozenset({"validation"}),
        has_teacher=False,
    ),
    "LoRA TP2": Configuration(
        (
            {"lora": {"lora_rank": 4, "lora_alpha": 8, "lora_dropout": 0.1, "merge_lora": True}},
            {"parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True}},
            VALIDATION,
        ),
        frozenset({"validation"}),
    ),
}
