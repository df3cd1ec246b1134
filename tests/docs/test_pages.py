"""What the pages name exists: files, links, recipe keys and commands."""

from __future__ import annotations

import re
import warnings

import pytest
import yaml
from docs.markdown import PAGES, blocks, inline_code, name_of, prose, table_rows
from world import REPOSITORY

from megatron_gkd.commands import COMMANDS
from megatron_gkd.config import load
from megatron_gkd.config.keys import SECTION_OF, SECTIONS
from megatron_gkd.config.renamed import NEW_NAMES, DeprecatedKey

BASE = {
    "student": {"model": "student"},
    "teacher": {"teacher_model": "teacher"},
    "distill": {},
    "parallel": {},
    "data": {"dataset": ["train.jsonl"], "val_dataset": ["val.jsonl"], "max_length": 4096},
    "train": {"global_batch_size": 8, "train_iters": 20},
    "output": {"output_dir": "runs/x"},
}
WORLD_SIZE = 8
PATH = re.compile(r"(?<![\w/.-])(?:megatron_gkd|csrc|scripts|tests|docs)/[\w./*-]*")
MADE_BY_RUNS = ("hf", "hf-step-NNNNNN")
ROW_KEYS = ("messages", "prompt", "response", "teacher_prompt")
YAML_BLOCKS = [(page, block) for page in PAGES for block in blocks(page, "yaml")]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_a_page_names_exist(page):
    missing = []
    for path in PATH.findall(page.read_text(encoding="utf-8")):
        path = path.rstrip(".")
        if not any(REPOSITORY.glob(path.rstrip("/"))):
            missing.append(path)
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_lead_to_files(page):
    targets = re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#[^)]*)?\)", prose(page))
    assert [target for target in targets if target and not (page.parent / target).exists()] == []


@pytest.mark.parametrize(("page", "block"), YAML_BLOCKS, ids=lambda value: name_of(value) if value in PAGES else "")
def test_recipes_load(page, block, tmp_path):
    """A block that shows some sections is completed by those of a plain recipe."""
    sections = yaml.safe_load(block.code)
    if not set(sections) <= set(SECTIONS):
        pytest.skip("not a recipe")
    tree = BASE | sections
    for section in ("student", "data", "train", "output"):
        tree[section] = BASE[section] | (sections.get(section) or {})
    if "rollout" in sections and "distill" not in sections:
        tree["distill"] = {"lmbda": 1.0}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecatedKey)
        load(path, world_size=WORLD_SIZE, require_paths=False)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_keys_with_values_are_recipe_keys(page):
    """As in `lmbda: 1`."""
    keys = [match[1] for code in inline_code(page) if (match := re.match(r"([a-z_0-9]+): ", code))]
    allowed = {*SECTION_OF, *SECTIONS, *ROW_KEYS}
    if page.name == "upstream_defects.md":
        return
    assert [key for key in keys if key not in allowed] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_former_names_of_keys_are_not_used(page):
    if page.name in ("CHANGELOG.md", "recipes.md"):
        return
    former = {f"--{old}" for old in NEW_NAMES} | {f"{place}.{old}" for old in NEW_NAMES for place in SECTIONS}
    former |= {old for old in NEW_NAMES if "_" in old}
    assert former & set(inline_code(page)) == set()


def test_migration_tables_name_recipe_keys():
    page = REPOSITORY / "docs/migrating.md"
    unknown = []
    for _, here, *_ in (row for row in table_rows(page) if row[1] != "here"):
        for code in re.findall(r"`([^`]+)`", here):
            section, _, leaf = code.partition(":")[0].rpartition(".")
            is_key = leaf in SECTION_OF and section in ("", SECTION_OF[leaf])
            if not is_key and not (code in SECTIONS or code.startswith("megatron-gkd ")):
                unknown.append(code)
    assert unknown == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_exist(page):
    named = re.findall(r"(?:megatron-gkd|-m megatron_gkd) ([a-z]+)", page.read_text(encoding="utf-8"))
    assert [name for name in named if name not in COMMANDS] == []
