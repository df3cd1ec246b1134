"""vLLM's `logit_bias`, by which ids are excluded that not every model of the run can read, or that stand for images."""

from __future__ import annotations

from megatron_gkd.errors import UserError
from megatron_gkd.rollout.base import Sampling

_BIAS = -100.0  # the lowest that vLLM takes; in fp32 nothing is left of such a token's probability
_MAX_IDS = 1024  # that vLLM's GPU sampler has room for, in `logit_bias` as in `allowed_token_ids`


def logit_bias(sampling: Sampling, vocab_size: int) -> dict[int, float] | None:
    """Return vLLM's sampling parameter for a model of `vocab_size` ids; None if all ids may be drawn.

    Raises:
        UserError: more ids are excluded than vLLM has room for.
    """
    excluded, shared = sampling.excluded_ids(vocab_size), sampling.num_shared_ids(vocab_size)
    if len(excluded) > _MAX_IDS:
        reserved = len(excluded) - (vocab_size - shared)
        raise UserError(
            f"rollout.engine: the model that samples has {vocab_size} ids, and student and teacher share "
            f"{shared}{f', of which {reserved} stand for images' if reserved else ''}; vLLM can exclude at most "
            f"{_MAX_IDS} ids. Use engine = megatron, or give both models as many embedding rows"
        )
    return dict.fromkeys(excluded, _BIAS) or None
