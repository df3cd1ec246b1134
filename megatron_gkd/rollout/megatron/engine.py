"""The embedded rollout engine: batched sampling with the sharded student itself.

There are as many batches of sequences as pipeline stages. A step is one forward pass of every batch through Megatron's
own schedule, so that the stages work at the same time. The last stage's tensor-parallel ranks draw the tokens together,
each from its shard of the vocabulary. Sequences that finish make room for prompts that wait.
"""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal

import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from torch import Tensor, nn

from megatron_gkd.checkpoint_format.layer_limits import embedded_engine_problems
from megatron_gkd.data.microbatch import padded_length
from megatron_gkd.data.vision.processing import ImageProcessing
from megatron_gkd.errors import UserError
from megatron_gkd.models.fusions import unfused_rope
from megatron_gkd.models.megatron_model import MegatronModel, hidden_states, in_eval_mode
from megatron_gkd.models.pipeline import Pipeline
from megatron_gkd.ops.output_head import OutputHead
from megatron_gkd.ops.vocabulary import VocabShard
from megatron_gkd.rollout.base import Completion, Images, RolloutFailed, Sampling, check_prompts
from megatron_gkd.rollout.megatron.decode_batch import (
    BatchLimits,
    DecodeBatch,
    DecodeInputs,
    DecodeSequence,
    PromptImages,
)
from megatron_gkd.rollout.megatron.decode_vision import DecodeVision
from megatron_gkd.rollout.megatron.kv_cache import KeyValueCache
from megatron_gkd.rollout.megatron.noise import fold_to_int64
from megatron_gkd.rollout.megatron.sampling import sample
from megatron_gkd.rollout.megatron.seen_tokens import SeenTokens
from megatron_gkd.rollout.stop_strings import StopStringDetector, get_fast_tokenizer
from megatron_gkd.runtime import portability
from megatron_gkd.runtime.agreement import run_on_all

from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region


class MegatronEngine:
    """Rollout engine that samples from `model` itself.

    Args:
        model: the student.
        eos_token_ids: any of them ends a completion.
        images: what the model's processor makes of images; None for a text model.
        max_batch_tokens: tokens that the cache of keys and values has room for, over all sequences at once. Each
            reserves as many as the longest of those in progress, its longest completion included; one that has more
            goes alone.
        max_prompt_tokens: tokens of prompts in one forward pass of one batch; a longer prompt goes alone.

    Raises:
        UserError: the model has layers of which the cache keeps no state.
    """

    def __init__(
        self,
        model: MegatronModel,
        eos_token_ids: Sequence[int],
        images: ImageProcessing | None = None,
        *,
        max_batch_tokens: int = 65536,
        max_prompt_tokens: int = 8192,
    ) -> None:
        for problem in embedded_engine_problems(model.checkpoint.shape, str(model.checkpoint.path)):
            raise UserError(problem)
        if model.config.fp8:
            raise UserError("rollout.engine = megatron: must be vllm or vllm_server with a model that computes in FP8")
        self.model, self.mesh, self.eos_token_ids = model, model.mesh, frozenset(eos_token_ids)
        self.vision = None if images is None else DecodeVision(images, self.mesh)
        self.max_batch_tokens, self.max_prompt_tokens = max_batch_tokens, max_prompt_tokens
        self.version = 0
        self._tokenizer: Tokenizer | None = None  # for stop strings alone
        config = model.config
        # Every forward pass communicates with experts, of ranks that have sequences and of ranks that have none left.
        self.shares_experts = config.num_moe_experts is not None and (
            config.expert_model_parallel_size > 1 or config.expert_tensor_parallel_size > 1
        )

    def resident(self) -> contextlib.AbstractContextManager[None]:
        """Return a context that does nothing: the model is on the device anyway."""
        return contextlib.nullcontext()

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Set the version alone: the weights are the student's own."""
        self.version = version

    @torch.no_grad()  # not inference_mode: what modules keep of a forward pass must serve training later
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        images: Images | None = None,
    ) -> list[Completion]:
        """Generate one completion a prompt; see `RolloutEngine.generate`.

        The weights must be complete: a parameter gather that is overlapped with the forward pass has to be forced
        first, since a replica without prompts makes no forward pass.

        Raises:
            ValueError: as `RolloutEngine.generate`.
            UserError: in all ranks; an image can't be read, or is not the one that was tokenized.
        """
        visions = run_on_all(lambda: self._check_prompts(prompts, seeds, images), RolloutFailed)
        if self.vision is not None:
            self.vision.require_readable(images or [])
        cp = self.mesh.cp
        # Context-parallel ranks hold the whole model each: they share the prompts out.
        sequences = [
            DecodeSequence(
                i,
                list(prompts[i]),
                fold_to_int64(seeds[i]),
                len(prompts[i]) + sampling.max_completion_length - 1,  # a completion's last token is never fed back
                self._build_stop_detector(prompts[i], sampling),
                visions[i],
            )
            for i in range(cp.rank(), len(prompts), cp.size())
        ]
        with in_eval_mode(self.model.chunks), unfused_rope(self.model.chunks):
            finished = self._run(sequences, sampling)
        completions = {sequence.index: self._build_completion(sequence, sampling) for sequence in finished}
        if cp.size() > 1:
            parts: list[dict[int, Completion]] = [{} for _ in range(cp.size())]
            dist.all_gather_object(parts, completions, group=cp)
            completions = {index: completion for part in parts for index, completion in part.items()}
        return [completions[index] for index in range(len(prompts))]

    def _check_prompts(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], images: Images | None
    ) -> Sequence[PromptImages | None]:
        check_prompts(prompts, seeds, self.model.checkpoint.vocab_size, images)
        return self._read_prompts(prompts, images)

    def _read_prompts(self, prompts: Sequence[Sequence[int]], images: Images | None) -> Sequence[PromptImages | None]:
        if self.vision is None:
            if images is not None and any(images):
                raise ValueError("prompts have images, and the model is one of text")
            return [None] * len(prompts)
        images = [()] * len(prompts) if images is None else images
        return [self.vision.read_prompt(*pair) for pair in zip(prompts, images, strict=True)]

    def _build_stop_detector(self, prompt: Sequence[int], sampling: Sampling) -> StopStringDetector | None:
        if not sampling.stop:
            return None
        self._tokenizer = self._tokenizer or get_fast_tokenizer(self.model.checkpoint.tokenizer())
        return StopStringDetector(self._tokenizer, prompt, sampling.stop)

    def _run(self, sequences: list[DecodeSequence], sampling: Sampling) -> list[DecodeSequence]:
        """Complete all sequences."""
        waiting = deque(sorted(sequences, key=lambda one: -len(one.prompt)))  # prompts of like length start together
        capacity = max((sequence.num_reserved for sequence in sequences), default=1)
        batches = self._build_batches(len(sequences), capacity)
        finished: list[DecodeSequence] = []
        cache, seen = KeyValueCache(capacity), self._build_seen_tokens(sampling)
        with cache.installed(self.model.chunks):
            while self._needs_forward(len(finished) < len(sequences)):
                _admit(waiting, batches)
                for batch in batches:
                    cache.reshape(batch.number, batch.cache_shape, batch.cached_lengths)
                self._append_tokens(batches, self._forward(batches, cache), sampling, seen)
                removed = [
                    sequence
                    for batch in batches
                    for sequence in batch.remove(
                        lambda sequence: self._finish_reason(sequence, sampling) is not None, cache.move
                    )
                ]
                finished += removed
                if seen is not None:
                    seen.release(removed)
        return finished

    def _build_batches(self, num_sequences: int, capacity: int) -> list[DecodeBatch]:
        """Build a batch for each pipeline stage; they share the cache's tokens, if each then has room for a row."""
        num_batches = self.mesh.pp.size()
        num_used = min(num_batches, max(1, self.max_batch_tokens // capacity), max(1, num_sequences))
        limits = BatchLimits(
            max_rows=-(-num_sequences // num_used),
            max_tokens=self.max_batch_tokens // num_used,
            max_prompt_tokens=self.max_prompt_tokens,
        )
        unused = replace(limits, max_rows=0)
        return [DecodeBatch(number, limits if number < num_used else unused) for number in range(num_batches)]

    def _build_seen_tokens(self, sampling: Sampling) -> SeenTokens | None:
        """Build the record of the ids that have occurred; None where tokens are drawn elsewhere, or without penalty."""
        head = self.model.head
        if head is None or sampling.repetition_penalty == 1:
            return None
        return SeenTokens(self._build_shard(head, sampling), portability.device())

    def _build_shard(self, head: OutputHead, sampling: Sampling) -> VocabShard:
        """Return this rank's columns of the logits, and how many ids may be drawn."""
        vocab_size = sampling.num_shared_ids(self.model.checkpoint.vocab_size)
        return VocabShard.from_group(head.weight.shape[0], self.mesh.tp, vocab_size)

    def _needs_forward(self, is_busy: bool) -> bool:
        """Return whether a forward pass is needed: here, or by a rank whose tokens this rank's experts may process."""
        if not self.shares_experts:
            return is_busy
        needs_any = torch.tensor([is_busy], dtype=torch.int32, device=portability.device())
        dist.all_reduce(needs_any, op=dist.ReduceOp.MAX, group=self.mesh.dp_cp)
        return bool(needs_any)

    def _forward(self, batches: list[DecodeBatch], cache: KeyValueCache) -> list[Tensor | None]:
        """Run one forward pass of each batch.

        Returns:
            For each batch the hidden states [sequences, H] of the newest tokens, on the last stage; None elsewhere.
        """
        layout = self.mesh.layout
        multiple = layout.tensor if layout.sequence_parallel else 1
        if self.vision is not None:
            multiple = math.lcm(multiple, self.vision.length_multiple)
        lengths = [padded_length(max(1, batch.num_tokens), multiple) for batch in batches]
        if len(self.model.chunks) > 1:  # the interleaved schedule requires one shape for all
            lengths = [max(lengths)] * len(batches)
        inputs = [
            self._next_inputs(batch, length, cache.capacity) for batch, length in zip(batches, lengths, strict=True)
        ]

        def forward(chunk: nn.Module, microbatch: DecodeInputs) -> Tensor:
            cache.begin(microbatch)
            return hidden_states(chunk, microbatch)

        return Pipeline(self.model.chunks, self.mesh).forward_only(inputs, forward, self._take_newest)

    def _next_inputs(self, batch: DecodeBatch, length: int, capacity: int) -> DecodeInputs:
        inputs = batch.next_inputs(length, max_position=capacity, cp_size=self.mesh.cp.size())
        if self.vision is not None:
            inputs = replace(inputs, vision=self.vision.build(inputs, batch.sequences))
        return inputs.to(portability.device())

    def _take_newest(self, hidden: Tensor, inputs: DecodeInputs) -> Tensor:
        states = hidden.squeeze(0)
        if self.mesh.layout.sequence_parallel:
            states = gather_from_sequence_parallel_region(states, group=self.mesh.tp)
        return states[inputs.last_tokens]

    def _append_tokens(
        self,
        batches: list[DecodeBatch],
        hidden: list[Tensor | None],
        sampling: Sampling,
        seen: SeenTokens | None,
    ) -> None:
        """Draw every sequence's next token, the same on all ranks of the replica, and append it."""
        sequences = [sequence for batch in batches for sequence in batch.sequences]
        if not sequences:
            return
        mesh, head = self.mesh, self.model.head
        drawn = torch.empty(2, len(sequences), dtype=torch.float64, device=portability.device())
        if head is not None:
            logits = head.compute_logits(torch.cat([states for states in hidden if states is not None]))
            seeds = torch.tensor([sequence.seed for sequence in sequences], device=logits.device)
            positions = torch.tensor([len(sequence.token_ids) for sequence in sequences], device=logits.device)
            is_seen = None if seen is None else seen.of(sequences)
            drawn[0], drawn[1] = sample(logits, seeds, positions, sampling, self._build_shard(head, sampling), is_seen)
        if mesh.pp.size() > 1:
            dist.broadcast(drawn, src=mesh.last_stage_rank, group=mesh.pp)
        for sequence, token, log_prob in zip(sequences, *drawn.tolist(), strict=True):
            sequence.append(int(token), log_prob)

    def _finish_reason(self, sequence: DecodeSequence, sampling: Sampling) -> Literal["stop", "length"] | None:
        newest = sequence.token_ids[-1]
        if (
            sequence.has_stop_string
            or newest in sampling.stop_token_ids
            or (newest in self.eos_token_ids and not sampling.ignore_eos)
        ):
            return "stop"
        return "length" if len(sequence.token_ids) == sampling.max_completion_length else None

    def _build_completion(self, sequence: DecodeSequence, sampling: Sampling) -> Completion:
        reason = self._finish_reason(sequence, sampling) or "length"
        return Completion(sequence.token_ids, sequence.log_probs, reason, self.version)


def _admit(waiting: deque[DecodeSequence], batches: list[DecodeBatch]) -> None:
    """Move waiting sequences to the batches with the fewest sequences that have room."""
    while waiting:
        with_room = [batch for batch in batches if batch.has_room(waiting[0])]
        if not with_room:
            return
        min(with_room, key=lambda batch: len(batch.sequences)).admit(waiting.popleft())
