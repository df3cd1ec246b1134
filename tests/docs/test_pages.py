"""What the pages name exists: files, links, recipe keys and commands."""

from __future__ import annotations

import re
import warnings

import pytest
import yaml
from docs.markdown import PAGES, blocks, inline_code, name_of, prose, table_rows
from world import REPOSITORY

from megatron_gkd.commands import COMMANDS
from megatron_gkd.config.keys import SECTION_OF, SECTIONS
from megatron_gkd.config.load import load
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
NOT_MEASURED = re.compile(r"<!-- table: .* -->\nNot measured yet\.\n")  # tables of results that are not there yet
CREATED = {block.title for block in blocks(REPOSITORY / "docs/extending.md")}  # by who follows the page
ROW_KEYS = ("messages", "prompt", "response", "teacher_prompt")
# Recipes with a title are run by test_extending.py.
YAML_BLOCKS = [(page, block) for page in PAGES for block in blocks(page, "yaml") if block.title is None]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_a_page_names_exist(page):
    missing = []
    for path in PATH.findall(NOT_MEASURED.sub("", page.read_text(encoding="utf-8"))):
        path = path.rstrip(".")
        if path not in CREATED and not any(REPOSITORY.glob(path.rstrip("/"))):
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
    for here in column_of(page, "here"):
        for code in re.findall(r"`([^`]+)`", here):
            section, _, leaf = code.partition(":")[0].rpartition(".")
            is_key = leaf in SECTION_OF and section in ("", SECTION_OF[leaf])
            if not is_key and not (code in SECTIONS or code.startswith("megatron-gkd ")):
                unknown.append(code)
    assert unknown == []


def column_of(page, title):
    """Return the cells of a column in the tables that have it."""
    cells, index = [], None
    for line in prose(page).splitlines():
        row = [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))] if line.startswith("|") else []
        if not row:
            index = None
        elif title in row:
            index = row.index(title)
        elif index is not None and not set(row[index]) <= set("-"):
            cells.append(row[index])
    assert len(cells) > 100
    return cells


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_exist(page):
    named = re.findall(r"(?:megatron-gkd|-m megatron_gkd) ([a-z]+)", page.read_text(encoding="utf-8"))
    assert [name for name in named if name not in COMMANDS] == []


def package_source() -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in (REPOSITORY / "megatron_gkd").rglob("*.py"))


def test_messages_that_troubleshooting_quotes_exist():
    source = re.sub(r'"\s*f?"', "", package_source())  # texts that go on in the next line
    quoted = [
        code
        for row in table_rows(REPOSITORY / "docs/troubleshooting.md")
        for code in re.findall(r"`([^`]+ [^`]+)`", row[0])
    ]
    assert quoted
    missing = [
        part for code in quoted for part in re.split(r" \.\.\. |^[a-z_.]+ = ", code) if part and part not in source
    ]
    assert missing == []


@pytest.mark.parametrize(("name", "heading"), [("getting_started.md", "loss"), ("on_policy.md", "source")])
def test_metrics_are_those_of_the_code(name, heading):
    source = package_source()
    rows = table_rows(REPOSITORY / "docs" / name)
    start = next(index for index, row in enumerate(rows) if row[0].startswith(f"`{heading}`"))
    metrics = [metric for row in rows[start:] if row[0].startswith("`") for metric in re.findall(r"`([^`]+)`", row[0])]
    assert [metric for metric in metrics if f'"{metric}"' not in source] == []
