"""The lengths of prompts and completions that follow from each other."""

import pytest


@pytest.mark.parametrize(
    ("overrides", "prompt", "completion"),
    [
        ("--max_length 2048", 1536, 512),
        ("--max_length 2048 --max_completion_length 2047", 1, 2047),
        ("--max_length 256", 128, 128),
        ("--max_length 2", 1, 1),
        ("--max_length 2048 --lmbda 1 --max_prompt_length 2000", 2000, 48),
        ("--max_length 2048 --lmbda 1 --max_prompt_length 100", 100, 512),
        ("--max_length 2048 --lmbda 1 --max_prompt_length 100 --max_completion_length 900", 100, 900),
        ("--max_length 2048 --teacher_max_length 100", 1998, 50),
        ("--max_length 256 --engine vllm --vllm_max_model_len 64", 32, 32),
        ("--max_length 256 --engine vllm --vllm_max_model_len 512", 128, 128),
    ],
)
def test_prompts_and_completions_share_a_sequence(workspace, overrides, prompt, completion):
    recipe = workspace.load(*(part for text in overrides.split(" --") for part in _flag(text)), require_paths=False)
    assert (recipe.max_prompt_length, recipe.max_completion_length) == (prompt, completion)
    assert prompt + completion <= recipe.data.max_length


def _flag(text):
    name, value = text.removeprefix("--").split(" ")
    return f"--{name}", value
