from dataclasses import replace

import numpy as np
import pytest

from megatron_gkd.data.build import build_dataset
from megatron_gkd.data.prompt import replace_response
from megatron_gkd.data.rows import BadRow, parse_row
from megatron_gkd.data.sample import FROM_DATASET, IGNORED_LABEL, Sample, shift_labels
from megatron_gkd.data.teacher_view import teacher_view
from megatron_gkd.data.tokenizing import RowOptions
from megatron_gkd.errors import RunStopped


def build(section, tokenizer, **options):
    return build_dataset(section, "train", tokenizer, RowOptions(**options))


def sample(trained, teacher_prompt=None):
    input_ids = np.arange(10, 10 + len(trained))
    labels = shift_labels(input_ids, np.array(trained, dtype=bool))
    return Sample(input_ids, labels, FROM_DATASET, 3, None if teacher_prompt is None else np.array(teacher_prompt))


def labels_of(sample):
    return sample.labels[sample.labels != IGNORED_LABEL].tolist()


class TestView:
    def test_the_response_follows_the_teachers_prompt(self):
        view = teacher_view(sample([0, 0, 0, 1, 1], [5, 6, 7, 8, 9]))
        assert view.input_ids.tolist() == [5, 6, 7, 8, 9, 13, 14] and view.input_ids.dtype == np.int64
        assert view.labels.tolist() == [IGNORED_LABEL] * 4 + [13, 14, IGNORED_LABEL]
        assert (view.source, view.row_id, view.teacher_prompt) == (FROM_DATASET, 3, None)
        assert teacher_view(view) is view

    def test_a_prompt_of_one_token_on_either_side(self):
        assert labels_of(teacher_view(sample([0, 1, 1], [5]))) == [11, 12]
        assert teacher_view(sample([0, 0, 0, 1], [5])).input_ids.tolist() == [5, 13]

    def test_labels_of_earlier_turns_keep_their_place(self):
        row = sample([0, 1, 1, 0, 0, 1, 1, 1], [10, 11, 12, 13, 70, 71, 72])
        view = teacher_view(row)
        assert view.labels.tolist() == [
            11,
            12,
            IGNORED_LABEL,
            IGNORED_LABEL,
            IGNORED_LABEL,
            IGNORED_LABEL,
            15,
            16,
            17,
            IGNORED_LABEL,
        ]
        assert view.input_ids.tolist() == [10, 11, 12, 13, 70, 71, 72, 15, 16, 17]
        assert labels_of(view) == labels_of(row)

    def test_a_response_of_the_student(self):
        row = replace(sample([0, 1, 1, 0, 0, 1, 1], [10, 11, 12, 70]), tag="math")
        view = teacher_view(replace_response(row, [1, 2]))
        assert view.input_ids.tolist() == [10, 11, 12, 70, 1, 2] and labels_of(view) == [1, 2]
        assert (view.source, view.tag) == ("student", "math")

    def test_without_labels_there_is_nothing_to_read(self):
        row = replace_response(sample([0, 0, 1], [5, 6]), [1, 2], trained=False)
        assert teacher_view(row) is row


@pytest.fixture
def read(section, write_jsonl, tokenizers):
    """`read(row, **options)`: the row's sample, what the student and what the teacher reads of it, as text."""

    def run(row, template="chatml", prompts=False, **options):
        dataset, _ = build(section(write_jsonl([row]), **options), tokenizers[template], allows_prompts=prompts)
        found = dataset[0]
        assert labels_of(teacher_view(found)) == labels_of(found)
        return found, *(tokenizers[template].decode(view.input_ids) for view in (found, teacher_view(found)))

    return run


class TestRows:
    def test_it_replaces_the_last_user_message(self, read, chat):
        row = chat("one?", "1.", "two?", "2.", teacher_prompt="two? It is 2.", tools=[{"name": "add"}])
        found, student, teacher = read(row)
        assert teacher == student.replace("two?", "two? It is 2.") and "Tools:" in teacher
        assert found.teacher_prompt.dtype == np.int64

    def test_messages_between_it_and_the_response_stay(self, read):
        messages = [
            {"role": "user", "content": "1 + 1?"},
            {"role": "assistant", "tool_calls": [{"function": {"name": "add"}}]},
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "two"},
        ]
        _, student, teacher = read({"messages": messages, "teacher_prompt": "1 + 1? Two."})
        assert teacher == student.replace("1 + 1?", "1 + 1? Two.")

    def test_it_replaces_a_prompt_of_text(self, read):
        _, student, teacher = read({"prompt": "q", "response": " a", "teacher_prompt": "the answer"}, None)
        assert (student, teacher) == ("q a<|im_end|>", "the answer a<|im_end|>")

    @pytest.mark.parametrize("template", ["chatml", "qwen3", "inst"])
    def test_earlier_turns_are_scored_as_the_student_reads_them(self, read, chat, template):
        row = chat("one?", "1.", "two?", "2.", "three?", "3.", teacher_prompt="three? 3")
        found, student, teacher = read(row, template, loss_scale="default")
        assert teacher == student.replace("three?", "three? 3")
        assert len(np.flatnonzero(np.diff(found.label_positions) > 1)) == 2

    def test_a_prompt_alone(self, section, write_jsonl, tokenizer, chat):
        rows = [chat("q", teacher_prompt="q: a"), {"prompt": "q", "teacher_prompt": "a"}, chat("q")]
        dataset, _ = build(section(write_jsonl(rows)), tokenizer, allows_prompts=True)
        found = [dataset[index].teacher_prompt for index in range(3)]
        assert tokenizer.decode(found[0]) == "<|im_start|>user\nq: a<|im_end|>\n<|im_start|>assistant\n"
        assert tokenizer.decode(found[1]) == "a" and found[2] is None
        assert dataset.teacher_lengths.tolist() == [len(found[0]), 1, 0]

    def test_the_teacher_reads_the_students_response_after_it(self, read, chat, tokenizer):
        found, _, teacher = read(chat("q", "a", teacher_prompt="q: a"))
        reply = tokenizer.encode("b<|im_end|>", add_special_tokens=False)
        view = teacher_view(replace_response(found, reply))
        assert tokenizer.decode(view.input_ids) == teacher.replace("\na<", "\nb<") and labels_of(view) == reply

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"prompt": "q", "response": "a", "teacher_prompt": 3}, "wrong type: teacher_prompt must be a string"),
            ({"prompt": "q", "response": "a", "teacher_prompt": " "}, "empty teacher_prompt: teacher_prompt is empty"),
        ],
    )
    def test_a_bad_teacher_prompt_is_an_error(self, row, message):
        with pytest.raises(BadRow, match=message):
            parse_row(row)

    def test_a_conversation_without_a_user(self, read):
        messages = [{"role": "system", "content": "s"}, {"role": "assistant", "content": "a"}]
        with pytest.raises(
            RunStopped, match="no user message: teacher_prompt replaces the last user message, and there is none"
        ):
            read({"messages": messages, "teacher_prompt": "b"})

    @pytest.mark.parametrize(
        "truncation", [{}, {"truncation_strategy": "left", "max_length": 40, "teacher_max_length": 200}]
    )
    def test_trained_turns_after_the_teacher_prompt_keep_their_distance_to_the_end(self, read, tokenizer, truncation):
        messages = [
            {"role": "user", "content": "q" * 20},
            {"role": "assistant", "content": "a"},
            {"role": "tool", "content": "t"},
            {"role": "assistant", "content": "b"},
        ]
        found, student, teacher = read({"messages": messages, "teacher_prompt": "longer " * 4}, **truncation)
        assert tokenizer.decode(labels_of(found)) == "a<|im_end|>b<|im_end|>"
        assert teacher.endswith(student[student.index("q<") + 1 :]) and "longer longer" in teacher
        view = teacher_view(found)
        assert [view.input_ids[at + 1] for at in view.label_positions] == labels_of(found)

    def test_a_template_that_renders_an_earlier_turn_by_the_prompt(self, read, chat, tokenizers, monkeypatch):
        longest = "{{ messages | map(attribute='content') | map('length') | max if loop.index0 == 1 }}"
        template = tokenizers["chatml"].chat_template.replace(
            " + message.content", f" }}}}{longest}{{{{ message.content"
        )
        monkeypatch.setattr(tokenizers["chatml"], "chat_template", template)
        with pytest.raises(RunStopped, match="teacher_prompt: a turn before the response that is trained on is"):
            read(chat("q", "a", "q", "b", teacher_prompt="longer"), loss_scale="default")

    def test_prompts_are_not_trained_on_beside_it(self, read, chat):
        with pytest.raises(RunStopped, match="teacher_prompt: loss_scale: all trains on prompts, which the teacher"):
            read(chat("q", "a", teacher_prompt="longer"), loss_scale="all")

    def test_a_template_that_renders_the_response_by_the_prompt(self, read, chat, tokenizers, monkeypatch):
        counting = "message.content }}{{ messages[0].content | length if message.role == 'assistant' }}"
        template = tokenizers["chatml"].chat_template.replace("message.content }}", counting, 1)
        monkeypatch.setattr(tokenizers["chatml"], "chat_template", template)
        with pytest.raises(RunStopped, match="teacher_prompt: the response is tokenized differently after it"):
            read(chat("q", "a", teacher_prompt="longer"))


class TestLengths:
    def test_too_long_for_the_teacher_is_counted_on_its_own(self, section, write_jsonl, chat, tokenizer):
        rows = [chat("q", "a"), chat("q", "a", teacher_prompt="x" * 90), chat("q", "a" * 99)]
        path = write_jsonl(rows)
        dataset, report = build(section(path, max_length=60), tokenizer)
        assert len(dataset) == 1
        assert report.dropped == {
            "longer than max_length": 1,
            "longer than teacher_max_length with its teacher_prompt": 1,
        }
        dataset, report = build(section(path, max_length=60, teacher_max_length=200), tokenizer)
        assert len(dataset) == 2 and dataset.lengths.max() <= 60 < dataset.teacher_lengths.max() <= 200

    def test_left_truncation_removes_the_start(self, read, chat):
        """The teacher's prompt stays whole, unless turns are left that have labels."""
        row = chat("x" * 30, "1.", "y" * 30, "2.", teacher_prompt="z" * 30)
        options = dict(truncation_strategy="left", teacher_max_length=200)
        whole, _, everything = read(row, teacher_max_length=200)
        cut, _, teacher = read(row, max_length=len(whole.input_ids) - 10, **options)
        assert teacher == everything and len(cut.input_ids) == len(whole.input_ids) - 10
        both, student, teacher = read(row, max_length=len(whole.input_ids) - 10, loss_scale="default", **options)
        assert teacher == student.replace("y" * 30, "z" * 30) and len(labels_of(both)) > len(labels_of(cut))
        late, student, teacher = read(row, max_length=20, loss_scale="default", **options)
        assert teacher == everything and len(late.input_ids) == 20

    def test_right_truncation_removes_the_end(self, read, chat):
        row = chat("one?", "1.", "two?", "2" * 30, teacher_prompt="two: 2")
        options = dict(truncation_strategy="right", loss_scale="default", teacher_max_length=200)
        whole, *_ = read(row, teacher_max_length=200)
        cut, student, teacher = read(row, max_length=len(whole.input_ids) - 10, **options)
        assert teacher == student.replace("two?", "two: 2") and len(cut.input_ids) == len(whole.input_ids) - 10
        response_gone = len(whole.input_ids) - len(labels_of(whole))
        gone, student, teacher = read(row, max_length=response_gone, **options)
        assert gone.teacher_prompt is None and teacher == student


class TestTags:
    def test_the_key_is_configured(self, section, write_jsonl, chat, tokenizer):
        path = write_jsonl([chat("q", "a", subject="math"), chat("q", "b", subject="law")])
        dataset, _ = build(section(path), tokenizer, tag_key="subject")
        assert [dataset[index].tag for index in range(2)] == ["math", "law"]
        assert type(dataset[0].tag) is str
        assert build(section(path), tokenizer)[0][0].tag is None

    @pytest.mark.parametrize("tag", [None, ""])
    def test_a_row_without_a_tag(self, section, write_jsonl, chat, tokenizer, tag):
        path = write_jsonl([chat("q", "a", subject="math"), chat("q", "b", subject=tag)])
        with pytest.raises(RunStopped, match="line 2: no tag: a row needs subject, which selects its teacher"):
            build(section(path), tokenizer, tag_key="subject")

    def test_a_tag_is_text(self, section, write_jsonl, chat, tokenizer):
        with pytest.raises(RunStopped, match="wrong type: subject must be a string, but is a number"):
            build(section(write_jsonl([chat("q", "a", subject=3)])), tokenizer, tag_key="subject")
