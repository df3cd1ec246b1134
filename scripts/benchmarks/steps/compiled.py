"""The loop that one writes with transformers: both models' logits, and the usual formula under torch.compile."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.contestants import usual_formula
from benchmarks.steps.cases import BETA, CLIP_GRAD, OPTIMIZER, Case
from benchmarks.steps.peers_data import IGNORED, batches, load, lora_config
from benchmarks.steps.turns import Turns


class Contestant:
    """The process of the loop."""

    def __init__(self, rank: int, processes: int, root: Path) -> None:
        pass

    def run(self, case: Case, folder: Path, turns: Turns) -> None:
        """Train until the last turn."""
        torch._dynamo.reset()
        divergence = torch.compile(usual_formula)
        student, teacher = load(folder / "student"), load(folder / "teacher").eval()
        if case.has_lora:
            from peft import get_peft_model

            student = get_peft_model(student, lora_config())
        student.train()
        optimizer = torch.optim.AdamW(_parameter_groups(student), **OPTIMIZER, fused=True)
        data, clock = batches(case), turns.clock
        labels = sum((batch["labels"][:, 1:] != IGNORED).sum().item() for batch in data)
        while turns.begin():
            total = 0.0
            for batch in data:
                is_label = batch["labels"][:, 1:] != IGNORED
                inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
                with clock.phase("student"):
                    student_logits = student(**inputs).logits[:, :-1]
                with clock.phase("teacher"), torch.no_grad():
                    teacher_logits = teacher(**inputs).logits[:, :-1]
                with clock.phase("head and loss"):
                    rows: tuple[Tensor, Tensor] = student_logits[is_label], teacher_logits[is_label]
                    loss = divergence(*rows, BETA).sum() / labels
                with clock.phase("student"):
                    loss.backward()
                total += loss.item()
                del student_logits, teacher_logits, rows, loss
            with clock.phase("optimizer"):
                nn.utils.clip_grad_norm_(student.parameters(), CLIP_GRAD)
                optimizer.step()
                optimizer.zero_grad()
            turns.end(total)


def _parameter_groups(model: nn.Module) -> list[dict]:
    """Return the trained parameters; matrices decay, norms do not."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [one for one in trained if one.ndim > 1]},
        {"params": [one for one in trained if one.ndim == 1], "weight_decay": 0.0},
    ]
