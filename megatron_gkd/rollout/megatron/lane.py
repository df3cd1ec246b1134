"""Rows that decode together: which are under way, and the tokens that each forward pass takes of them.

A forward pass takes one packed row of tokens: first one token of every row that has started, then the whole prompts of
those that were admitted since, then padding. Started rows are rows 0 … n−1 of the cache, without holes: where one
finishes, the last moves into its place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_gkd.data.microbatch import Microbatch
from megatron_gkd.data.sample import IGNORED_LABEL
from megatron_gkd.rollout.stop_strings import StopStringWatch


@dataclass
class Row:
    """One prompt and its completion so far. `index` is the prompt's place in the request."""

    index: int
    prompt: list[int]
    seed: int
    watch: StopStringWatch | None = None
    has_stop_string: bool = False
    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)

    def append(self, token_id: int, log_prob: float) -> None:
        self.token_ids.append(token_id)
        self.log_probs.append(log_prob)
        if self.watch is not None:
            self.has_stop_string = self.watch.found(token_id)

    @property
    def num_cached(self) -> int:
        """Tokens whose keys and values are in the cache: all but the newest."""
        return len(self.prompt) + len(self.token_ids) - 1 if self.token_ids else 0


@dataclass(frozen=True)
class StepBatch(Microbatch):
    """The tokens of one forward pass, and where they belong in the cache.

    Attributes:
        lane: whose cache.
        decoding: int64 [n], the position of the one token of each started row.
        longest: tokens of the longest started row, that one included.
        prompt_lengths: tokens of each prompt that follows.
        last_tokens: int64 [rows], places of the tokens after which the next is drawn.
    """

    lane: int
    decoding: Tensor
    longest: int
    prompt_lengths: list[int]
    last_tokens: Tensor


class Lane:
    """At most `size` rows; at most `max_prompt_tokens` tokens of prompts (padded to the longest) a forward pass."""

    def __init__(self, number: int, size: int, max_prompt_tokens: int):
        self.number, self.size, self.max_prompt_tokens = number, size, max_prompt_tokens
        self.rows: list[Row] = []

    @property
    def _new(self) -> list[Row]:
        return [row for row in self.rows if not row.token_ids]

    @property
    def num_tokens(self) -> int:
        """Tokens of the next forward pass, without padding."""
        return sum(1 if row.token_ids else len(row.prompt) for row in self.rows)

    def has_room(self, row: Row) -> bool:
        if len(self.rows) == self.size:
            return False
        lengths = [len(other.prompt) for other in (*self._new, row)]
        return len(lengths) == 1 or len(lengths) * max(lengths) <= self.max_prompt_tokens

    def next_batch(self, length: int, *, max_position: int, cp_size: int) -> StepBatch:
        """The next forward pass, padded to `length` tokens. Positions stay below `max_position`.

        Context-parallel ranks hold rows of their own, as long as this one's: `cp_size` times its tokens altogether.
        """
        tokens, positions, last_tokens = [], [], []
        for row in self.rows:
            new = row.token_ids[-1:] or row.prompt
            tokens += new
            positions += range(row.num_cached, row.num_cached + len(new))
            last_tokens.append(len(tokens) - 1)
        missing = length - len(tokens)
        decoding = [row.num_cached for row in self.rows if row.token_ids]
        return StepBatch(
            input_ids=torch.tensor([tokens + [0] * missing]),
            labels=torch.full((1, length), IGNORED_LABEL),
            position_ids=torch.tensor([positions + [0] * missing]),
            padding_mask=(torch.arange(length) >= len(tokens))[None],
            from_dataset=torch.zeros(1, length, dtype=torch.bool),
            cu_seqlens=torch.tensor([0, length * cp_size], dtype=torch.int32),
            max_seqlen=max_position,
            num_rows=len(self.rows),
            samples=(),
            lane=self.number,
            decoding=torch.tensor(decoding, dtype=torch.int64),
            longest=max(decoding, default=-1) + 1,
            prompt_lengths=[len(row.prompt) for row in self._new],
            last_tokens=torch.tensor(last_tokens, dtype=torch.int64),
        )

    def remove(self, is_finished: Callable[[Row], bool], move: Callable[[int, int, int, int], None]) -> list[Row]:
        """Take finished rows out. `move(lane, source, target, length)` moves a row of the cache."""
        finished = []
        for place in reversed(range(len(self.rows))):
            if is_finished(self.rows[place]):
                finished.append(self.rows[place])
                last = self.rows.pop()
                if place < len(self.rows):
                    self.rows[place] = last
                    move(self.number, len(self.rows), place, last.num_cached)
        return finished
