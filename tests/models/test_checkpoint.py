from __future__ import annotations

import json
import shutil

import pytest
from checkpoints import tiny_checkpoint

from megatron_gkd.errors import UserError
from megatron_gkd.models.checkpoint import Checkpoint


@pytest.fixture
def copy(tmp_path):
    def of(family, **changes):
        path = tmp_path / family
        shutil.copytree(tiny_checkpoint(family), path)
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | changes))
        return path

    return of


def test_opens_a_directory():
    checkpoint = Checkpoint.open(str(tiny_checkpoint("qwen3_moe")))
    assert checkpoint.is_moe and checkpoint.vocab_size == 99 and checkpoint.tokenizer().eos_token == "<|im_end|>"


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("qwen3", {"architectures": ["FalconForCausalLM"]}, "architecture FalconForCausalLM is not one of Llama"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "every layer is a mixture of experts"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window is not supported"),
    ],
)
def test_what_is_not_supported_is_refused(family, changes, message, copy):
    with pytest.raises(UserError, match=message):
        Checkpoint.open(str(copy(family, **changes)))


def test_a_directory_without_weights_is_refused(copy):
    path = copy("qwen3")
    (path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no \\*.safetensors file"):
        Checkpoint.open(str(path))


def test_a_directory_without_a_tokenizer_is_refused(copy):
    path = copy("qwen3")
    for file in path.glob("*token*"):
        file.unlink()
    with pytest.raises(UserError, match="no tokenizer"):
        Checkpoint.open(str(path)).tokenizer()


def test_a_hub_model_that_cannot_be_fetched_is_one_line(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="nobody/nothing: neither a local directory nor a hub model") as error:
        Checkpoint.open("nobody/nothing")
    assert "\n" not in str(error.value).split("(")[0]
