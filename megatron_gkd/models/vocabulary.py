"""Compare two models over one vocabulary: which ids they share, and on which rank the logits of each id are.

Checkpoints of one family pad their embeddings differently (151936 rows against 152064), so that their tensor-parallel
shards do not hold the same ids. The teacher's head is resharded once over the student's ids; ids that only one model
has are masked in both.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from megatron_gkd.errors import UserError
from megatron_gkd.models.checkpoint import Checkpoint
from megatron_gkd.ops.output_head import OutputHead

PROBES = ("The 12 quick brown foxes jump over 345 lazy dogs.", 'x = f(y) != "naïve"\n\t# 中文, émigré, 🙂')


def shared_vocab_size(student: Checkpoint, teacher: Checkpoint) -> int:
    """Return the number of ids that both models have logits for; raise UserError if the tokenizers differ."""
    require_same_tokenizer(student.tokenizer(), teacher.tokenizer())
    return min(student.vocab_size, teacher.vocab_size)


def require_same_tokenizer(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Check that every id that both define is the same token, and that plain text gives the same ids.

    Raises:
        UserError: an id or the ids of a text differ.
    """
    student_tokens = {index: token for token, index in student.get_vocab().items()}
    teacher_tokens = {index: token for token, index in teacher.get_vocab().items()}
    for index in sorted(student_tokens.keys() & teacher_tokens.keys()):
        if student_tokens[index] != teacher_tokens[index]:
            raise UserError(
                f"student and teacher have different tokenizers: id {index} is {student_tokens[index]!r} for the "
                f"student and {teacher_tokens[index]!r} for the teacher; their distributions cannot be compared"
            )
    for text in PROBES:
        if student.encode(text, add_special_tokens=False) != teacher.encode(text, add_special_tokens=False):
            raise UserError(
                f"student and teacher have different tokenizers: {text!r} gives different ids; "
                "their distributions cannot be compared"
            )


@torch.no_grad()
def reshard_head(head: OutputHead, rows: int, group: dist.ProcessGroup) -> OutputHead:
    """Change a vocabulary-parallel head from shards of R rows to shards of `rows`. All ranks of `group` must call it.

    Returns:
        This rank's shard, without gradient, in which missing ids are zeros; the same tensors if R = rows.
    """
    bias = None if head.bias is None else _reshard(head.bias.data, rows, group)
    return head.with_tensors(_reshard(head.weight.data, rows, group), bias)


def _reshard(shard: torch.Tensor, rows: int, group: dist.ProcessGroup) -> torch.Tensor:
    """Change shards [R, ...] to shards [rows, ...]."""
    if shard.shape[0] == rows:
        return shard
    whole = shard.new_empty((shard.shape[0] * group.size(), *shard.shape[1:]))
    dist.all_gather_into_tensor(whole, shard.contiguous(), group=group)
    mine = whole[group.rank() * rows : (group.rank() + 1) * rows]
    resharded = shard.new_zeros((rows, *shard.shape[1:]))
    resharded[: mine.shape[0]] = mine
    return resharded
