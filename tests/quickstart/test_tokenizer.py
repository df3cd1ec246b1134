"""The quickstart's tokenizer."""

from itertools import islice

import pytest
from quickstart.problems import make_problems
from quickstart.tokenizer import train_tokenizer
from transformers import AutoTokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """As the trainer gets it: saved, and opened again."""
    directory = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(f"{p.question} {p.solution}" for p in islice(make_problems(0), 3000)).save_pretrained(directory)
    return AutoTokenizer.from_pretrained(directory)


@pytest.mark.parametrize("text", ["Anna has 4 boxes.\n 4*12=48.", "  two  spaces ", "naïve ≠ 東京 123456", ""])
def test_decodes_to_the_text_it_was_given(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_a_number_is_one_token(tokenizer):
    assert tokenizer.tokenize("7+35=42") == ["7", "+", "35", "=", "42"]


def test_a_problem_is_within_the_recipes_length(tokenizer):
    rows = [problem.messages() for problem in islice(make_problems(1), 500)]
    lengths = [len(tokenizer.apply_chat_template(row, return_dict=False)) for row in rows]
    assert max(lengths) <= 96


def test_the_template_ends_each_turn_with_the_end_of_sequence_token(tokenizer):
    messages = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Yes."}]
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False)
    assert prompt == "<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template(messages, tokenize=False) == f"{prompt}Yes.{tokenizer.eos_token}\n"
