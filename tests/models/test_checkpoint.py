from __future__ import annotations

import json
import shutil

import pytest
import torch
from checkpoints import tiny_checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_gkd.errors import RunStopped, UserError
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


@pytest.mark.parametrize("family", ["qwen3", "qwen3_tied", "qwen3_moe"])
def test_parameters_are_counted_as_transformers_does(family, copy):
    path = copy(family)
    if family == "qwen3_tied":  # files may have the head as a copy
        tensors = load_file(path / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, path / "model.safetensors")
    expected = AutoModelForCausalLM.from_pretrained(path).num_parameters()
    assert Checkpoint.open(str(path)).num_parameters == expected


MUST = "its config.json has "


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("qwen3", {"architectures": ["FalconForCausalLM"]}, "its architecture (FalconForCausalLM) must be of one o"),
        ("qwen3", {"architectures": ["LlamaForCausalLM"]}, MUST + 'model_type = "qwen3": contradicts architectures = '),
        ("qwen3", {"model_type": None}, MUST + "model_type = null: contradicts architectures = Qwen3ForCausalLM; must"),
        ("qwen3", {"layer_types": ["linear_attention"] * 4}, MUST + "layer_types with linear_attention; all must be "),
        ("qwen3", {"layer_types": ["full_attention"] * 3}, MUST + 'layer_types = ["full_attention", "full_attention"'),
        ("qwen3", {"architectures": ["GraniteForCausalLM"]}, "its architecture (GraniteForCausalLM) is not supported:"),
        ("llama", {"attention_bias": True}, MUST + "attention_bias = true: is not supported; must be false"),
        ("qwen3", {"attention_bias": True}, MUST + "attention_bias = true: is not supported; must be false"),
        ("llama", {"mlp_bias": True}, MUST + "mlp_bias = true: is not supported; must be false"),
        ("llama", {"hidden_act": "gelu"}, MUST + 'hidden_act = "gelu": is not supported; must be "silu"'),
        ("qwen3", {"quantization_config": {"quant_method": "awq"}}, MUST + 'quantization_config = {"quant_method"'),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, MUST + 'rope_type = "dynamic", which'),
        ("llama", {"rope_parameters": {"rope_type": "of my own"}}, MUST + 'rope_type = "of my own", which is not'),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, MUST + "partial_rotary_factor = 0.5: is not"),
        ("llama", {"rope_parameters": 8}, MUST + "rotary parameters = 8; must be a JSON object"),
        ("qwen3", {"num_attention_heads": "4"}, MUST + 'num_attention_heads = "4": must be an integer of at least 1'),
        ("qwen3", {"num_attention_heads": 0}, MUST + "num_attention_heads = 0: must be an integer of at least 1"),
        ("qwen3", {"num_hidden_layers": 0}, MUST + "num_hidden_layers = 0: must be an integer of at least 1"),
        ("qwen3", {"num_key_value_heads": 3}, MUST + "num_key_value_heads = 3: must divide num_attention_heads (4)"),
        ("qwen3", {"rms_norm_eps": "tiny"}, "its config.json is not a model's configuration ("),
    ],
)  # fmt: skip
def test_a_config_that_is_not_supported_is_refused_by_key_and_value(family, changes, message, copy):
    path = copy(family, **changes)
    with pytest.raises(UserError) as error:
        Checkpoint.open(str(path))
    assert str(error.value).startswith(f"{path}: {message}") and "\n" not in str(error.value)


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
O_PROJ = "model.layers.3.self_attn.o_proj.weight"


@pytest.mark.parametrize(
    ("changes", "tensors", "message"),
    [
        ({}, {EMBEDDING: torch.zeros(90, 32)}, f"{EMBEDDING} has the shape (90, 32), but config.json has vocab_size"),
        ({"vocab_size": 112}, {}, f"{EMBEDDING} has the shape (99, 32), but config.json has vocab_size = 112"),
        ({}, {HEAD: torch.zeros(90, 32)}, f"{HEAD} has the shape (90, 32), but config.json has vocab_size = 99"),
        ({"num_hidden_layers": 3, "layer_types": None}, {}, "model.layers.3.input_layernorm.weight, model.layers.3."
         "mlp.down_proj.weight, "
         "model.layers.3.mlp.gate_proj.weight and 8 more tensors: config.json has no use for it (num_hidden_lay"),
        ({}, {O_PROJ: torch.zeros(32, 32)}, f"{O_PROJ} has the shape (32, 32); must be (32, 64) by config.json"),
        ({}, {O_PROJ: torch.zeros(32, 64, dtype=torch.int8)}, f"{O_PROJ} is of type I8; must be one of BF16, F16"),
        ({}, {O_PROJ: torch.zeros(32, 64).to(torch.float8_e4m3fn)}, f"{O_PROJ} is of type F8_E4M3; must be one of "),
        ({}, {"model.layers.0.self_attn.q_proj.weight_scale_inv": torch.zeros(1, 1)}, "model.layers.0.self_attn.q_proj."
         "weight_scale_inv: config.json has no use for it (num_hidden_layers = 4)"),
    ],
)  # fmt: skip
def test_tensors_that_config_json_does_not_describe_are_refused(changes, tensors, message, copy):
    path = copy("qwen3", **changes)
    save_file(load_file(path / "model.safetensors") | tensors, path / "model.safetensors")
    with pytest.raises(UserError) as error:
        Checkpoint.open(str(path))
    assert str(error.value).startswith(f"{path}: model.safetensors: {message}") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "hint"), [(HEAD, "; or does config.json lack tie_word_embeddings = true?"), ("model.norm.weight", "")]
)
def test_a_missing_tensor_is_named(name, hint, copy):
    path = copy("qwen3")
    tensors = load_file(path / "model.safetensors")
    del tensors[name]
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(UserError) as error:
        Checkpoint.open(str(path))
    assert str(error.value) == f"{path}: no safetensors file has {name}, which config.json requires{hint}"


def test_a_buffer_of_old_releases_is_no_parameter(copy):
    path = copy("qwen3")
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}
    save_file(load_file(path / "model.safetensors") | buffer, path / "model.safetensors")
    assert not buffer.keys() & Checkpoint.open(str(path)).tensors.keys()


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", None])
def test_a_damaged_file_is_named(content, copy):
    path = copy("qwen3")
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100] if content is None else content)
    with pytest.raises(UserError) as error:
        Checkpoint.open(str(path))
    assert str(error.value).startswith(f"{path}: model.safetensors: not a whole safetensors file of ")
    assert "\n" not in str(error.value)


def split(path, **index):
    """Spread the tensors over two files; `index` replaces entries of the weight map by file names."""
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, path / file)
    weight_map = {name: file for file, part in files.items() for name in part} | index
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_several_files_with_an_index_are_one_checkpoint(copy):
    path = copy("qwen3")
    before = Checkpoint.open(str(path)).tensors
    split(path)
    after = Checkpoint.open(str(path)).tensors
    assert after.keys() == before.keys() and {one.file for one in after.values()} == {"a.safetensors", "b.safetensors"}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "b.safetensors").unlink(), "b.safetensors: no such file in "),
        (lambda path: (path / "model.safetensors.index.json").unlink(), "model.safetensors: no such file in "),
        (lambda path: (path / "model.safetensors.index.json").write_text("{"), "model.safetensors.index.json: not an "),
        (lambda path: shutil.copy(path / "a.safetensors", path / "c.safetensors"), "c.safetensors: not part of the "),
        (lambda path: shutil.copy(path / "a.safetensors", path / "b.safetensors"), "b.safetensors: lm_head.weight is "
         "in it, but model.safetensors.index.json has a.safetensors"),
        (lambda path: save_file({}, path / "a.safetensors"), "a.safetensors: lm_head.weight is not in it, but "),
    ],
)  # fmt: skip
def test_inconsistent_files_are_refused(damage, message, copy):
    path = copy("qwen3")
    split(path)
    damage(path)
    with pytest.raises(UserError) as error:
        Checkpoint.open(str(path))
    assert str(error.value).startswith(f"{path}: {message}") and "\n" not in str(error.value)


def test_a_broken_generation_config_is_named(copy):
    path = copy("qwen3")
    (path / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match=r"generation_config.json: not a JSON file"):
        Checkpoint.open(str(path)).eos_token_ids  # noqa: B018


def test_a_directory_without_weights_is_refused(copy):
    path = copy("qwen3")
    (path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no \*\.safetensors file"):
        Checkpoint.open(str(path))


def test_a_directory_without_a_tokenizer_is_refused(copy):
    path = copy("qwen3")
    for file in path.glob("*token*"):
        file.unlink()
    with pytest.raises(UserError, match="has no tokenizer"):
        Checkpoint.open(str(path)).tokenizer()


def test_a_failed_download_is_one_line(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(RunStopped, match="nobody/nothing: neither a local directory nor a hub model") as error:
        Checkpoint.open("nobody/nothing")
    assert "\n" not in str(error.value).split("(")[0]
