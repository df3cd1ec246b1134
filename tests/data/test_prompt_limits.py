"""Prompts that are too long for a completion: what a shortened one keeps, and which rows are used."""

from __future__ import annotations

import pytest

from megatron_gkd.data.build import build_dataset
from megatron_gkd.data.prompt import PromptLimits, extract_prompt, max_response_length
from megatron_gkd.data.report import NO_RESPONSE, NO_ROOM, NO_ROOM_FOR_TEACHER
from megatron_gkd.data.tokenizing import RowOptions

LIMITS = PromptLimits(60, 60)
START, END = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
SYSTEM = "<|im_start|>system\nBe brief.<|im_end|>\n"
TOOLS = '<|im_start|>system\nTools: {"name": "add"};<|im_end|>\n'


@pytest.fixture
def build(section, write_jsonl, tokenizer):
    def make(rows, limits=LIMITS, strategy="left", max_length=80, **options):
        data = section(write_jsonl(rows), max_length=max_length, truncation_strategy=strategy)
        return build_dataset(data, "train", tokenizer, RowOptions(prompt_limits=limits, **options))

    return make


@pytest.mark.parametrize("strategy", ["left", "right"])
@pytest.mark.parametrize(
    ("row", "header"),
    [
        ({"messages": [{"role": "user", "content": "xyz" * 30}]}, START),
        (
            {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "xyz" * 30}]},
            SYSTEM + START,
        ),
        ({"messages": [{"role": "user", "content": "xyz" * 30}], "tools": [{"name": "add"}]}, TOOLS + START),
    ],
    ids=["no system message", "system message", "tools"],
)
def test_a_shortened_prompt_keeps_what_the_template_writes(build, tokenizer, row, header, strategy):
    dataset, report = build([row], strategy=strategy, allows_prompts=True)
    text = tokenizer.decode(dataset[0].input_ids)
    whole = build([row], PromptLimits(500, 500), max_length=512, allows_prompts=True)[0][0]
    assert len(dataset[0].input_ids) == 60 < len(whole.input_ids) and report.shortened == 1
    assert text.startswith(header) and text.endswith(END)
    content = text.removeprefix(header).removesuffix(END)
    assert content and row["messages"][-1]["content"].endswith(content)


def test_a_prompt_of_several_turns_keeps_the_system_message_and_its_end(build, tokenizer, chat):
    row = chat("a" * 40, "b" * 40, "c" * 20, "response")
    row["messages"].insert(0, {"role": "system", "content": "Be brief."})
    ((sample,), _) = build([row])
    text = tokenizer.decode(extract_prompt(sample))
    assert text.startswith(SYSTEM + START) and text.endswith("c" * 20 + END)
    assert len(extract_prompt(sample)) == 60


def test_a_prompt_without_room_for_its_content_is_left_out(build, tokenizer, chat):
    frame = len(tokenizer(START + END)["input_ids"])
    rows = [chat("q" * 90, "a"), chat("q", "a")]
    dataset, report = build(rows, PromptLimits(frame + 1, 60))
    assert len(dataset) == 2 and tokenizer.decode(extract_prompt(dataset[0])) == f"{START}q{END}"
    dataset, report = build([*rows, {"prompt": "p", "response": "a"}], PromptLimits(frame, 60))
    assert len(dataset) == 1 and report.dropped == {NO_ROOM: 2}


def test_plain_text_keeps_its_bos(build, tokenizer, monkeypatch):
    from megatron_gkd.data.template import RowRenderer

    monkeypatch.setattr(RowRenderer, "_bos", [tokenizer.convert_tokens_to_ids("<s>")])
    monkeypatch.setattr(type(tokenizer), "bos_token_id", tokenizer.convert_tokens_to_ids("<s>"), raising=False)
    ((sample,), _) = build([{"prompt": "xyz" * 40, "response": "a"}])
    text = tokenizer.decode(extract_prompt(sample))
    assert len(extract_prompt(sample)) == 60 and text.startswith("<s>") and ("xyz" * 40).endswith(text[3:])


class TestUnusedResponses:
    """With lmbda = 1 the student responds to every row."""

    def build(self, build, rows, **options):
        return build(rows, strategy="delete", allows_prompts=True, has_unused_responses=True, **options)

    def test_a_long_response_does_not_drop_its_row(self, build, chat):
        rows = [chat("q", "a" * 200), chat("q", "a"), chat("q" * 200, "a")]
        dataset, report = self.build(build, rows)
        assert report.dropped == {NO_ROOM: 1} and dataset.lengths.max() == 80
        assert extract_prompt(dataset[0]).tolist() == extract_prompt(dataset[1]).tolist()

    def test_nor_does_one_that_is_too_long_behind_the_teachers_prompt(self, build, chat):
        rows = [chat("q", "a" * 30, teacher_prompt="t" * 40), chat("q", "a", teacher_prompt="t" * 90)]
        dataset, report = self.build(build, rows, limits=PromptLimits(70, 70))
        assert report.dropped == {NO_ROOM_FOR_TEACHER: 1}
        assert dataset.teacher_lengths.tolist() == [80]
        assert max_response_length(dataset[0], 80, 80) >= 10

    def test_otherwise_a_row_must_fit_with_its_response(self, build, chat):
        dataset, report = build([chat("q", "a" * 200), chat("q", "a")], strategy="delete", allows_prompts=True)
        assert len(dataset) == 1 and report.dropped == {"longer than max_length": 1}


def test_no_prompt_has_less_room_than_a_completion(build, chat):
    rows = [chat("q" * length, "a" * 3) for length in range(1, 120)]
    for strategy in ("delete", "left", "right"):
        dataset, _ = build(rows, strategy=strategy)
        assert min(max_response_length(dataset[row], 80, 80) for row in range(len(dataset))) >= 20


def test_prompts_alone_are_left_out_of_validation(build, chat):
    rows = [chat("q", "a"), chat("q"), {"prompt": "p"}, {"prompt_token_ids": [3]}]
    dataset, report = build(rows, skips_prompts=True)
    assert len(dataset) == 1 and report.dropped == {NO_RESPONSE: 3}


def test_conversations_are_counted(build, chat):
    rows = [chat("q", "a"), {"prompt": "p", "response": "a"}, {"prompt_token_ids": [3, 4], "response_token_ids": [5]}]
    assert build(rows)[1].conversations == 1
    rendered = {"prompt": f"{START}q{END}", "response": "a"}  # by someone else
    assert build([*rows, rendered])[1].conversations == 2
