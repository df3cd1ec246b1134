import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from megatron_gkd.config import keys
from megatron_gkd.config.load import load
from megatron_gkd.config.schema import ParallelSection, Recipe


def test_leaf_names_are_unique_over_all_sections():
    names = [leaf for leaves in keys.SECTIONS.values() for leaf in leaves]
    assert len(names) == len(set(names))
    assert not set(names) & set(keys.SECTIONS), "a leaf must not be called like a section"


def test_every_leaf_has_a_one_line_meaning():
    for leaf in keys.SECTION_OF:
        description = keys.find_field(leaf).description
        assert description and "\n" not in description, leaf


def test_the_recipe_is_frozen(workspace):
    recipe = workspace.load()
    with pytest.raises(ValidationError):
        recipe.train = recipe.train
    with pytest.raises(ValidationError):
        recipe.train.lr = 1.0
    with pytest.raises(TypeError):
        recipe.data.dataset[0] = None


@pytest.mark.parametrize(("value", "tp", "effective"), [(True, 1, False), (True, 2, True), (False, 2, False)])
def test_sequence_parallel_means_nothing_without_tensor_parallel(value, tp, effective):
    section = ParallelSection(sequence_parallel=value, tensor_model_parallel_size=tp)
    assert section.effective_sequence_parallel is effective


def test_derived_sizes(workspace):
    recipe = workspace.load(
        "--context_parallel_size", "2", "--global_batch_size", "12", "--micro_batch_size", "2", world_size=8
    )
    assert recipe.data_parallel_size(8) == 2
    assert recipe.num_microbatches(8) == 3
    assert recipe.expert_data_parallel_size(8) == 8


def test_home_folder_is_expanded(workspace, monkeypatch):
    monkeypatch.setenv("HOME", str(workspace.folder))
    assert workspace.load("--output_dir=~/runs").output.output_dir == str(workspace.folder / "runs")


def test_yaml_round_trip_through_load(workspace):
    recipe = workspace.load("--dataset", "[train.jsonl, {path: val.jsonl, weight: 0.25}]", "--lr", "3e-7")
    workspace.recipe.write_text(recipe.to_yaml())
    assert workspace.load() == recipe
    assert list(yaml.safe_load(recipe.to_yaml())) == list(Recipe.model_fields)


text = st.text(st.characters(exclude_characters="\x85\u2028\u2029", exclude_categories=["Cs"]))  # PyYAML folds these
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda inner: st.lists(inner) | st.dictionaries(text, inner),
    max_leaves=8,
)


@given(template=st.dictionaries(text, values), lr=st.floats(min_value=1e-300, max_value=1e300))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_yaml_round_trip_of_any_value(workspace, template, lr):
    recipe = workspace.load()
    recipe = recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update={"chat_template_kwargs": template}),
            "train": recipe.train.model_copy(update={"lr": lr}),
        }
    )
    path = workspace.folder / "again.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8", newline="")
    assert load(path, world_size=2) == recipe
