"""Records of the student's completions for a human reader, with each token's divergence from the teacher."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from megatron_gkd.data.microbatch import Microbatch
from megatron_gkd.runtime.agreement import run_on_all
from megatron_gkd.runtime.context_parallel import context_parallel_indices
from megatron_gkd.runtime.mesh import Mesh
from megatron_gkd.training.rollout_report import RolloutReport, SampledRow


class CompletionRecorder:
    """Record the completions of every `interval`-th on-policy step, from the first.

    Args:
        mesh: of the ranks.
        tokenizer: decodes prompts and completions.
        interval: on-policy steps from one record to the next.
    """

    def __init__(self, mesh: Mesh, tokenizer: PreTrainedTokenizerBase, interval: int) -> None:
        self.mesh, self.tokenizer, self.interval = mesh, tokenizer, interval
        self.sampled_steps = 0

    def of_step(
        self, step: int, report: RolloutReport, microbatches: Sequence[Microbatch], divergence: Sequence[torch.Tensor]
    ) -> list[dict[str, Any]]:
        """Return one record a completion, on the main rank; none elsewhere, or where the step is not recorded.

        All ranks must call it together, once for every on-policy step.

        Args:
            step: its number.
            report: of its sampling.
            microbatches: of this rank.
            divergence: the student's `token_divergence`, for each microbatch.
        """
        self.sampled_steps += 1
        if (self.sampled_steps - 1) % self.interval:
            return []
        by_position = self._gather(report, microbatches, divergence)

        def build() -> list[dict[str, Any]]:
            rows = sorted(report.sampled.items()) if self.mesh.is_main else []
            return [self._record(step, row, by_position.get(position)) for position, row in rows]

        return run_on_all(build)

    def _record(self, step: int, row: SampledRow, divergence: np.ndarray | None) -> dict[str, Any]:
        completion, by_token = row.completion, None
        if divergence is not None:
            by_token = [None if math.isnan(value) else float(f"{value:.6g}") for value in divergence.tolist()]
        known = [] if by_token is None else [value for value in by_token if value is not None]
        return {
            "step": step,
            "row": row.row,
            "version": completion.version,
            "prompt": self.tokenizer.decode(row.prompt, skip_special_tokens=False),
            "completion": self.tokenizer.decode(completion.token_ids, skip_special_tokens=False),
            "prompt_length": len(row.prompt),
            "completion_length": len(completion.token_ids),
            "finish_reason": completion.finish_reason,
            "divergence": sum(known) / len(known) if known else None,
            "token_ids": list(completion.token_ids),
            "token_divergence": by_token,
        }

    def _gather(
        self, report: RolloutReport, microbatches: Sequence[Microbatch], divergence: Sequence[torch.Tensor]
    ) -> dict[int, np.ndarray]:
        """Gather the divergence of each token of the completions that are trained on.

        Returns:
            By position in the global batch; NaN for tokens that the teacher does not score.
        """
        mesh = self.mesh
        own: dict[int, np.ndarray] = {}
        for microbatch, bin_, values in zip(microbatches, report.bins, divergence, strict=False):  # none: earlier stage
            own |= self._divergence_of(microbatch, bin_, values, report.sampled)
        parts: list[dict[int, np.ndarray]] = [{} for _ in range(mesh.dp_cp.size())]
        dist.all_gather_object(parts, own, group=mesh.dp_cp)
        whole: dict[int, np.ndarray] = {}
        for position, piece in (item for part in parts for item in part.items()):
            known = whole.get(position, piece)
            whole[position] = np.where(np.isnan(known), piece, known)
        return mesh.broadcast_from_last_stage(whole)

    def _divergence_of(
        self, microbatch: Microbatch, positions: Sequence[int], divergence: torch.Tensor, sampled: dict[int, SampledRow]
    ) -> dict[int, np.ndarray]:
        """Return one microbatch's part of `_gather`; NaN for tokens that another context-parallel rank holds."""
        cp = self.mesh.cp
        here = context_parallel_indices(microbatch.cu_seqlens, cp.rank(), cp.size())
        whole = torch.full((microbatch.total_length,), torch.nan, device=divergence.device)
        whole[here[microbatch.label_positions]] = divergence.float()
        pieces = {}
        for position, start in zip(positions, microbatch.cu_seqlens.tolist(), strict=False):
            row = sampled.get(position)
            if row is not None and row.is_trained_on:
                first = start + len(row.prompt) - 1  # where the completion's first token is predicted
                pieces[position] = whole[first : first + len(row.completion.token_ids)].cpu().numpy()
        return pieces
