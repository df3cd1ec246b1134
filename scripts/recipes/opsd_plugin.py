"""Rows for on-policy self-distillation, from problems with worked solutions: {"problem": ..., "solution": ...}.

The student's prompt is the problem alone; as its own teacher it has the solution in its prompt, too.
"""

from megatron_gkd.data import register_preprocessor

WITH_SOLUTION = """{problem}

Here is a correct solution of this problem:

{solution}

Now that you have understood it, solve the problem once more in your own words, step by step."""


@register_preprocessor("problem_and_solution")
def problem_and_solution(row: dict) -> dict | None:
    """Rows without a problem or a solution are left out, and counted."""
    problem, solution = row.get("problem"), row.get("solution")
    if not problem or not solution:
        return None
    return {
        "messages": [{"role": "user", "content": problem}],
        "teacher_prompt": WITH_SOLUTION.format(problem=problem, solution=solution),
    }
