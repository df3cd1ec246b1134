"""Arbitrary recipes and rows are accepted, or refused in one line each; nothing else is raised."""

from __future__ import annotations

import json
from typing import Any

import pytest
from bad_inputs.workspace import RECIPE, ROW
from checkpoints import tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gkd.config import keys, yaml_text
from megatron_gkd.config.errors import RecipeError
from megatron_gkd.config.load import load
from megatron_gkd.config.schema import DataSection, Recipe
from megatron_gkd.data.tokenizing import RowOptions, RowTokenizer

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)
SOME_SCALARS = st.sampled_from(
    [0, 1, -1, 2**70, 1e308, "", "null", "1e-4", "~", "a\x00b", "\ud800", "x" * 300, "[", "é"]
)
VALUES = st.recursive(
    SCALARS | SOME_SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
LEAVES = sorted(keys.SECTION_OF)
ROW_KEYS = st.sampled_from(
    "messages prompt response completion query instruction input output conversations history system teacher_prompt "
    "tools images videos chat_template_kwargs prompt_token_ids response_token_ids masked".split()
)
MESSAGES = st.lists(
    st.dictionaries(
        st.sampled_from(["role", "content", "loss", "tool_calls", "from", "value"]),
        VALUES | st.sampled_from(["user", "assistant", "system", "human", "gpt", "w1"]),
        max_size=4,
    ),
    max_size=4,
)


def require_lines(problems: list[str]) -> None:
    assert problems and all(problem and len(problem.splitlines()) == 1 for problem in problems)


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "recipe.yaml"


@settings(max_examples=200, deadline=None)
@given(changes=st.dictionaries(st.sampled_from(LEAVES), VALUES, min_size=1, max_size=4))
def test_recipes_are_accepted_or_refused_in_lines(recipe_file, changes):
    tree = yaml_text.parse(RECIPE)
    for leaf, value in changes.items():
        tree.setdefault(keys.SECTION_OF[leaf], {})[leaf] = value
    recipe_file.write_bytes(yaml_text.dump(tree).encode("utf-8", "surrogatepass"))
    try:
        recipe = load(recipe_file, world_size=1, require_paths=False)
    except RecipeError as error:
        require_lines(error.problems)
    else:
        assert Recipe.model_validate(yaml_text.parse(recipe.to_yaml())) == recipe


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=80) | st.binary(max_size=80))
def test_files_are_refused_in_lines(recipe_file, text):
    recipe_file.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    with pytest.raises(RecipeError) as error:
        load(recipe_file, world_size=1, require_paths=False)
    require_lines(error.value.problems)


@settings(max_examples=100, deadline=None)
@given(
    arguments=st.lists(st.sampled_from([f"--{leaf}" for leaf in LEAVES]) | st.text(max_size=8), min_size=1, max_size=5)
)
def test_command_lines_are_accepted_or_refused_in_lines(recipe_file, arguments):
    recipe_file.write_text(RECIPE)
    try:
        load(recipe_file, arguments, world_size=1, require_paths=False)
    except RecipeError as error:
        require_lines(error.problems)


@settings(max_examples=300, deadline=None)
@given(row=st.dictionaries(ROW_KEYS | st.text(max_size=5), VALUES | MESSAGES, max_size=4) | VALUES)
def test_rows_are_used_or_refused_in_a_line(row):
    tokenize = RowTokenizer(tiny_tokenizer(), True, DataSection(dataset=("x",), max_length=32), RowOptions())
    columns = tokenize({"text": [json.dumps(ROW), json.dumps(row)]})
    assert columns["dropped"][0] == "" and len(columns["dropped"]) == 2
    assert columns["dropped"][1] or len(columns["input_ids"][1]) == columns["length"][1] > 0
    assert len(columns["error"][1].splitlines()) <= 1


def test_the_strategies_reach_rows_that_are_used():
    """The fuzz of rows would find little if every row were refused at its first key."""
    used = 0
    tokenize = RowTokenizer(tiny_tokenizer(), True, DataSection(dataset=("x",), max_length=32), RowOptions())

    @settings(max_examples=300, deadline=None, derandomize=True)
    @given(
        prompt=st.text(max_size=5), response=st.text(max_size=5), extra=st.dictionaries(ROW_KEYS, VALUES, max_size=1)
    )
    def count(prompt: str, response: str, extra: dict[str, Any]) -> None:
        nonlocal used
        columns = tokenize({"text": [json.dumps(extra | {"prompt": prompt, "response": response})]})
        used += not columns["dropped"][0]

    count()
    assert used > 50
