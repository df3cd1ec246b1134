"""Whatever the settings are, a recipe is written and what can't be carried over is listed: no traceback."""

import copy
import random
import shlex

import pytest
import yaml
from migration.conftest import SOURCES

from megatron_gkd.config import keys
from megatron_gkd.config.aliases import ALIASES, HELD, UNSUPPORTED
from megatron_gkd.migration.run import migrate, write

NAMES = sorted([*keys.SECTION_OF, *ALIASES, *(HELD.keys() - {"rlhf_type"}), *UNSUPPORTED, "unknown"])
VALUES = [
    "true",
    "false",
    "null",
    "0",
    "1",
    "-1",
    "2.5",
    "abc",
    "a/b",
    "[1, 2]",
    "{a: 1}",
    '{"a": 1}',
    "",
    "1e400",
    "'",
]
VALUES += [
    "[",
    "server",
    "colocate",
    "lora",
    "flash",
    "bfloat16",
    "2024-01-01",
    "id#5",
    "http://h:1",
    "0x10",
    "&a",
    "*a",
]
TREES = [None, True, 0, -1, 2.5, "abc", [], [1], [{"a": 1}], {}, {"a": {"b": None}}, "${..x}", "${mul:2,x}", "${a.b}"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(folder, source):
    """Return the recipe of a file, which is then removed."""
    output = folder / "recipe.yaml"
    found = migrate(source, None, output)
    assert write(found, output)
    tree = yaml.safe_load(output.read_text())
    output.unlink()
    return tree


@pytest.mark.parametrize("seed", range(15))
@pytest.mark.parametrize("command", ["megatron rlhf", "swift rlhf", "python gkd.py"])
def test_options(folder, command, seed):
    rng = random.Random(seed)
    words = [command]
    for name in rng.sample(NAMES, 12):
        words += [f"--{name}", *(shlex.quote(rng.choice(VALUES)) for _ in range(rng.choice((0, 1, 1, 1, 2))))]
    (folder / "a.sh").write_text(" ".join(words) + "\n")
    assert written(folder, folder / "a.sh").keys() <= keys.SECTIONS.keys()


@pytest.mark.parametrize("seed", range(15))
@pytest.mark.parametrize("name", ["trl_full.yaml", "nemo_base.yaml"])
def test_configurations(folder, name, seed):
    rng = random.Random(seed)
    tree = yaml.safe_load((SOURCES / name).read_text())
    for _ in range(6):
        _replace(tree, rng)
    (folder / name).write_text(yaml.safe_dump(tree))
    assert written(folder, folder / name).keys() <= keys.SECTIONS.keys()


def _replace(tree, rng):
    """Put another value into a random place of a tree."""
    while True:
        key = rng.choice(list(tree))
        if not isinstance(tree[key], dict) or not tree[key] or rng.random() < 0.2:
            tree[key] = copy.deepcopy(rng.choice(TREES))
            return
        tree = tree[key]
