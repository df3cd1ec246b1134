"""The models and rows of a whole step, the same for all contestants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, Qwen3Config, Qwen3MoeConfig

SHORT = (144, 72, 192, 96, 120, 168)
MANY = 2 * SHORT
LONG = (368, 424)
BETA = 0.5
LORA = {"rank": 8, "alpha": 16}
OPTIMIZER = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
CLIP_GRAD = 1.0
PROMPT_SHARE = 4  # one of so many tokens of a row is its prompt, which is not trained on


@dataclass(frozen=True)
class Sizes:
    """The size of a model."""

    hidden: int
    layers: int
    intermediate: int
    experts: int | None = None

    def config(self, vocab: int) -> PretrainedConfig:
        common = dict(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.hidden // 32,
            num_key_value_heads=self.hidden // 64,
            head_dim=32,
            vocab_size=vocab,
            tie_word_embeddings=True,
            initializer_range=0.05,  # logits with a standard deviation of about 1
        )
        if self.experts is None:
            return Qwen3Config(**common)
        return Qwen3MoeConfig(
            **common,
            num_experts=self.experts,
            num_experts_per_tok=2,
            moe_intermediate_size=self.intermediate // 2,
            norm_topk_prob=True,
        )


DENSE_STUDENT, DENSE_TEACHER = Sizes(256, 4, 768), Sizes(512, 6, 1536)
SPARSE_STUDENT = Sizes(256, 4, 768, experts=8)


@dataclass(frozen=True)
class Case:
    """A step: its models and its rows.

    Attributes:
        name: for people and `--only`.
        vocab: number of ids of both models.
        lengths: tokens of each row.
        microbatch_rows: rows in one forward pass; ours are packed, those of others padded to the longest of them.
        has_lora: whether adapters are trained in place of all parameters.
        student: its size.
        teacher: its size.
    """

    name: str
    vocab: int
    lengths: tuple[int, ...]
    microbatch_rows: int
    has_lora: bool = False
    student: Sizes = DENSE_STUDENT
    teacher: Sizes = DENSE_TEACHER

    @property
    def tokens(self) -> int:
        """Tokens of a step, without padding."""
        return sum(self.lengths)

    @property
    def labels(self) -> int:
        """Tokens that are trained on."""
        return sum(length - prompt_length(length) for length in self.lengths)

    def rows(self) -> list[np.ndarray]:
        """Return the ids of each row."""
        generator = np.random.default_rng(self.vocab)
        return [generator.integers(2, self.vocab, length) for length in self.lengths]

    def save_models(self, folder: Path) -> None:
        """Write student and teacher with random weights, in the format of Hugging Face."""
        for seed, (name, sizes) in enumerate((("student", self.student), ("teacher", self.teacher))):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(sizes.config(self.vocab), dtype=torch.float32)
            model.should_save_on_this_rank = lambda is_main_process: True  # transformers 5.19 saves in rank 0 only
            model.save_pretrained(folder / name)


def prompt_length(length: int) -> int:
    """Return how many tokens at the start of a row are not trained on."""
    return length // PROMPT_SHARE


def groups(rows: Sequence, size: int) -> list[Sequence]:
    """Return the rows in groups of `size`, in order."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


CASES = {
    case.name: case
    for case in (
        Case("32k, packed", 32000, MANY, microbatch_rows=6),
        Case("152k, packed", 151936, MANY, microbatch_rows=2),  # of more rows TRL's logits do not fit beside the rest
        Case("32k, long rows", 32000, LONG, microbatch_rows=1),
        Case("152k, long rows", 151936, (224, 280), microbatch_rows=1),
        Case("32k, not packed", 32000, SHORT, microbatch_rows=1),
        Case("32k, LoRA", 32000, SHORT, microbatch_rows=3, has_lora=True),
        Case("32k, experts", 32000, SHORT, microbatch_rows=3, student=SPARSE_STUDENT),
    )
}
