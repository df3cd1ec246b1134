"""The section `cluster`."""

from pydantic import Field

from megatron_gkd.config.schema.base import Duration, Section


class ClusterSection(Section):
    """How a run of several processes or nodes waits, and when it gives up."""

    ddp_timeout: Duration = Field(
        1800.0, gt=0, description="longest time of one collective operation, in which ranks wait for each other"
    )
    watchdog_s: float | None = Field(
        1200.0,
        gt=0,
        description="longest time without progress on all ranks (a microbatch, a response, a tensor), in seconds; then "
        "the ranks that hang are named, all write their Python stacks, and the run ends with exit code 75; null: no "
        "limit",
    )
