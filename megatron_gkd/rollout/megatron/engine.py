"""The embedded rollout engine: batched sampling with the sharded student itself.

There are as many lanes of rows as pipeline stages, and a step is one forward pass of every lane through Megatron's own
schedule, so that the stages work at the same time. The last stage's tensor-parallel ranks draw the tokens together,
each from its shard of the vocabulary. Rows that finish make room for prompts that wait.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from tokenizers import Tokenizer
from torch import Tensor, nn

from megatron_gkd.data.microbatch import padded_length
from megatron_gkd.models.megatron_model import MegatronModel, hidden_states, in_eval_mode
from megatron_gkd.models.pipeline import forward_only
from megatron_gkd.ops.vocabulary import VocabShard
from megatron_gkd.rollout.base import Completion, Sampling, check_prompts
from megatron_gkd.rollout.megatron.kv_cache import KeyValueCache
from megatron_gkd.rollout.megatron.lane import Lane, Row, StepBatch
from megatron_gkd.rollout.megatron.sampling import fold_to_int64, sample
from megatron_gkd.rollout.stop_strings import StopStringWatch, decoder_of
from megatron_gkd.runtime import portability


class MegatronEngine:
    """`eos_token_ids`: any of them ends a completion.

    `max_batch_tokens`: tokens that the cache of keys and values has room for, over all rows at once. A row takes as
    many as the longest prompt and the longest completion together.
    `max_prompt_tokens`: tokens of prompts in one forward pass of one lane; a longer prompt goes alone.
    """

    def __init__(
        self,
        model: MegatronModel,
        eos_token_ids: Sequence[int],
        *,
        max_batch_tokens: int = 32768,
        max_prompt_tokens: int = 8192,
    ):
        self.model, self.mesh, self.eos_token_ids = model, model.mesh, frozenset(eos_token_ids)
        self.max_batch_tokens, self.max_prompt_tokens = max_batch_tokens, max_prompt_tokens
        self.version = 0
        self._decoder: Tokenizer | None = None  # for stop strings alone
        config = model.config
        # Experts are asked in every forward pass, of ranks that have rows and of ranks that have none left.
        self.shares_experts = config.num_moe_experts is not None and (
            config.expert_model_parallel_size > 1 or config.expert_tensor_parallel_size > 1
        )

    def resident(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """The weights are the student's own: only their version is new."""
        self.version = version

    @torch.no_grad()  # not inference_mode: what modules keep of a forward pass must serve training later
    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int]) -> list[Completion]:
        """As `RolloutEngine.generate`. ValueError, too, if a prompt and its completion exceed `max_batch_tokens`.

        The weights must be complete: a parameter gather that is overlapped with the forward pass has to be forced
        first, since a replica without prompts makes no forward pass.
        """
        check_prompts(prompts, seeds, self.model.checkpoint.vocab_size)
        # A completion's last token is never fed back.
        longest = max(map(len, prompts), default=1)
        capacity = longest + sampling.max_completion_length - 1
        if prompts and capacity > self.max_batch_tokens:
            raise ValueError(
                f"the longest prompt ({longest} tokens) and max_completion_length "
                f"({sampling.max_completion_length}) do not fit into max_batch_tokens ({self.max_batch_tokens})"
            )
        cp = self.mesh.cp
        # Context-parallel ranks hold the whole model each: they deal the prompts out.
        rows = [
            Row(i, list(prompts[i]), fold_to_int64(seeds[i]), self._watch(prompts[i], sampling))
            for i in range(cp.rank(), len(prompts), cp.size())
        ]
        with in_eval_mode(self.model.chunks):
            finished = self._run(rows, sampling, capacity)
        completions = {row.index: self._completion(row, sampling) for row in finished}
        if cp.size() > 1:
            parts: list[dict[int, Completion]] = [{} for _ in range(cp.size())]
            dist.all_gather_object(parts, completions, group=cp)
            completions = {index: completion for part in parts for index, completion in part.items()}
        return [completions[index] for index in range(len(prompts))]

    def _watch(self, prompt: Sequence[int], sampling: Sampling) -> StopStringWatch | None:
        if not sampling.stop:
            return None
        self._decoder = self._decoder or decoder_of(self.model.checkpoint.tokenizer())
        return StopStringWatch(self._decoder, prompt, sampling.stop)

    def _run(self, rows: list[Row], sampling: Sampling, capacity: int) -> list[Row]:
        """Complete all rows."""
        waiting = deque(sorted(rows, key=lambda row: -len(row.prompt)))  # prompts of like length start together
        num_rows, num_lanes = min(len(rows), self.max_batch_tokens // capacity), self.mesh.pp.size()
        sizes = [len(range(number, num_rows, num_lanes)) for number in range(num_lanes)]
        lanes = [Lane(number, size, self.max_prompt_tokens) for number, size in enumerate(sizes)]
        finished: list[Row] = []
        cache = KeyValueCache(sizes, capacity, self.model.config.softmax_scale)
        with cache.installed(self.model.chunks):
            while self._anyone(len(finished) < len(rows)):
                _admit(waiting, lanes)
                self._append_tokens(lanes, self._forward(lanes, cache), sampling)
                for lane in lanes:
                    finished += lane.remove(lambda row: self._finish_reason(row, sampling) is not None, cache.move)
        return finished

    def _anyone(self, busy: bool) -> bool:
        """Whether a forward pass is needed: here, or by a rank whose tokens our experts may serve."""
        if not self.shares_experts:
            return busy
        anyone = torch.tensor([busy], dtype=torch.int32, device=portability.device())
        dist.all_reduce(anyone, op=dist.ReduceOp.MAX, group=self.mesh.dp_cp)
        return bool(anyone)

    def _forward(self, lanes: list[Lane], cache: KeyValueCache) -> list[Tensor | None]:
        """On the last stage, for each lane [rows, H]: the hidden states of its rows' newest tokens; None elsewhere."""
        layout = self.mesh.layout
        multiple = layout.tensor if layout.sequence_parallel else 1
        lengths = [padded_length(max(1, lane.num_tokens), multiple) for lane in lanes]
        if len(self.model.chunks) > 1:  # the interleaved schedule wants one shape for all
            lengths = [max(lengths)] * len(lanes)
        batches = [
            lane.next_batch(length, max_position=cache.capacity, cp_size=self.mesh.cp.size()).to(portability.device())
            for lane, length in zip(lanes, lengths, strict=True)
        ]

        def forward(chunk: nn.Module, batch: StepBatch) -> Tensor:
            cache.begin(batch)
            return hidden_states(chunk, batch)

        return forward_only(self.model.chunks, batches, forward, self._newest, self.mesh)

    def _newest(self, hidden: Tensor, batch: StepBatch) -> Tensor:
        states = hidden.squeeze(0)
        if self.mesh.layout.sequence_parallel:
            states = gather_from_sequence_parallel_region(states, group=self.mesh.tp)
        return states[batch.last_tokens]

    def _append_tokens(self, lanes: list[Lane], hidden: list[Tensor | None], sampling: Sampling) -> None:
        """Give every row its next token, the same on all ranks of the replica."""
        rows = [row for lane in lanes for row in lane.rows]
        if not rows:
            return
        pp = self.mesh.pp
        drawn = torch.empty(2, len(rows), dtype=torch.float64, device=portability.device())
        if self.mesh.is_last_stage:
            logits = F.linear(torch.cat(hidden), self.model.head_weight)
            seeds = torch.tensor([row.seed for row in rows], device=logits.device)
            positions = torch.tensor([len(row.token_ids) for row in rows], device=logits.device)
            vocab_size = sampling.excluded_ids(self.model.checkpoint.vocab_size).start
            shard = VocabShard.of(logits.shape[1], self.mesh.tp, vocab_size)
            drawn[0], drawn[1] = sample(logits, seeds, positions, sampling, shard)
        if pp.size() > 1:
            dist.broadcast(drawn, src=self.mesh.last_stage_rank, group=pp)
        for row, token, log_prob in zip(rows, *drawn.tolist(), strict=True):
            row.append(int(token), log_prob)

    def _finish_reason(self, row: Row, sampling: Sampling) -> str | None:
        newest = row.token_ids[-1]
        if (
            row.has_stop_string
            or newest in sampling.stop_token_ids
            or (newest in self.eos_token_ids and not sampling.ignore_eos)
        ):
            return "stop"
        return "length" if len(row.token_ids) == sampling.max_completion_length else None

    def _completion(self, row: Row, sampling: Sampling) -> Completion:
        return Completion(row.token_ids, row.log_probs, self._finish_reason(row, sampling), self.version)


def _admit(waiting: deque[Row], lanes: list[Lane]) -> None:
    """Give waiting rows to the emptiest lanes that have room."""
    while waiting:
        open_lanes = [lane for lane in lanes if lane.has_room(waiting[0])]
        if not open_lanes:
            return
        min(open_lanes, key=lambda lane: len(lane.rows)).rows.append(waiting.popleft())
