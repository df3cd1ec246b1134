"""Bad checkpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from bad_inputs.case import Case
from bad_inputs.workspace import Change, together, with_config, with_recipe, with_text
from safetensors.torch import load_file, save_file

WEIGHTS = "model.safetensors"


def removed(name: str) -> Change:
    """Return a change that removes a file of the student."""
    return lambda folder: (folder / "student" / name).unlink()


def with_weights(edit: Callable[[dict[str, torch.Tensor]], None], model: str = "student") -> Change:
    """Return a change of a model's tensors."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / model / WEIGHTS)
        edit(tensors)
        save_file(tensors, folder / model / WEIGHTS, metadata={"format": "pt"})

    return change


def cut(size: int) -> Change:
    """Return a change that leaves the first bytes of the weights."""

    def change(folder: Path) -> None:
        path = folder / "student" / WEIGHTS
        path.write_bytes(path.read_bytes()[:size])

    return change


def _with_index(folder: Path) -> None:
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": "model-00001-of-00002.safetensors"}}
    (folder / "student/model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "student" / WEIGHTS).unlink()


def _int8(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = torch.ones(32, dtype=torch.int8)


def _nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = torch.full((32,), float("nan"))


def _no_models(folder: Path) -> None:
    shutil.rmtree(folder / "student")
    (folder / "student").mkdir()


def _other_words(folder: Path) -> None:
    from checkpoints import tiny_tokenizer

    tiny_tokenizer(prefix="v").save_pretrained(folder / "teacher")


def _no_template(folder: Path) -> None:
    path = folder / "student/tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("chat_template", None)
    path.write_text(json.dumps(config))
    (folder / "student/chat_template.jinja").unlink(missing_ok=True)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
CASES = [
    Case("empty folder", "student", _no_models),
    Case("no config.json", "config.json", removed("config.json")),
    Case("config.json that is no JSON", "config.json", with_text("student/config.json", "{")),
    Case("config.json that is a list", "config.json", with_text("student/config.json", "[]")),
    Case("no model_type", "model_type", with_config(model_type=None)),
    Case(
        "unknown model_type",
        "its architecture (NonesuchForCausalLM)",
        with_config(model_type="nonesuch", architectures=["NonesuchForCausalLM"]),
    ),
    Case(
        "architecture of another family",
        "its architecture (BertModel)",
        with_config(architectures=["BertModel"], model_type="bert"),
    ),
    Case("heads as text", "num_attention_heads", with_config(num_attention_heads="four")),
    Case("no heads", "num_attention_heads", with_config(num_attention_heads=0)),
    Case("no layers", "num_hidden_layers", with_config(num_hidden_layers=0)),
    Case("fewer layers than weights", "layers", with_config(num_hidden_layers=1)),
    Case("more layers than weights", "layers", with_config(num_hidden_layers=3)),
    Case("negative hidden size", "hidden_size", with_config(hidden_size=-32)),
    Case("another hidden size", "student", with_config(hidden_size=64)),
    Case("other key-value heads", "student", with_config(num_key_value_heads=4)),
    Case("another vocabulary", "student", with_config(vocab_size=512)),
    Case("a smaller vocabulary", "student", with_config(vocab_size=50)),
    Case("gelu", "hidden_act", with_config(hidden_act="gelu")),
    Case(
        "unknown rope",
        "rope",
        with_config(
            rope_scaling={"rope_type": "spiral", "factor": 2.0},
            rope_parameters={"rope_type": "spiral", "factor": 2.0, "rope_theta": 1e4},
        ),
    ),
    Case("quantized", "quantization_config", with_config(quantization_config={"quant_method": "gptq", "bits": 4})),
    Case(
        "EOS beyond the vocabulary",
        "eos_token_id [9999]",
        with_text("student/generation_config.json", '{"eos_token_id": 9999}'),
    ),
    Case("no weights", "student", removed(WEIGHTS)),
    Case("empty weights", WEIGHTS, with_text(f"student/{WEIGHTS}", "")),
    Case("truncated weights", WEIGHTS, cut(5000)),
    Case("truncated header", WEIGHTS, cut(20)),
    Case("garbage", WEIGHTS, with_text(f"student/{WEIGHTS}", b"\x00\xff" * 400)),
    Case("pointer of git-lfs", WEIGHTS, with_text(f"student/{WEIGHTS}", POINTER)),
    Case("missing file of the index", "model-00001-of-00002.safetensors", _with_index),
    Case(
        "index that is no JSON", "model.safetensors.index.json", with_text("student/model.safetensors.index.json", "{")
    ),
    Case("missing tensor", "model.norm.weight", with_weights(lambda tensors: tensors.pop("model.norm.weight"))),
    Case(
        "additional tensor", "model.extra", with_weights(lambda tensors: tensors.update({"model.extra": torch.ones(2)}))
    ),
    Case(
        "wrong shape",
        "model.norm.weight",
        with_weights(lambda tensors: tensors.update({"model.norm.weight": torch.ones(7)})),
    ),
    Case("integers", "model.norm.weight", with_weights(_int8)),
    Case("NaN", "NaN", with_weights(_nan)),
    Case("NaN in the teacher", "NaN", with_weights(_nan, "teacher")),
    Case("no head", "lm_head", with_weights(lambda tensors: tensors.pop("lm_head.weight"))),
    Case("no tokenizer", "tokenizer", together(removed("tokenizer.json"), removed("tokenizer_config.json"))),
    Case("tokenizer that is no JSON", "tokenizer", with_text("student/tokenizer.json", "{")),
    Case("no chat template", "chat template", _no_template),
    Case("template that is none", "template", with_text("student/chat_template.jinja", "{% for %}")),
    Case(
        "template that fails",
        "train.jsonl, line 1",
        with_text("student/chat_template.jinja", "{{ raise_exception('no') }}"),
    ),
    Case(
        "template without an assistant",
        "train.jsonl, line 1",
        with_text(
            "student/chat_template.jinja",
            "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
        ),
    ),
    Case(
        "generation_config.json that is no JSON",
        "generation_config.json",
        with_text("student/generation_config.json", "{"),
        arguments=("--lmbda", "1"),
    ),
    Case("teacher of another tokenizer", "teacher", _other_words),
    Case("teacher without weights", "teacher", lambda folder: (folder / "teacher" / WEIGHTS).unlink()),
    Case("teacher with a config that is no JSON", "config.json", with_text("teacher/config.json", "nope")),
    Case("adapters that are none", "adapters", with_recipe("size: 1}", "size: 1}\nlora: {adapters: student}")),
    Case(
        "cache that is none",
        "teacher_cache",
        with_recipe("{teacher_model: teacher}", "{teacher_cache: student}"),
        arguments=("--gkd_logits_topk", "4"),
    ),
]
