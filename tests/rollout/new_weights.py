"""What an engine that keeps a copy of the student's weights must do with new ones, for the tests of such engines."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import tiny_checkpoint
from rollout.contract import (
    CHECKPOINT,
    GREEDY,
    REQUESTS,
    Request,
    tokens_of,
    transformers_greedy,
    transformers_log_probs,
)
from safetensors.torch import load_file
from torch import Tensor

from megatron_gkd.rollout.base import Completion, RolloutEngine

OTHER = functools.partial(tiny_checkpoint, "qwen3", seed=8, head_dim=32)
"""The contract's model with other weights."""
LONG = Request.of([200], replace(GREEDY, max_completion_length=8))
"""More than one block of vLLM's prefix cache."""


def weights_of(checkpoint: Path) -> Iterable[tuple[str, Tensor]]:
    return load_file(checkpoint / "model.safetensors").items()


def generate(engine: RolloutEngine, request: Request) -> list[Completion]:
    return engine.generate(request.prompts, request.sampling, request.seeds)


def samples(engine: RolloutEngine) -> list[list[Completion]]:
    """Drawn, and from a long prompt."""
    return [generate(engine, request) for request in (REQUESTS["drawn"], LONG)]


def error_of(completion: Completion, checkpoint: Path) -> float:
    """The largest of the log-probabilities' differences from transformers, after LONG's prompt."""
    expected = transformers_log_probs(checkpoint, LONG.prompts[0], completion.token_ids)
    return max(abs(a - b) for a, b in zip(completion.log_probs, expected, strict=True))


def assert_follows(found: list[list[list[Completion]]]) -> None:
    """`samples` of versions 0, 1 and 2, with the weights of `CHECKPOINT`, `OTHER`, and `CHECKPOINT` again."""
    first, second, third = found
    for checkpoint, (_, long) in zip((CHECKPOINT(), OTHER(), CHECKPOINT()), found, strict=True):
        assert tokens_of(long) == transformers_greedy(checkpoint, LONG.prompts, 8)
        assert error_of(long[0], checkpoint) < 1e-4
    for version, (drawn, _) in enumerate(found):
        assert {completion.version for completion in drawn} == {version}
    assert tokens_of(first[0]) != tokens_of(second[0])
    assert tokens_of(first[0]) == tokens_of(third[0])
    for before, after in zip(first[0], third[0], strict=True):
        assert after.log_probs == pytest.approx(before.log_probs, abs=1e-5)
