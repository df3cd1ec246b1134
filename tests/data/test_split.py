"""truncation_strategy: split, which makes several sequences of a long plain text."""

import numpy as np
import pytest

from megatron_gkd.data.build import build_dataset
from megatron_gkd.data.sample import IGNORED_LABEL
from megatron_gkd.errors import RunStopped
from megatron_gkd.teachers.cache.keys import row_keys

TEXT = "the question and the answer is a tool " * 9


def whole_ids(tokenizer, row):
    return [*tokenizer.encode(row["prompt"]), *tokenizer.encode(row["response"]), tokenizer.eos_token_id]


@pytest.fixture
def read(section, write_jsonl, tokenizer):
    def run(rows, max_length=16, **options):
        options = {"truncation_strategy": "split"} | options
        return build_dataset(section(write_jsonl(rows), max_length=max_length, **options), "train", tokenizer)

    return run


@pytest.mark.parametrize("max_length", [2, 3, 16, 1000])
@pytest.mark.parametrize("prompt", ["", "the system "])
@pytest.mark.parametrize("loss_scale", ["last_round", "all"])
def test_each_label_is_in_one_piece(read, tokenizer, max_length, prompt, loss_scale):
    row = {"prompt": prompt, "response": TEXT}
    dataset, report = read([row], max_length, loss_scale=loss_scale)
    samples = [dataset[index] for index in range(len(dataset))]
    ids = whole_ids(tokenizer, row)
    start = len(tokenizer.encode(prompt)) if loss_scale == "last_round" else 0
    labels = [label for sample in samples for label in sample.labels.tolist() if label != IGNORED_LABEL]
    assert labels == ids[max(start, 1) :]
    for sample in samples:
        assert len(sample.input_ids) <= max_length and sample.label_weights is None
        assert [sample.input_ids[at + 1] for at in sample.label_positions] == sample.labels[
            sample.label_positions
        ].tolist()
    assert (report.rows_read, report.rows_used, report.pieces) == (1, 1, len(samples) - 1)
    assert len(samples) > 1 or max_length == 1000
    assert len(set(row_keys(samples).tolist())) == len({sample.input_ids.tobytes() for sample in samples})


def test_pieces_of_the_prompt_alone_are_left_out(read, tokenizer):
    row = {"prompt": TEXT, "response": " user"}
    (sample,) = read([row])[0]
    expected = [*tokenizer.encode(" user"), tokenizer.eos_token_id]
    assert sample.labels[sample.label_positions].tolist() == expected


def test_counts_and_places_are_of_rows(read, chat):
    rows = [{"prompt": "q", "response": TEXT}] * 3 + [chat("q", "a"), chat("q", "a" * 99)]
    dataset, report = read(rows, data_errors="skip")
    assert (report.rows_read, report.rows_used) == (5, 4) and report.pieces == len(dataset) - 4 > 0
    assert report.summary().startswith(f"4 of 5 rows used, as {len(dataset)} sequences; dropped: 1 cannot be split")
    assert "train.jsonl, line 5: cannot be split: it has" in report.first_bad_row


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "response": TEXT, "teacher_prompt": "p"},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": TEXT}]},
        {"prompt_token_ids": [5], "response_token_ids": [6] * 40},
    ],
)
def test_other_long_rows_are_bad(read, row):
    message = (
        "line 1: cannot be split: it has [0-9]+ tokens, above max_length = 16; of such rows truncation_strategy: split"
    )
    with pytest.raises(RunStopped, match=message):
        read([row])


def test_text_for_pre_training(read, tokenizer):
    dataset, _ = read([{"messages": [{"role": "assistant", "content": TEXT}]}], loss_scale="all")
    labels = np.concatenate([dataset[index].labels for index in range(len(dataset))])
    assert labels[labels != IGNORED_LABEL].tolist() == whole_ids(tokenizer, {"prompt": "", "response": TEXT})[1:]
