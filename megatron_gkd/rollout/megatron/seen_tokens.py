"""Which token ids have occurred in each sequence that decodes, for the repetition penalty; over a sharded vocabulary.

Shape suffixes: s slots, n sequences, V this rank's columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_gkd.ops.vocabulary import VocabShard
from megatron_gkd.rollout.megatron.decode_batch import DecodeSequence


class SeenTokens:
    """The ids of prompts and completions, in a slot for each sequence that is in progress.

    Args:
        shard: the columns of this rank.
        device: of the logits.
    """

    def __init__(self, shard: VocabShard, device: torch.device) -> None:
        self.shard = shard
        self._is_seen_sV = torch.zeros(0, shard.width, dtype=torch.bool, device=device)
        self._free: list[int] = []
        self._slots: dict[int, int] = {}  # by the sequence's index

    def of(self, sequences: Sequence[DecodeSequence]) -> Tensor:
        """Return bool [n, V]: which ids have occurred in each sequence, with its newest token."""
        newest = []
        self._reserve(sum(sequence.index not in self._slots for sequence in sequences))
        for sequence in sequences:
            if sequence.index in self._slots:
                newest.append(sequence.token_ids[-1])
            else:
                newest.append(sequence.prompt[-1])
                self._admit(sequence)
        slots_n = self._to_device([self._slots[sequence.index] for sequence in sequences])
        self._mark(slots_n, self._to_device(newest))
        return self._is_seen_sV[slots_n]

    def release(self, sequences: Iterable[DecodeSequence]) -> None:
        """Free the slots of sequences that are finished."""
        self._free += [self._slots.pop(sequence.index) for sequence in sequences]

    def _reserve(self, num_slots: int) -> None:
        """Make sure that so many slots are free."""
        missing = num_slots - len(self._free)
        if missing > 0:
            num_present = len(self._is_seen_sV)
            self._is_seen_sV = F.pad(self._is_seen_sV, (0, 0, 0, missing))
            self._free += range(num_present, num_present + missing)

    def _admit(self, sequence: DecodeSequence) -> None:
        slot = self._slots[sequence.index] = self._free.pop()
        self._is_seen_sV[slot] = False
        ids = self._to_device(sequence.prompt + sequence.token_ids)
        self._mark(torch.full_like(ids, slot), ids)

    def _mark(self, slots: Tensor, ids: Tensor) -> None:
        is_here, columns = self.shard.owned(ids)
        self._is_seen_sV[slots[is_here], columns[is_here]] = True

    def _to_device(self, numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, device=self._is_seen_sV.device)
