"""The token that ends an assistant turn, in templates of the usual kinds."""

from __future__ import annotations

import pytest
from checkpoints import CHAT_TEMPLATE as CHATML
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_gkd.data.end_of_turn import find_end_of_turn, find_marker_of_text

LLAMA2 = """
{%- for message in messages %}
{%- if message.role == 'user' %}{{ '<s>[INST] ' + message.content + ' [/INST]' }}
{%- else %}{{ ' ' + message.content + ' </s>' }}{% endif %}
{%- endfor %}
"""
LLAMA3 = """
{{- bos_token }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}
"""
GEMMA = """
{{- bos_token }}
{%- for message in messages %}
{%- set role = 'model' if message.role == 'assistant' else message.role %}
{{- '<start_of_turn>' + role + '\\n' + message.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}
"""
DEEPSEEK = """
{{- bos_token }}
{%- for message in messages %}
{%- if message.role == 'user' %}{{ '<｜User｜>' + message.content }}{% endif %}
{%- if message.role == 'assistant' %}
{{- '<｜Assistant｜>' + message.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}
"""
GLM = """
{{- '[gMASK]<sop>' }}
{%- for message in messages %}{{ '<|' + message.role + '|>\\n' + message.content }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}
"""
HARMONY = """
{{- '<|start|>system<|message|>Reasoning: medium<|end|>' }}
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{{- '<|start|>assistant<|channel|>final<|message|>' + message.content + ('<|return|>' if loop.last else '<|end|>') }}
{%- else %}{{ '<|start|>' + message.role + '<|message|>' + message.content + '<|end|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}
"""
PHI3 = """
{%- for message in messages %}{{ '<|' + message.role + '|>\\n' + message.content + '<|end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}
"""
VICUNA = """
{%- for message in messages %}
{{- ('USER: ' if message.role == 'user' else ' ASSISTANT: ') + message.content }}
{%- endfor %}
"""
CONTROLS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<start_of_turn>", "<end_of_turn>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>", "<think>", "</s>"),
    *("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|start|>", "<|message|>", "<|channel|>", "<|return|>"),
    *("<|end|>", "<s>"),
)
NO_CONTROLS = ("</think>", "\n\n")  # added tokens that are text


def make_tokenizer(template: str | None, controls: tuple[str, ...] = CONTROLS) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(sorted(pre_tokenizers.ByteLevel.alphabet()))
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in controls])
    backend.add_tokens([AddedToken(text, normalized=False) for text in NO_CONTROLS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", bos_token="<s>", unk_token=None
    )
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (CHATML, "<|im_end|>"),
        (LLAMA2, "</s>"),  # after a space
        (LLAMA3, "<|eot_id|>"),
        (GEMMA, "<end_of_turn>"),
        (DEEPSEEK, "<｜end▁of▁sentence｜>"),
        (GLM, "<|user|>"),  # the next turn's role
        (HARMONY, "<|return|>"),  # <|end|> also ends an analysis, which an answer follows
        (PHI3, "<|end|>"),  # and not the EOS after it
        (VICUNA, None),
        (VICUNA + "{{ '\\n\\n' }}", None),
        ("{{ messages[0].content }}", None),
        ("{{ raise_exception('no') }}", None),
        (None, None),
    ],
)
def test_the_end_of_a_turn_is_found_by_rendering(template, end):
    tokenizer = make_tokenizer(template)
    found = find_end_of_turn(tokenizer)
    assert (None if found is None else tokenizer.convert_ids_to_tokens(found)) == end


def test_a_marker_that_is_several_tokens_of_text_is_none():
    tokenizer = make_tokenizer(CHATML, controls=("<|endoftext|>", "<s>"))
    assert len(tokenizer("<|im_end|>", add_special_tokens=False)["input_ids"]) > 1
    assert find_end_of_turn(tokenizer) is None and find_marker_of_text(tokenizer) == "<|im_end|>"
    assert find_marker_of_text(make_tokenizer(CHATML)) is None and find_marker_of_text(make_tokenizer(VICUNA)) is None


def test_arguments_of_the_template_are_used():
    tokenizer = make_tokenizer("{% for message in messages %}{{ message.content + end }}{% endfor %}")
    assert tokenizer.convert_ids_to_tokens(find_end_of_turn(tokenizer, {"end": "<|eot_id|>"})) == "<|eot_id|>"
