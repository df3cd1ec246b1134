"""What the student said in a step, and token by token how far it was from the teacher: records for a human reader."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from megatron_gkd.data.context_parallel import context_parallel_indices
from megatron_gkd.data.microbatch import Microbatch
from megatron_gkd.data.sample import IGNORE
from megatron_gkd.runtime.mesh import Mesh
from megatron_gkd.training.on_policy import Answer, RolloutReport


class Completions:
    """Of every `interval`-th step in which the student answers, from the first. `tokenizer` makes text of tokens."""

    def __init__(self, mesh: Mesh, tokenizer: PreTrainedTokenizerBase, interval: int):
        self.mesh, self.tokenizer, self.interval = mesh, tokenizer, interval
        self.sampled_steps = 0

    def of_step(
        self, step: int, report: RolloutReport, microbatches: Sequence[Microbatch], divergence: Sequence[torch.Tensor]
    ) -> list[dict[str, Any]]:
        """One record a completion, on the main rank; none elsewhere, or where the step is not due.

        All ranks must call it together, once for every step in which the student answers. `divergence` is the
        student's `token_divergence`.
        """
        self.sampled_steps += 1
        if (self.sampled_steps - 1) % self.interval:
            return []
        by_position = self._gather(report, microbatches, divergence)
        if not self.mesh.is_main:
            return []
        return [
            self._record(step, answer, by_position.get(position)) for position, answer in sorted(report.answers.items())
        ]

    def _record(self, step: int, answer: Answer, divergence: np.ndarray | None) -> dict[str, Any]:
        completion, of_token = answer.completion, None
        if divergence is not None:
            of_token = [None if math.isnan(value) else float(f"{value:.6g}") for value in divergence.tolist()]
        known = [] if of_token is None else [value for value in of_token if value is not None]
        return {
            "step": step,
            "row": answer.row,
            "version": completion.version,
            "prompt": self.tokenizer.decode(answer.prompt, skip_special_tokens=False),
            "completion": self.tokenizer.decode(completion.token_ids, skip_special_tokens=False),
            "prompt_length": len(answer.prompt),
            "completion_length": len(completion.token_ids),
            "finish_reason": completion.finish_reason,
            "divergence": sum(known) / len(known) if known else None,
            "token_ids": list(completion.token_ids),
            "token_divergence": of_token,
        }

    def _gather(
        self, report: RolloutReport, microbatches: Sequence[Microbatch], divergence: Sequence[torch.Tensor]
    ) -> dict[int, np.ndarray]:
        """By position in the global batch, the divergence of each token of a completion that is trained on.

        NaN where the teacher says nothing.
        """
        mesh = self.mesh
        own: dict[int, np.ndarray] = {}
        for microbatch, bin_, values in zip(microbatches, report.bins, divergence, strict=False):  # none: earlier stage
            own |= self._pieces(microbatch, bin_, values, report.answers)
        parts: list[dict[int, np.ndarray]] = [{} for _ in range(mesh.dp_cp.size())]
        dist.all_gather_object(parts, own, group=mesh.dp_cp)
        whole: dict[int, np.ndarray] = {}
        for position, piece in (item for part in parts for item in part.items()):
            known = whole.get(position, piece)
            whole[position] = np.where(np.isnan(known), piece, known)
        return mesh.broadcast_from_last_stage(whole)

    def _pieces(
        self, microbatch: Microbatch, positions: Sequence[int], divergence: torch.Tensor, answers: dict[int, Answer]
    ) -> dict[int, np.ndarray]:
        """As `_gather`, of one microbatch; NaN for tokens that another context-parallel rank holds."""
        cp = self.mesh.cp
        here = context_parallel_indices(microbatch.cu_seqlens, cp.rank(), cp.size())
        whole = torch.full((microbatch.total_length,), torch.nan, device=divergence.device)
        whole[here[microbatch.labels.squeeze(0) != IGNORE]] = divergence.float()
        pieces = {}
        for position, start in zip(positions, microbatch.cu_seqlens.tolist(), strict=False):
            answer = answers.get(position)
            if answer is not None and answer.is_trained_on:
                first = start + len(answer.prompt) - 1  # where the completion's first token is predicted
                pieces[position] = whole[first : first + len(answer.completion.token_ids)].cpu().numpy()
        return pieces
