"""What ends a completion: EOS of the student and its tokenizer, the end of a turn, and what the recipe names."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from checkpoints import tiny_tokenizer
from training_layouts import recipe_of

from megatron_gkd.data.report import DataReport

TEXT, CHAT = DataReport(4, 4), DataReport(4, 4, conversations=1)
ENDOFTEXT, IM_END = 0, 2


@pytest.fixture
def find():
    """What ends the completions of a base student (EOS `<|endoftext|>`) with a template of ChatML."""
    from megatron_gkd.training.ends import CompletionEnds

    def run(report=CHAT, rollout=None, eos=(ENDOFTEXT,), vocab_size=99, template=True):
        tokenizer = tiny_tokenizer()
        tokenizer.eos_token = "<|endoftext|>"
        if template is not True:
            tokenizer.chat_template = template
        models = SimpleNamespace(student=SimpleNamespace(eos_token_ids=eos, vocab_size=vocab_size), tokenizer=tokenizer)
        return CompletionEnds.find(recipe_of({"rollout": rollout or {}}), models, report)

    return run


def test_a_base_student_stops_at_the_end_of_a_turn(find):
    ends = find()
    assert ends.token_ids == (ENDOFTEXT, IM_END) and ends.added == (IM_END,)
    assert ends.describe() == "<|endoftext|> (0), <|im_end|> (2)"


def test_only_where_rows_are_conversations(find):
    assert find(TEXT).token_ids == (ENDOFTEXT,) and find(TEXT).added == ()
    assert find(None).token_ids == (ENDOFTEXT, IM_END), "streamed rows are not known yet"
    assert find(template=None).token_ids == (ENDOFTEXT,)


def test_the_tokenizers_eos_ends_completions_beside_the_students(find):
    assert find(TEXT, eos=(7, 9)).token_ids == (ENDOFTEXT, 7, 9) and find(TEXT, eos=()).added == (ENDOFTEXT,)


def test_an_id_that_the_model_lacks_is_never_drawn(find):
    assert find(vocab_size=2).token_ids == (ENDOFTEXT,)


def test_a_marker_that_is_several_tokens_is_warned_of(find):
    assert find().warning() is None
    ends = find(template="{% for message in messages %}{{ message.content }} [END] {% endfor %}")
    assert ends.token_ids == (ENDOFTEXT,)
    assert str(ends.warning()).startswith("the chat template ends a turn with [END], which is several tokens")
    named = {"stop_words": ["[END]"]}
    assert find(rollout=named, template="{% for m in messages %}{{ m.content }} [END] {% endfor %}").warning() is None
    assert find(TEXT, template="{% for m in messages %}{{ m.content }} [END] {% endfor %}").warning() is None


def test_the_recipes_ends_stay(find):
    ends = find(rollout={"stop_token_ids": [5], "stop_words": ["User:"]})
    assert ends.token_ids == (ENDOFTEXT, IM_END, 5) and ends.added == (IM_END,)
    assert ends.describe() == "<|endoftext|> (0), <|im_end|> (2), w1 (5), 'User:'"


def test_sampling_has_the_ends(find):
    from megatron_gkd.training.build import sampling_of

    assert sampling_of(recipe_of({}), find().token_ids).stop_token_ids == (ENDOFTEXT, IM_END)
