"""Whether the time limits of a run on several ranks go together."""

from collections.abc import Iterator

from megatron_gkd.config.checks.registry import check
from megatron_gkd.config.schema import Recipe


@check("watchdog_s", "ddp_timeout")
def watchdog_comes_first(recipe: Recipe, _: int) -> Iterator[str]:
    """Find a watchdog that a collective's time-out would always come before."""
    limit, timeout = recipe.cluster.watchdog_s, recipe.cluster.ddp_timeout
    if limit is not None and limit >= timeout:
        yield (
            f"cluster.watchdog_s = {limit:g}: must be less than cluster.ddp_timeout ({timeout:g} s), which would end "
            "the run first and name no rank; or null"
        )


@check("watchdog_s", "engine", "vllm_server_timeout_s")
def watchdog_waits_for_rollout_servers(recipe: Recipe, _: int) -> Iterator[str]:
    """Find a watchdog that would end a run in which a server takes the time that it may take for a response."""
    limit, rollout = recipe.cluster.watchdog_s, recipe.rollout
    if limit is not None and rollout.engine == "vllm_server" and limit <= rollout.vllm_server_timeout_s:
        yield (
            f"cluster.watchdog_s = {limit:g}: must be greater than rollout.vllm_server_timeout_s "
            f"({rollout.vllm_server_timeout_s:g} s), which one response may take; or null"
        )


@check("watchdog_s", "teachers", "teacher_model_server", "teacher_server_timeout_s")
def watchdog_waits_for_teacher_servers(recipe: Recipe, _: int) -> Iterator[str]:
    """Find the same for a teacher's servers."""
    limit = recipe.cluster.watchdog_s
    for place, teacher in recipe.teacher.all.items():
        if limit is not None and teacher.teacher_model_server and limit <= teacher.teacher_server_timeout_s:
            yield (
                f"cluster.watchdog_s = {limit:g}: must be greater than {place}.teacher_server_timeout_s "
                f"({teacher.teacher_server_timeout_s:g} s), which one response may take; or null"
            )
