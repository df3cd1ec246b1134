"""What is generated: prompts, lengths and sampling, the same for every engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.random_runs import save_model

LAYERS = 6
SIZES = dict(hidden_size=512, intermediate_size=1536, num_attention_heads=8, num_key_value_heads=4, head_dim=64)
INITIALIZER_RANGE = 0.05  # of the head: logits have about the spread of a trained model's


@dataclass(frozen=True)
class Case:
    """One request of a rollout engine.

    Attributes:
        name: of the case.
        vocab_size: of the model.
        prompt_lengths: tokens of each prompt, drawn from this range, both ends included.
        completion_lengths: at which a greedy completion meets a stop token, drawn from this range with many short ones;
            the second is the most tokens.
        num_prompts: prompts.
        sampling: keys of `Sampling`; greedy where it is empty.
    """

    name: str
    vocab_size: int
    prompt_lengths: tuple[int, int]
    completion_lengths: tuple[int, int]
    num_prompts: int
    sampling: dict[str, Any] = field(default_factory=dict)

    @property
    def is_greedy(self) -> bool:
        """Whether all engines must generate the same tokens."""
        return not self.sampling

    def prompts(self) -> list[list[int]]:
        """Return the prompts."""
        generator = np.random.default_rng(1)
        lengths = generator.integers(self.prompt_lengths[0], self.prompt_lengths[1] + 1, self.num_prompts)
        return [generator.integers(3, self.vocab_size, length).tolist() for length in lengths]

    def stop_tokens(self, completions: list[list[int]]) -> tuple[int, ...]:
        """Return tokens that end these greedy completions, which nothing has ended, at lengths of the range or before.

        Lengths are as in a rollout: most far below the longest, the last one the longest.
        """
        least, most = self.completion_lengths
        if least == most or not self.is_greedy:
            return ()
        shares = np.random.default_rng(2).uniform(0, 1, self.num_prompts - 1) ** 2
        lengths = [least + int(share * (most - least)) for share in shares]
        ends = [tokens[length - 1] for tokens, length in zip(completions[:-1], lengths, strict=True)]
        return tuple(sorted(set(ends) - set(completions[-1])))


def default_cases() -> list[Case]:
    """Return the cases of a few minutes on two cores."""
    return [
        Case("32k, equal lengths", 32000, (32, 32), (32, 32), 16),
        Case("32k, mixed lengths", 32000, (8, 128), (8, 96), 24),
        Case("152k, equal lengths", 151936, (32, 32), (24, 24), 16),
        Case("152k, mixed lengths", 151936, (8, 96), (8, 64), 16),
        Case("152k, temperature 1", 151936, (32, 32), (24, 24), 16, {"temperature": 1.0}),
        Case("152k, top-p 0.9", 151936, (32, 32), (24, 24), 16, {"temperature": 1.0, "top_p": 0.9}),
    ]


def save_models(cases: list[Case], root: Path) -> dict[int, Path]:
    """Write the random model of each vocabulary, and return their folders."""
    sizes = {case.vocab_size for case in cases}
    return {
        size: save_model(root / str(size), LAYERS, **SIZES, vocab_size=size, initializer_range=INITIALIZER_RANGE)
        for size in sizes
    }
