"""Which tokens of a row are trained on, and with which weight."""

import numpy as np
import pytest

from megatron_gkd.data.build import build_dataset
from megatron_gkd.data.loss_weights import LossStrategy, apply_weights
from megatron_gkd.data.prompt import extract_prompt, prompt_length, replace_response
from megatron_gkd.data.rows import BadRow, parse_row
from megatron_gkd.data.sample import IGNORED_LABEL
from megatron_gkd.data.template import RowRenderer
from megatron_gkd.data.tokenizing import RowOptions
from megatron_gkd.errors import RunStopped

THINK = "<think>\n\n</think>\n\n"
TOOLS = [
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "a"},
    {"role": "user", "content": "q2"},
    {"role": "assistant", "content": "call"},
    {"role": "tool", "content": "t"},
    {"role": "assistant", "content": "b"},
]


def with_losses(*losses):
    """`TOOLS`, each assistant turn with one of `losses`."""
    said = iter(losses)
    return {"messages": [m | ({"loss": next(said)} if m["role"] == "assistant" else {}) for m in TOOLS]}


@pytest.fixture
def read(section, write_jsonl, tokenizers):
    """`read(row, template, **options)`: the row's sample, and its trained text by weight: {1.0: "a|b"}."""

    def run(row, template="chatml", **options):
        tokenizer = tokenizers[template]
        sample = build_dataset(section(write_jsonl([row]), **options), "train", tokenizer)[0][0]
        weights = np.ones(len(sample.labels)) if sample.label_weights is None else sample.label_weights
        texts = {}
        for weight in sorted(set(weights[sample.label_positions].tolist())):
            here = sample.label_positions[weights[sample.label_positions] == weight]
            runs = np.split(here, np.flatnonzero(np.diff(here) > 1) + 1)
            texts[weight] = "|".join(tokenizer.decode(sample.labels[run]) for run in runs)
        return sample, texts

    return run


class TestStrategies:
    @pytest.mark.parametrize(
        ("loss_scale", "trained"),
        [
            ("last_round", "call<|im_end|>|b<|im_end|>"),
            ("default", "a<|im_end|>|call<|im_end|>|b<|im_end|>"),
        ],
    )
    def test_turns(self, read, loss_scale, trained):
        sample, texts = read({"messages": TOOLS}, loss_scale=loss_scale)
        assert texts == {1.0: trained}
        assert sample.label_weights is None and sample.response_start is None

    @pytest.mark.parametrize("row", [{"messages": TOOLS}, {"prompt": "the question", "response": " an answer"}])
    def test_all_tokens(self, read, tokenizers, row):
        sample, _ = read(row, loss_scale="all")
        assert sample.labels[:-1].tolist() == sample.input_ids[1:].tolist() and sample.labels[-1] == IGNORED_LABEL
        plain, _ = read(row)
        assert extract_prompt(sample).tolist() == extract_prompt(plain).tolist()
        assert sample.label_weights is None and sample.response_start == prompt_length(plain.labels)

    def test_a_lone_assistant_message_is_text_for_pre_training(self, read):
        row = {"messages": [{"role": "assistant", "content": "the answer"}]}
        sample, texts = read(row, loss_scale="all")
        assert sample.num_labels == len(sample.input_ids) - 1
        assert texts == {1.0: read({"prompt": "", "response": "the answer"}, loss_scale="all")[1][1.0]}
        with pytest.raises(RunStopped, match=r"messages\[0\] is an assistant turn"):
            read(row, loss_scale="default")


class TestEmptyThoughts:
    @pytest.mark.parametrize(
        ("content", "trained"),
        [("two", "two<|im_end|>"), ("<think>\nb\n</think>\n\ntwo", "<think>\nb\n</think>\n\ntwo<|im_end|>")],
    )
    def test_of_the_last_turn(self, read, chat, content, trained):
        row = chat("q", "one", "q", content)
        sample, texts = read(row, "qwen3", loss_scale="default+ignore_empty_think")
        assert texts == {1.0: f"one<|im_end|>|{trained}"} and sample.label_weights is None
        # The student's own response follows the generation prompt: it chooses whether to think.
        assert extract_prompt(sample).tolist() == extract_prompt(read(row, "qwen3")[0]).tolist()

    def test_beside_an_opening_tag_in_the_generation_prompt(self, read, chat, tokenizers, monkeypatch):
        template = tokenizers["chatml"].chat_template.replace(
            "<|im_start|>assistant", "<|im_start|>assistant\\n<think>"
        )
        monkeypatch.setattr(tokenizers["chatml"], "chat_template", template)
        row = chat("q", "<think>\n\n</think>\n\na")
        assert read(row, loss_scale="last_round+ignore_empty_think")[1] == {1.0: "a<|im_end|>"}

    def test_of_plain_text_and_token_ids(self, read, tokenizers):
        row = {"prompt": "q", "response": THINK + "the answer"}
        sample, texts = read(row, loss_scale="last_round+ignore_empty_think")
        assert texts == {1.0: "the answer<|im_end|>"}
        ids = {"prompt_token_ids": [5], "response_token_ids": tokenizers["chatml"].encode(THINK + "the answer")}
        assert read(ids, loss_scale="last_round+ignore_empty_think")[1] == {1.0: "the answer"}
        assert read(ids, loss_scale="all+ignore_empty_think")[1] == {1.0: "the answer"}
        assert extract_prompt(sample).tolist() == extract_prompt(read(row)[0]).tolist()


class TestMessages:
    def test_a_loss_wins_over_the_strategy(self, read):
        row = with_losses(True, 0.5, None)
        assert read(row)[1] == {0.5: "call<|im_end|>", 1.0: "a<|im_end|>|b<|im_end|>"}
        sample, texts = read(with_losses(2, False, 0), loss_scale="default")
        assert texts == {2.0: "a<|im_end|>"} and sample.label_weights.dtype == np.float32
        assert sample.num_labels == len(sample.label_positions)

    def test_the_students_response_replaces_the_last_turn_whatever_its_loss_is(self, read, tokenizer):
        sample, _ = read(with_losses(2, None, False), loss_scale="default")
        plain, _ = read({"messages": TOOLS})
        assert extract_prompt(sample).tolist() == extract_prompt(plain).tolist()
        own = replace_response(sample, [7, 8])
        assert own.labels.tolist() == [IGNORED_LABEL] * (len(own.input_ids) - 3) + [7, 8, IGNORED_LABEL]
        assert own.label_weights is None and own.response_start is None

    def test_no_template_renders_it(self, read, tokenizers, monkeypatch):
        template = tokenizers["chatml"].chat_template
        listing = template.replace("message.content }}", "message.content + (message | list | join) }}", 1)
        monkeypatch.setattr(tokenizers["chatml"], "chat_template", listing)
        assert "loss" not in tokenizers["chatml"].decode(read(with_losses(1, 2, 3))[0].input_ids)

    @pytest.mark.parametrize(
        ("message", "problem"),
        [
            ({"loss": -1}, r"loss: messages\[1\].loss = -1: must be true, false, or a weight from 0 to 1e\+06"),
            ({"loss": "2"}, r"messages\[1\].loss = '2': must be"),
            ({"loss": float("nan")}, r"messages\[1\].loss = nan: must be"),
            ({"loss": 10**400}, r"messages\[1\].loss = 1000"),
            ({"loss": [1]}, r"messages\[1\].loss = \[1\]: must be"),
            (
                {"role": "user", "loss": True},
                r"messages\[1\].loss = True: only assistant turns have a loss of their own; loss_scale: all trains",
            ),
        ],
    )
    def test_bad_values(self, chat, message, problem):
        row = chat("q", "a", "q", "b")
        row["messages"][1] |= message
        with pytest.raises(BadRow, match=problem):
            parse_row(row)

    def test_what_is_not_trained_on_may_say_so(self, read, chat, tokenizer):
        row = chat("q", "a")
        row["messages"][0]["loss"] = False
        assert read(row)[1] == {1.0: "a<|im_end|>"}
        with pytest.raises(BadRow, match=r"loss: messages\[0\] \(user\) has one, which only assistant turns may"):
            RowRenderer(tokenizer, LossStrategy("all"))(parse_row(row))

    def test_a_row_without_weights_is_left_out(self, section, write_jsonl, chat, tokenizer):
        rows = [chat("q", "a"), with_losses(0, False, 0)]
        dataset, report = build_dataset(section(write_jsonl(rows)), "train", tokenizer)
        assert len(dataset) == 1 and report.dropped == {"without a token whose loss has a weight": 1}

    def test_rows_with_and_without_weights_are_stored_together(self, section, write_jsonl, chat, tokenizer):
        rows = [chat("q", "a"), with_losses(1, 1, 0.5), chat("q", "a")]
        dataset, _ = build_dataset(section(write_jsonl(rows)), "train", tokenizer)
        assert [dataset[row].label_weights is None for row in range(3)] == [True, False, True]

    def test_it_is_a_prompt_where_prompts_are_rows(self, section, write_jsonl, tokenizer):
        options = RowOptions(allows_prompts=True)
        rows = [with_losses(0, False, 0), {"messages": TOOLS}]
        dataset, _ = build_dataset(section(write_jsonl(rows)), "train", tokenizer, options)
        assert dataset.num_labels[0] == 0 < dataset.num_labels[1]
        assert extract_prompt(dataset[0]).tolist() == extract_prompt(dataset[1]).tolist()

    @pytest.mark.parametrize("strategy", ["left", "right"])
    def test_truncation_keeps_weights_at_their_tokens(self, read, strategy):
        row = with_losses(2, 3, 4)
        whole, _ = read(row, loss_scale="default")
        cut, texts = read(row, loss_scale="default", max_length=len(whole.input_ids) - 1, truncation_strategy=strategy)
        assert len(cut.input_ids) < len(whole.input_ids)
        last = "b<|im_end|>" if strategy == "left" else "b"
        assert texts == {2.0: "a<|im_end|>", 3.0: "call<|im_end|>", 4.0: last}

    def test_rows_are_told_apart_by_their_weights(self, section, write_jsonl, tokenizer):
        datasets = [
            build_dataset(section(write_jsonl([with_losses(*losses)], f"{n}.jsonl")), "train", tokenizer)[0]
            for n, losses in enumerate([(None, None, None), (None, 1, True), (None, 2, None)])
        ]
        assert datasets[0].digests == datasets[1].digests != datasets[2].digests


def test_a_weight_of_0_is_no_label():
    ids, labels = np.arange(10, 16), np.array([-100, 12, 13, 14, 15, -100])
    found = apply_weights(ids, labels, np.array([0, 0, 1, 0, 2, 5], np.float32))
    assert found.labels.tolist() == [-100, -100, 13, -100, 15, -100]
    assert found.label_weights.tolist() == [0, 0, 1, 0, 2, 0]
    assert found.response_start == 2
    assert apply_weights(ids, labels, None)[1:] == (None, None)
