"""The division of a global batch on the only rank of a run, for tests."""

from __future__ import annotations

from megatron_gkd.data.batch_config import BatchConfig

ONE_RANK = BatchConfig(
    global_batch_size=8,
    micro_batch_size=1,
    packing=False,
    max_length=32,
    dp_rank=0,
    dp_size=1,
    cp_rank=0,
    cp_size=1,
    pad_multiple=1,
    pad_token_id=0,
)
