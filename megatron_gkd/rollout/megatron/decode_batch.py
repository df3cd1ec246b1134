"""Sequences that decode together: which are in progress, and the tokens that each forward pass takes of them.

A forward pass takes one packed row of tokens: first one token of every sequence that has started, then the whole
prompts of those that were admitted since, then padding. Started sequences are rows 0 to n-1 of the cache, without
holes: when one finishes, the last moves into its place. The cache is a rectangle of rows as long as the longest
sequence needs: while long ones are in progress it has few rows, and more when they have finished.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from megatron_gkd.data.microbatch import Microbatch
from megatron_gkd.data.sample import IGNORED_LABEL
from megatron_gkd.data.vision.image import Image
from megatron_gkd.rollout.stop_strings import StopStringDetector

_LEAST_GAIN = 8  # a cache gets more rows if they are at least one in so many


@dataclass(frozen=True)
class PromptImages:
    """What a multimodal model reads of a prompt beside its tokens.

    Attributes:
        images: in order; none in a prompt of text alone.
        positions: int64 [R, P], of its tokens.
    """

    images: tuple[Image, ...]
    positions: np.ndarray

    @property
    def first_position(self) -> int:
        """The position of the completion's first token, which follows the prompt's last token.

        Frames of a video may have larger positions than the text after it.
        """
        return int(self.positions[:, -1].max()) + 1


@dataclass
class DecodeSequence:
    """One prompt and its completion so far.

    Attributes:
        index: the prompt's place in the request.
        prompt: its token ids.
        seed: of the draws.
        num_reserved: tokens of the cache that it may need.
        stop_strings: finds them in the completion; None if there are none.
        vision: what a multimodal model reads beside the prompt; None in a text model.
        has_stop_string: whether the completion ends with one.
        token_ids: of the completion.
        log_probs: of its tokens.
    """

    index: int
    prompt: list[int]
    seed: int
    num_reserved: int
    stop_strings: StopStringDetector | None = None
    vision: PromptImages | None = None
    has_stop_string: bool = False
    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)

    def append(self, token_id: int, log_prob: float) -> None:
        """Append a token to the completion."""
        self.token_ids.append(token_id)
        self.log_probs.append(log_prob)
        if self.stop_strings is not None:
            self.has_stop_string = self.stop_strings.append(token_id)

    @property
    def num_cached(self) -> int:
        """Number of tokens whose keys and values are in the cache: all but the newest."""
        return len(self.prompt) + len(self.token_ids) - 1 if self.token_ids else 0


@dataclass(frozen=True)
class DecodeInputs(Microbatch):
    """The tokens of one forward pass, and their places in the cache.

    Attributes:
        batch: number of the `DecodeBatch`, which has a cache of its own.
        decode_positions: int64 [n], the position of the one token of each started sequence.
        max_decode_length: tokens of the longest started sequence, that one included.
        prompt_lengths: tokens of each prompt that follows.
        last_tokens: int64 [sequences], places of the tokens after which the next is drawn.
    """

    batch: int
    decode_positions: Tensor
    max_decode_length: int
    prompt_lengths: list[int]
    last_tokens: Tensor


@dataclass(frozen=True)
class BatchLimits:
    """How much of the sequences a batch takes at a time.

    Attributes:
        max_rows: sequences.
        max_tokens: tokens of the cache: sequences times what the longest of them reserves. One goes alone with more.
        max_prompt_tokens: tokens of prompts in a forward pass, each prompt padded to the longest. One goes alone.
    """

    max_rows: int
    max_tokens: int
    max_prompt_tokens: int


class DecodeBatch:
    """Sequences that go through the pipeline together.

    Args:
        number: its place among the batches of the engine.
        limits: how much it takes at a time.

    Attributes:
        cache_shape: rows of the cache, and tokens of a row.
    """

    def __init__(self, number: int, limits: BatchLimits) -> None:
        self.number, self.limits = number, limits
        self.sequences: list[DecodeSequence] = []
        self.cache_shape = (0, 0)

    @property
    def _new(self) -> list[DecodeSequence]:
        return [sequence for sequence in self.sequences if not sequence.token_ids]

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the next forward pass, without padding."""
        return sum(1 if sequence.token_ids else len(sequence.prompt) for sequence in self.sequences)

    @property
    def cached_lengths(self) -> list[int]:
        """Tokens in each row of the cache of a sequence that has started; these come first."""
        return [sequence.num_cached for sequence in self.sequences if sequence.token_ids]

    def has_room(self, sequence: DecodeSequence) -> bool:
        """Return whether the next forward pass can take this sequence's prompt, too."""
        if self._shape_with(sequence) is None:
            return False
        lengths = [len(other.prompt) for other in (*self._new, sequence)]
        return len(lengths) == 1 or len(lengths) * max(lengths) <= self.limits.max_prompt_tokens

    def admit(self, sequence: DecodeSequence) -> None:
        """Add a sequence for which there is room."""
        self.cache_shape = self._shape_with(sequence) or self.cache_shape
        self.sequences.append(sequence)

    def _shape_with(self, sequence: DecodeSequence) -> tuple[int, int] | None:
        """Return the shape of a cache that also has room for this sequence; None if that is not allowed."""
        rows, width = self.cache_shape
        num_rows = len(self.sequences) + 1
        needed = max(other.num_reserved for other in (*self.sequences, sequence))
        if num_rows <= rows and needed <= width:
            return self.cache_shape
        most = min(self.limits.max_rows, max(1, self.limits.max_tokens // needed))
        if needed <= width:  # narrower: everything is copied, which few more rows are not worth
            most = most if _LEAST_GAIN * (most - rows) >= rows else rows
        return (most, needed) if num_rows <= most else None

    def next_inputs(self, length: int, *, max_position: int, cp_size: int) -> DecodeInputs:
        """Return the inputs of the next forward pass.

        Args:
            length: tokens of the forward pass; padding fills it up.
            max_position: positions stay below it.
            cp_size: context-parallel ranks, each of which has as many tokens, of sequences of its own.
        """
        tokens: list[int] = []
        positions: list[int] = []
        last_tokens: list[int] = []
        for sequence in self.sequences:
            new = sequence.token_ids[-1:] or sequence.prompt
            tokens += new
            positions += range(sequence.num_cached, sequence.num_cached + len(new))
            last_tokens.append(len(tokens) - 1)
        missing = length - len(tokens)
        decode_positions = [sequence.num_cached for sequence in self.sequences if sequence.token_ids]
        return DecodeInputs(
            input_ids=torch.tensor([tokens + [0] * missing]),
            labels=torch.full((1, length), IGNORED_LABEL),
            position_ids=torch.tensor([positions + [0] * missing]),
            padding_mask=(torch.arange(length) >= len(tokens))[None],
            from_dataset=torch.zeros(1, length, dtype=torch.bool),
            cu_seqlens=torch.tensor([0, length * cp_size], dtype=torch.int32),
            max_seqlen=max_position,
            num_rows=len(self.sequences),
            samples=(),
            batch=self.number,
            decode_positions=torch.tensor(decode_positions, dtype=torch.int64),
            max_decode_length=max(decode_positions, default=-1) + 1,
            prompt_lengths=[len(sequence.prompt) for sequence in self._new],
            last_tokens=torch.tensor(last_tokens, dtype=torch.int64),
        )

    def remove(
        self, is_finished: Callable[[DecodeSequence], bool], move: Callable[[int, int, int, int], None]
    ) -> list[DecodeSequence]:
        """Remove finished sequences and return them.

        Args:
            is_finished: whether a sequence is to be removed.
            move: moves a row of the cache; see `KeyValueCache.move`.
        """
        finished = []
        for place in reversed(range(len(self.sequences))):
            if is_finished(self.sequences[place]):
                finished.append(self.sequences[place])
                last = self.sequences.pop()
                if place < len(self.sequences):
                    self.sequences[place] = last
                    move(self.number, len(self.sequences), place, last.num_cached)
        return finished
