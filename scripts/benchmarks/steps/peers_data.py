"""The rows and models of a case as transformers has them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from benchmarks.steps.cases import LORA, Case, groups, prompt_length

IGNORED = -100


def examples(case: Case) -> list[dict[str, list[int]]]:
    """Return the rows with labels that are not shifted."""
    found = []
    for row in case.rows():
        ids, prompt = row.tolist(), prompt_length(len(row))
        found.append({"input_ids": ids, "labels": [IGNORED] * prompt + ids[prompt:]})
    return found


def pad(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Return a batch of rows, each padded at its end to the longest."""
    longest = max(len(row["input_ids"]) for row in rows)

    def column(name: str, value: int) -> Tensor:
        return torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in rows])

    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    mask = torch.arange(longest) < lengths[:, None]
    return {"input_ids": column("input_ids", 0), "labels": column("labels", IGNORED), "attention_mask": mask.long()}


def batches(case: Case) -> list[dict[str, Tensor]]:
    """Return the padded microbatches of a step."""
    return [pad(group) for group in groups(examples(case), case.microbatch_rows)]


def load(folder: Path) -> nn.Module:
    """Return a model in fp32 from its folder."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def lora_config() -> object:
    """Return PEFT's configuration of the adapters."""
    from peft import LoraConfig

    return LoraConfig(
        r=LORA["rank"],
        lora_alpha=LORA["alpha"],
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
