"""Checkpoints of families with tensors that no model reads, with code of their own, and without a head."""

from __future__ import annotations

import json

import pytest
import torch
from families.case import read
from families.text import CASES, build, write
from safetensors.torch import save_file

from megatron_gkd.errors import UserError
from megatron_gkd.models.checkpoint import Checkpoint
from megatron_gkd.models.export import write_companions


@pytest.fixture
def written(tmp_path):
    """A checkpoint of a case of `families.text`, with more tensors (None: without it) and other keys of config.json."""

    def of(name, tensors=None, **config):
        (case,) = [case for case in CASES if case.name == name]
        path = write(case, build(case), tmp_path / "model")
        found = {**read(path), **(tensors or {})}
        save_file({name: x for name, x in found.items() if x is not None}, path / "model.safetensors")
        written = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(written | config))
        return path

    return of


HEAD = "lm_head.weight"


def test_layers_of_multi_token_prediction_are_left_out(written):
    path = written("deepseek_v3", {"model.layers.4.eh_proj.weight": torch.zeros(32, 64)})
    assert not any(name.startswith("model.layers.4.") for name in Checkpoint.open(str(path)).tensors)


def test_other_families_have_no_layers_of_multi_token_prediction(written):
    path = written("llama", {"model.layers.4.eh_proj.weight": torch.zeros(32, 64)})
    with pytest.raises(UserError, match=r"model.layers.4.eh_proj.weight: config.json has no use for it"):
        Checkpoint.open(str(path))


@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_an_untied_model_needs_its_head(name, written):
    with pytest.raises(UserError, match=f"no safetensors file has {HEAD}, which config.json requires; or does"):
        Checkpoint.open(str(written(name, {HEAD: None})))


@pytest.mark.parametrize(("name", "is_tied"), [("ernie4_5, tied", True), ("ernie4_5", False)])
def test_a_family_s_default_decides_where_config_json_does_not_say(name, is_tied, written):
    path = written(name)
    config = json.loads((path / "config.json").read_text())
    del config["tie_word_embeddings"]
    (path / "config.json").write_text(json.dumps(config))
    if is_tied:
        assert Checkpoint.open(str(path)).is_tied
    else:  # transformers reads it as tied, too
        assert Checkpoint.open(str(path)).is_tied and HEAD in Checkpoint.open(str(path)).tensors


@pytest.mark.parametrize(
    ("name", "is_moe", "coefficient"), [("olmoe", True, 0.01), ("deepseek_v3", True, 0.0), ("glm4", False, 0.0)]
)
def test_experts_are_known_by_the_configuration(name, is_moe, coefficient, written):
    checkpoint = Checkpoint.open(str(written(name)))
    assert (checkpoint.is_moe, checkpoint.router_aux_loss_coef) == (is_moe, coefficient)
    assert checkpoint.vocab_size == 99 and not checkpoint.has_images


CODE = """
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

class OwnTokenizer(PreTrainedTokenizerFast):
    vocab_files_names = {"vocab_file": "vocab.json"}
    marker = 17

    def __init__(self, vocab_file, **options):
        super().__init__(tokenizer_object=Tokenizer.from_file(vocab_file), **options)
"""


def test_a_tokenizer_that_is_code_is_run_only_if_it_is_trusted(written, tmp_path):
    path = written("qwen3", auto_map={"AutoConfig": "own.NotThere"})
    (path / "own.py").write_text(CODE)
    (path / "tokenizer.json").rename(path / "vocab.json")
    config = json.loads((path / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}, "tokenizer_class": "OwnTokenizer"}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as error:
        Checkpoint.open(str(path))
    allowed = "allow it with trust_remote_code (of a teacher: teacher_trust_remote_code)"
    assert str(error.value).startswith(f"{path}: its tokenizer_config.json has auto_map = ")
    assert str(error.value).endswith(f"names code in its folder; {allowed}") and "\n" not in str(error.value)
    checkpoint = Checkpoint.open(str(path), trust_remote_code=True)
    assert type(checkpoint.config).__name__ == "Qwen3Config", "the configuration is transformers'"
    assert checkpoint.tokenizer().marker == 17
    (tmp_path / "export").mkdir()
    write_companions(checkpoint, torch.float32, tmp_path / "export")
    assert (tmp_path / "export/own.py").read_text() == CODE


def test_a_configuration_of_ours_stands_in_for_code(written):
    path = written("kimi_k2", auto_map={"AutoConfig": "configuration_deepseek.DeepseekV3Config"})
    assert Checkpoint.open(str(path)).config.model_type == "kimi_k2"
