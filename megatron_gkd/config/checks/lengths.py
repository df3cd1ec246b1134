"""Whether the lengths of prompts, completions and sequences go together."""

from collections.abc import Iterator

from megatron_gkd.config.checks.registry import check
from megatron_gkd.config.schema import Recipe


@check("max_completion_length", "max_prompt_length", "max_length", "engine", "vllm_max_model_len")
def prompts_and_completions_fit(recipe: Recipe, _: int) -> Iterator[str]:
    """Find prompts and completions that do not fit into a sequence together."""
    prompt, completion, longest = _lengths(recipe)
    key = "data.max_length" if longest == recipe.data.max_length else "rollout.vllm_max_model_len"
    if prompt is None and completion is not None and completion >= longest:
        yield (
            f"rollout.max_completion_length = {completion}: must be below {key} ({longest}), which holds the prompt, "
            "too"
        )
    elif prompt is not None and prompt + (completion or 1) > longest:
        allowed = f"below {key} ({longest})"
        if completion is not None:
            allowed = f"at most {key} ({longest}) - rollout.max_completion_length ({completion})"
        yield f"data.max_prompt_length = {prompt}: must be {allowed}, so that completions have room"


def _lengths(recipe: Recipe) -> tuple[int | None, int | None, int]:
    """Return the lengths of prompts and completions as they are set, and that of both together."""
    return recipe.data.max_prompt_length, recipe.rollout.max_completion_length, recipe.max_sampled_length


@check("max_completion_length", "teacher_max_length")
def completions_fit_behind_teacher_prompts(recipe: Recipe, _: int) -> Iterator[str]:
    """Find completions for which no `teacher_prompt` leaves room."""
    longest, completion = recipe.data.teacher_max_length, recipe.rollout.max_completion_length
    if longest is not None and completion is not None and completion >= longest:
        yield (
            f"data.teacher_max_length = {longest}: must be above rollout.max_completion_length ({completion}), so that "
            "a teacher_prompt has room"
        )


@check("max_prompt_length", "prompt_only", "lmbda")
def prompts_are_completed(recipe: Recipe, _: int) -> Iterator[str]:
    """Find keys of prompts that the student never completes."""
    data = recipe.data
    if recipe.distill.lmbda > 0:
        return
    if data.max_prompt_length is not None:
        yield f"data.max_prompt_length = {data.max_prompt_length}: only with distill.lmbda > 0; max_length limits rows"
    if data.prompt_only != "refuse":
        yield f"data.prompt_only = {data.prompt_only}: only with distill.lmbda > 0, which has on-policy steps"
