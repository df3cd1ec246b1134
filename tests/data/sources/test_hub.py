"""Data sets of the hubs: a copy of a repository, the cache of Hugging Face without a network, and ModelScope."""

import shutil
import sys
import types

import datasets
import huggingface_hub.constants
import pytest

from megatron_gkd.data.sources import describe_source
from megatron_gkd.data.sources.opening import parse_name
from megatron_gkd.errors import UserError

CARD = """---
configs:
- config_name: main
  default: true
  data_files: [{split: train, path: main/train.jsonl}, {split: test, path: main/test.jsonl}]
- config_name: other
  data_files: other.jsonl
---
"""


@pytest.fixture
def repository(tmp_path):
    """A copy of a hub's data set: its subset `main` has the splits `train` and `test`, `other` has `train` alone."""
    folder = tmp_path / "name"
    (folder / "main").mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    for split in ("train", "test"):
        (folder / "main" / f"{split}.jsonl").write_text(f'{{"prompt": "{split}"}}\n')
    (folder / "other.jsonl").write_text('{"prompt": "other"}\n')
    return folder


@pytest.fixture(autouse=True)
def hub(tmp_path, monkeypatch):
    """A cache of its own, and no network."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


PARTS = {"": "train", ":test": "test", ":other": "other", ":main:test": "test", "::test": "test", ":main": "train"}


@pytest.mark.parametrize(("part", "prompt"), PARTS.items())
def test_a_copy_of_a_repository(repository, opened, rows_of, part, prompt):
    source = opened(f"{repository}{part}")
    assert rows_of(source) == [{"prompt": prompt}]
    assert source.locate(0) == f"{repository}{part}, row 1"
    assert source.base == repository


@pytest.fixture
def cached(repository, hub, tmp_path):
    """The id of a data set that is in the cache, as if it had been fetched."""
    for subset in ("main", "other"):
        datasets.load_dataset(str(repository), subset, cache_dir=str(tmp_path / "made"))
    shutil.copytree(tmp_path / "made" / "name", hub / "owner___name")
    return "owner/name"


@pytest.mark.parametrize(
    ("part", "prompt"), [pair for pair in PARTS.items() if "main" in pair[0] or pair[0] == ":other"]
)
def test_the_cache_of_the_hub_without_a_network(cached, opened, rows_of, part, prompt):
    source = opened(f"{cached}{part}")
    assert rows_of(source) == [{"prompt": prompt}]
    assert source.locate(0) == f"owner/name{part}, row 1"
    assert rows_of(opened(f"HF::{cached}{part}", use_hf=False)) == rows_of(source)


def test_what_a_data_set_of_the_hub_depends_on(cached, hub):
    count, (file, *_) = describe_source(parse_name("owner/name:main#5"))
    assert count == 1 and file.startswith(str(hub)) and file.endswith("train.arrow")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("owner/gone", "Couldn't reach 'owner/gone' on the Hub"),
        ("owner/name:none", "none as a subset: .*; as a split: "),
        ("owner/name:main:none", 'Unknown split "none". Should be one of '),
    ],
)
def test_an_id_that_cannot_be_loaded(cached, opened, name, problem):
    problem = rf"^{name}: no such file or folder, and no data set of Hugging Face that can be read: {problem}"
    with pytest.raises(UserError, match=problem) as error:
        opened(name)
    assert "\n" not in str(error.value)
    assert str(error.value).endswith(
        "; must be a file or folder that exists, or a hub id (owner/name[:subset][:split])"
    )


@pytest.fixture
def modelscope(monkeypatch):
    """A module `modelscope` whose data sets have one row: what they were loaded with."""

    class MsDataset:
        def __init__(self, *arguments):
            self.arguments = arguments

        def to_hf_dataset(self):
            return datasets.Dataset.from_dict({"prompt": [repr(self.arguments)]})

        @staticmethod
        def load(name, subset_name=None, split=None):
            if split not in ("train", "test"):
                raise ValueError(f"no split {split}\nmore")
            return MsDataset(name, subset_name, split)

    monkeypatch.setitem(sys.modules, "modelscope", types.SimpleNamespace(MsDataset=MsDataset))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("owner/name", ("owner/name", None, "train")),
        ("owner/name:main", ("owner/name", "main", "train")),
        ("owner/name:main:test#4", ("owner/name", "main", "test")),
        ("owner/name::test", ("owner/name", None, "test")),
    ],
)
def test_modelscope(modelscope, opened, rows_of, name, arguments):
    assert rows_of(opened(name, use_hf=False)) == rows_of(opened(f"MS::{name}")) == [{"prompt": repr(arguments)}]
    with pytest.raises(
        UserError, match=r"^owner/name::x: no such file .* no data set of ModelScope .*: no split x; must"
    ):
        opened("owner/name::x", use_hf=False)


@pytest.mark.parametrize("error", [ImportError("no module"), RuntimeError("see above:\nno module")])
def test_without_modelscope(opened, monkeypatch, error):
    class Missing(types.ModuleType):
        def __getattr__(self, name):
            raise error

    monkeypatch.setitem(sys.modules, "modelscope", Missing("modelscope"))
    with pytest.raises(
        UserError, match=r"^owner/name: data sets of ModelScope need its library \(.*no module.*\): pip"
    ):
        opened("owner/name", use_hf=False)
