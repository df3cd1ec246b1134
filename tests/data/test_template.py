import copy

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from megatron_gkd.data.forms.recognition import Conventions
from megatron_gkd.data.loss_weights import LossStrategy
from megatron_gkd.data.rows import BadRow, PlainText, parse_row
from megatron_gkd.data.sample import IGNORED_LABEL
from megatron_gkd.data.template import RowRenderer

ALL_TURNS = LossStrategy("default")
QUESTION = {"role": "user", "content": "q"}
ROLES = Conventions(template_roles={"refused"})
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "add"}}]}


def check_shifted(input_ids, labels):
    """Every label is the next token, and both are int64."""
    assert input_ids.dtype == labels.dtype == np.int64
    assert len(input_ids) == len(labels)
    trained = labels[:-1] != IGNORED_LABEL
    np.testing.assert_array_equal(labels[:-1][trained], input_ids[1:][trained])
    assert labels[-1] == IGNORED_LABEL


@pytest.fixture
def render(tokenizers, trained_text):
    """`render(template, row, **options)`: whole text and trained text."""

    def run(template, row, **options):
        tokenizer = tokenizers[template]
        input_ids, labels, _ = RowRenderer(tokenizer, **options)(parse_row(row, conventions=ROLES))
        check_shifted(input_ids, labels)
        return tokenizer.decode(input_ids), trained_text(tokenizer, labels)

    return run


def test_only_the_last_turn_is_trained_on_or_all(render, chat):
    row = chat("one?", "1.", "two?", "2.")
    whole, trained = render("chatml", row)
    assert trained == "2.<|im_end|>"
    assert whole == (
        "<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\n1.<|im_end|>\n"
        "<|im_start|>user\ntwo?<|im_end|>\n<|im_start|>assistant\n2.<|im_end|>"
    )
    assert render("chatml", row, strategy=ALL_TURNS) == (whole, "1.<|im_end|>|2.<|im_end|>")


def test_messages_after_the_last_assistant_turn_are_removed(render, chat):
    assert render("chatml", chat("q", "a", "q2")) == render("chatml", chat("q", "a"))


def test_tools_are_rendered_and_tool_calls_trained_on(render):
    row = {
        "messages": [
            {"role": "user", "content": "1 + 1?"},
            CALL,
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "two"},
        ],
        "tools": [{"name": "add"}],
    }
    whole, trained = render("chatml", row, strategy=ALL_TURNS)
    assert whole.startswith('<|im_start|>system\nTools: {"name": "add"};<|im_end|>\n<|im_start|>user')
    assert trained == '<tool_call>{"name": "add"}</tool_call><|im_end|>|two<|im_end|>'


def test_a_header_in_the_text_of_a_user_does_not_mislead(render, chat):
    row = chat("say <|im_start|>assistant\nno", "yes", "q", "a")
    assert render("chatml", row, strategy=ALL_TURNS)[1] == "yes<|im_end|>|a<|im_end|>"


def test_a_template_without_a_header_for_the_assistant(render, chat):
    _, trained = render("inst", chat("q", "one", "q", "two"), strategy=ALL_TURNS)
    assert trained == " one </s>| two </s>"


class TestThinking:
    """A template that renders a turn differently once others follow it."""

    def test_the_empty_block_of_the_last_turn_is_trained_on(self, render, chat):
        assert render("qwen3", chat("q", "one", "q", "two"), strategy=ALL_TURNS)[1] == (
            "one<|im_end|>|<think>\n\n</think>\n\ntwo<|im_end|>"
        )

    def test_enable_thinking_false_puts_the_block_into_the_prompt(self, render, chat):
        options = dict(strategy=ALL_TURNS, template_kwargs={"enable_thinking": False})
        assert render("qwen3", chat("q", "<one", "q", "two"), **options)[1] == "<one<|im_end|>|two<|im_end|>"

    def test_the_row_overrides_the_recipe(self, render, chat):
        row = chat("q", "two", chat_template_kwargs={"enable_thinking": True})
        trained = render("qwen3", row, template_kwargs={"enable_thinking": False})[1]
        assert trained == "<think>\n\n</think>\n\ntwo<|im_end|>"

    def test_thoughts_of_earlier_turns_are_removed(self, render, chat):
        row = chat("q", "<think>\na\n</think>\n\none", "q", "<think>\nb\n</think>\n\ntwo")
        assert render("qwen3", row, strategy=ALL_TURNS)[1] == "one<|im_end|>|<think>\nb\n</think>\n\ntwo<|im_end|>"

    def test_thoughts_despite_enable_thinking_false(self, render, chat):
        row = chat("q", "<think>\na\n</think>\n\none")
        trained = render("qwen3", row, template_kwargs={"enable_thinking": False})[1]
        assert trained == "<think>\na\n</think>\n\none<|im_end|>"

    def test_thoughts_around_tool_calls(self, render):
        tool_use = [
            {"role": "user", "content": "q"},
            {**CALL, "reasoning_content": "a"},
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "two"},
        ]
        trained = render("qwen3", {"messages": tool_use + tool_use}, strategy=ALL_TURNS)[1]
        call = "\n<tool_call>add</tool_call><|im_end|>"
        assert trained == (f"{call}|two<|im_end|>|<think>\na\n</think>\n\n{call}|<think>\n\n</think>\n\ntwo<|im_end|>")

    def test_a_turn_that_cannot_be_found_is_a_bad_row(self, render, chat):
        row = chat("say <|im_start|>assistant\nno", "<think>\na\n</think>\n\none")
        with pytest.raises(BadRow, match=r"^chat template: the start of messages\[1\] cannot be found"):
            render("qwen3", row, template_kwargs={"enable_thinking": False})


def test_characters_of_several_tokens(render, chat):
    assert render("chatml", chat("ä?", "日本 🙂"))[1] == "日本 🙂<|im_end|>"


def test_plain_text_gets_an_end_token_and_no_template(tokenizers, trained_text):
    tokenizer = tokenizers[None]
    input_ids, labels, _ = RowRenderer(tokenizer)(PlainText("the question: ", "the answer"))
    check_shifted(input_ids, labels)
    assert tokenizer.decode(input_ids) == "the question: the answer<|im_end|>"
    assert trained_text(tokenizer, labels) == "the answer<|im_end|>"


def test_plain_text_starts_with_bos_where_the_tokenizer_adds_it(tokenizers):
    tokenizer = copy.deepcopy(tokenizers[None])
    tokenizer.bos_token = "<s>"
    without = RowRenderer(tokenizer)(PlainText("a", "b"))[0].tolist()
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    assert RowRenderer(tokenizer)(PlainText("a", "b"))[0].tolist() == [bos, *without]


@pytest.mark.parametrize(
    ("template", "row", "message"),
    [
        (
            "chatml",
            {"messages": [{"role": "assistant", "content": "a"}]},
            r"chat template: messages\[0\] is an assistant turn",
        ),
        (
            None,
            {"prompt": [{"role": "user", "content": "q"}], "response": "a"},
            "chat template: the tokenizer has none",
        ),
        (
            "chatml",
            {"prompt": [{"role": "refused", "content": "q"}], "response": "a"},
            "chat template: it fails for this row: TemplateError: unknown role",
        ),
        ("chatml", {"prompt": "\ud800", "response": "a"}, r"not Unicode: the text holds '\\ud800'"),
    ],
)
def test_a_row_that_cannot_be_rendered_is_a_bad_row(render, template, row, message):
    with pytest.raises(BadRow, match=message):
        render(template, row)
