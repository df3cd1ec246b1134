"""The reference of the recipe's keys in docs/recipes.md."""

import write_recipe_reference
import yaml

from megatron_gkd.config import keys
from megatron_gkd.config.load import load
from megatron_gkd.config.reference import recipe_reference
from megatron_gkd.config.renamed import NEW_NAMES


def test_the_page_is_current():
    text = write_recipe_reference.PAGE.read_text(encoding="utf-8")
    assert text == write_recipe_reference.page(), "run python scripts/write_recipe_reference.py"


def test_every_key_has_a_row():
    lines = recipe_reference().splitlines()
    for leaf in keys.SECTION_OF:
        (row,) = [line for line in lines if line.startswith(f"| `{leaf}` |")]
        assert row.replace("\\|", "").count("|") == 5, row
    assert all(any(f".{name}` |" in line for line in lines) for name in NEW_NAMES)


def test_the_example_is_a_recipe(tmp_path):
    text = write_recipe_reference.INTRODUCTION.partition("```yaml\n")[2].partition("```")[0]
    (tmp_path / "recipe.yaml").write_text(text)
    assert load(tmp_path / "recipe.yaml", world_size=1, require_paths=False).train.train_iters == 1000
    assert yaml.safe_load(text).keys() <= keys.SECTIONS.keys()
