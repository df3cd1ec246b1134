"""A tokenizer that is trained in memory, chat templates of the usual kinds, and data sections without a recipe."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megatron_gkd.data.sample import IGNORED_LABEL

CHATML = """
{%- if tools %}<|im_start|>system
Tools: {% for tool in tools %}{{ tool | tojson }};{% endfor %}<|im_end|>
{% endif %}
{%- for message in messages %}
{%- if message.role == 'refused' %}{{ raise_exception('unknown role') }}{% endif %}
{{- '<|im_start|>' + message.role + '\\n' + message.content }}
{%- for call in message.tool_calls or [] %}{{ '<tool_call>' + (call.function | tojson) + '</tool_call>' }}{% endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""

# As Qwen3 does: thoughts are kept only after the last question, the very last answer gets an empty block where it has
# none, and enable_thinking=false closes the block in the generation prompt.
QWEN3 = """
{%- set ns = namespace(question=-1) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set ns.question = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' %}
    {%- set thoughts = message.reasoning_content or '' %}
    {%- set content = message.content %}
    {%- if not thoughts and '</think>' in content %}
        {%- set thoughts = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {%- if loop.index0 > ns.question and (loop.last or thoughts) %}
        {{- '<think>\\n' + thoughts + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- content }}
    {%- for call in message.tool_calls or [] %}{{ '\\n<tool_call>' + call.function.name + '</tool_call>' }}{% endfor %}
{%- else %}{{ message.content }}{% endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}
"""

# As Llama 2 and Mistral do: the assistant has no header of its own.
INST = """
{%- for message in messages %}
{%- if message.role == 'user' %}{{ '<s>[INST] ' + message.content + ' [/INST]' }}
{%- elif message.role == 'assistant' %}{{ ' ' + message.content + ' </s>' }}{% endif %}
{%- endfor %}
"""

TEMPLATES = {"chatml": CHATML, "qwen3": QWEN3, "inst": INST}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "<think>", "</think>"]


def make_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["the question and the answer is a user assistant system tool"] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="session")
def tokenizers() -> dict[str | None, PreTrainedTokenizerFast]:
    """By the name of their template; None has none."""
    return {None: make_tokenizer(None), **{name: make_tokenizer(text) for name, text in TEMPLATES.items()}}


@pytest.fixture
def tokenizer(tokenizers: dict[str | None, PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    return tokenizers["chatml"]


@pytest.fixture
def trained_text() -> Callable[..., str]:
    """The text of the tokens that the labels ask for, with a bar where a stretch that is not trained on stands."""

    def text(tokenizer: PreTrainedTokenizerFast, labels: np.ndarray) -> str:
        runs: list[list[int]] = [[]]
        for label in labels.tolist():
            if label != IGNORED_LABEL:
                runs[-1].append(label)
            elif runs[-1]:
                runs.append([])
        return "|".join(tokenizer.decode(run) for run in runs if run)

    return text


@dataclass
class File:
    path: str
    weight: float = 1.0
    columns: dict[str, str] | None = None
    preprocessor: str | None = None


@dataclass
class Section:
    """What a recipe's data section offers."""

    dataset: list[File] = field(default_factory=list)
    val_dataset: list[File] = field(default_factory=list)
    split_dataset_ratio: float = 0.0
    columns: dict[str, str] = field(default_factory=dict)
    max_length: int = 256
    teacher_max_length: int | None = None
    packing: bool = False
    truncation_strategy: str = "delete"
    loss_scale: str = "last_round"
    data_errors: str = "raise"
    preprocessor: str | None = None
    external_plugins: list[str] = field(default_factory=list)
    system: str | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    preprocessing_num_workers: int = 1
    dataset_cache_dir: str | None = None
    shuffle: bool = True
    shuffle_buffer_size: int = 1000
    dataloader_num_workers: int = 0


@pytest.fixture
def section(tmp_path: Path) -> Callable[..., Section]:
    """`section(path, ..., max_length=8)`: a data section over these files, with a cache of its own."""

    def make(*paths: Path | str, **options: Any) -> Section:
        options.setdefault("dataset_cache_dir", str(tmp_path / "cache"))
        return Section(dataset=[File(str(path)) for path in paths], **options)

    return make


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    """`write_jsonl(rows, name)`: a file of rows; a row that is text is written as it stands."""

    def write(rows: list[Any], name: str = "train.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return path

    return write


@pytest.fixture
def chat() -> Callable[..., dict[str, Any]]:
    """`chat("question", "answer", "question", ...)`: a row with user and assistant taking turns."""

    def make(*contents: str, **keys: Any) -> dict[str, Any]:
        roles = ("user", "assistant")
        return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)], **keys}

    return make
