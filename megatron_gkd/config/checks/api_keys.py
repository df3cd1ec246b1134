"""Whether the environment variables with the API keys of servers are named where there are servers, and are set."""

from collections.abc import Iterable, Iterator

from megatron_gkd.config.api_keys import describe_variable, name_problem, variable_problem
from megatron_gkd.config.checks.registry import check, command_check
from megatron_gkd.config.checks.teacher import SOURCE
from megatron_gkd.config.schema import Recipe

_OF_TEACHERS = (*SOURCE, "teacher_server_api_key_env")
_OF_ROLLOUTS = ("engine", "vllm_server_api_key_env")


def _of_teachers(recipe: Recipe) -> Iterator[tuple[str, str, str | None]]:
    """Yield the key, the variable and, where there are no servers, the key's condition."""
    for place, teacher in recipe.teacher.all.items():
        if teacher.teacher_server_api_key_env is not None:
            condition = None if teacher.source == "server" else f"only with {place}.teacher_kind = server"
            yield f"{place}.teacher_server_api_key_env", teacher.teacher_server_api_key_env, condition


def _of_rollouts(recipe: Recipe) -> Iterator[tuple[str, str, str | None]]:
    """Yield the same of rollout servers."""
    if recipe.rollout.vllm_server_api_key_env is not None:
        condition = None if recipe.rollout.engine == "vllm_server" else "only with rollout.engine = vllm_server"
        yield "rollout.vllm_server_api_key_env", recipe.rollout.vllm_server_api_key_env, condition


@check(*_OF_TEACHERS, *_OF_ROLLOUTS)
def api_keys_are_named(recipe: Recipe, _: int) -> Iterator[str]:
    """Find names of variables that are none, perhaps API keys, and some that no server needs."""
    for place, variable, condition in (*_of_teachers(recipe), *_of_rollouts(recipe)):
        problem = name_problem(place, variable)
        if problem is not None:
            yield problem
        elif condition is not None:
            yield f"{place} = {describe_variable(variable)}: {condition}"


@check(*_OF_TEACHERS, needs_files=True)
def teacher_api_keys_are_set(recipe: Recipe, _: int) -> Iterator[str]:
    """Find variables without an API key of teacher servers."""
    yield from _unset(_of_teachers(recipe))


@check(*_OF_ROLLOUTS, "lmbda", needs_files=True)
def rollout_api_key_is_set(recipe: Recipe, _: int) -> Iterator[str]:
    """Find a variable without the API key of rollout servers, where the student samples."""
    if recipe.distill.lmbda > 0:
        yield from _unset(_of_rollouts(recipe))


@command_check(*_OF_ROLLOUTS, needs_files=True)
def generating_api_key_is_set(recipe: Recipe, _: int) -> Iterator[str]:
    """Find a variable without the API key of rollout servers, for commands that always contact them."""
    yield from _unset(_of_rollouts(recipe))


def _unset(variables: Iterable[tuple[str, str, str | None]]) -> Iterator[str]:
    for place, variable, condition in variables:
        if condition is None and name_problem(place, variable) is None:
            problem = variable_problem(place, variable)
            if problem is not None:
                yield problem
