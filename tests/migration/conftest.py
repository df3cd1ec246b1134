"""Scripts and configurations of other tools, and local folders under the names of their models and data."""

import importlib.util
import json
import shutil
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import yaml
from recipe_workspace import DENSE

from megatron_gkd import cli
from megatron_gkd.config.checks import attention
from megatron_gkd.config.dataset_names import DatasetName

SOURCES = Path(__file__).parent / "sources"
_MODEL = {**DENSE, "max_position_embeddings": 32768}


class MigrationWorkspace:
    """Migrates files in a folder, which is the working directory."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self._capsys = capsys
        for source in SOURCES.iterdir():
            shutil.copy(source, folder)

    def run(self, *arguments: str) -> tuple[int, str, str]:
        """Return the exit code, output and errors of a command."""
        self._capsys.readouterr()
        code = cli.main(list(arguments))
        captured = self._capsys.readouterr()
        return code, captured.out, captured.err

    def migrate(self, name: str, *options: str) -> tuple[dict, str]:
        """Return the recipe and the report of a file that can be migrated."""
        code, out, err = self.run("migrate", name, "--output", "recipe.yaml", *options)
        assert (code, err) == (0, "")
        return yaml.safe_load((self.folder / "recipe.yaml").read_text()), out

    def migrate_text(self, text: str, name: str = "args.sh", *options: str) -> tuple[dict, str]:
        """Return the recipe and the report of a text."""
        (self.folder / name).write_text(text)
        return self.migrate(name, *options)

    def stand_in(self, recipe: dict) -> None:
        """Make folders with the names of a recipe's models and data."""
        models = [recipe["student"]["model"], recipe["teacher"].get("teacher_model")]
        for model in filter(None, models):
            (self.folder / model).mkdir(parents=True, exist_ok=True)
            (self.folder / model / "config.json").write_text(json.dumps(_MODEL))
        for dataset in [*recipe["data"]["dataset"], *recipe["data"].get("val_dataset", [])]:
            place = self.folder / DatasetName.parse(dataset).location
            file = place if place.suffix == ".jsonl" else place / "train.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("{}\n")


@pytest.fixture
def workspace(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    find, vllm = importlib.util.find_spec, ModuleSpec("vllm", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: vllm if name == "vllm" else find(name, *rest))
    monkeypatch.setattr(attention, "has_transformer_engine", lambda: True)
    return MigrationWorkspace(tmp_path, capsys)
