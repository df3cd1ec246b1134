"""Rows of streams as samples: the same as tokenized ones, whoever tokenizes them and wherever a run begins."""

from __future__ import annotations

import gzip
import json
import shutil
from dataclasses import replace
from itertools import chain

import datasets
import numpy as np
import pytest
from batching import ONE_RANK

from megatron_gkd.data.build import build_dataset
from megatron_gkd.data.loader import StepLoader
from megatron_gkd.data.order import SampleOrder
from megatron_gkd.data.report import DataReport
from megatron_gkd.data.streams.opening import Streams
from megatron_gkd.data.streams.streamed_rows import StreamedRows, StreamProgress
from megatron_gkd.data.tokenizing import RowOptions
from megatron_gkd.errors import UserError

BATCH = 8


@pytest.fixture
def open_rows(section, tokenizer):
    """`open_rows(path, ..., progress=, options=, find_problem=, weights=, **section)`: rows from a progress on."""
    opened = []

    def open_(*paths, progress=None, options=None, find_problem=lambda row: None, weights=None, more=(), **keys):
        data = section(*paths, **keys)
        for entry, weight in zip(data.dataset, weights or [], strict=bool(weights)):
            entry.weight = weight
        streams = Streams.open(data, tokenizer, options or RowOptions())
        progress = progress or StreamProgress(streams.start())
        progress = StreamProgress.from_values(json.loads(json.dumps(progress.values())))
        feed = streams.feed(progress.state, seed=3, rows_ahead=2 * BATCH, find_problem=find_problem)
        opened.append(feed)
        return StreamedRows(feed, BATCH, progress, run_on_main=lambda work: work(), **dict(more))

    yield open_
    for feed in opened:
        feed.close()


def tokens_of(rows, steps):
    return [[rows[row].input_ids.tolist() for row in rows.rows_of_step(step, BATCH)] for step in steps]


@pytest.fixture
def rows_50(chat):
    """Rows of different lengths; every seventh is too long for 60 tokens, some lines are blank."""
    rows = [chat(f"q{index}", "a" * (80 if index % 7 == 3 else 3 + index % 9)) for index in range(50)]
    return [rows[0], "", *rows[1:20], "", "", *rows[20:]]


@pytest.mark.parametrize("workers", [0, 2])
def test_steps_are_those_of_tokenized_rows(open_rows, section, write_jsonl, rows_50, tokenizer, workers):
    path = write_jsonl(rows_50)
    dataset, _ = build_dataset(section(path, max_length=60), "train", tokenizer)
    order = SampleOrder(dataset.sizes, [1.0], 0, shuffle=False)
    streamed = open_rows(path, max_length=60, shuffle=False, dataloader_num_workers=workers)
    config = replace(ONE_RANK, global_batch_size=BATCH, max_length=60, packing=True)
    steps = range(1, 14)  # more than two passes
    expected = list(StepLoader(dataset, order, config, steps))
    assert len(dataset) == 43
    for step, (ours, theirs) in enumerate(zip(StepLoader(streamed, streamed, config, steps), expected, strict=True)):
        assert [one.input_ids.tolist() for one in ours] == [one.input_ids.tolist() for one in theirs]
        assert [one.labels.tolist() for one in ours] == [one.labels.tolist() for one in theirs]
        ids = [sample.row_id for one in ours for sample in one.samples]
        assert sorted(ids) == list(range(step * BATCH, (step + 1) * BATCH))


def test_long_text_becomes_several_rows(open_rows, section, write_jsonl, tokenizer):
    path = write_jsonl([{"prompt": "", "response": f"the answer {index} " * 20} for index in range(5)])
    keys = dict(max_length=16, truncation_strategy="split", shuffle=False)
    dataset, _ = build_dataset(section(path, **keys), "train", tokenizer)
    rows = [dataset[index % len(dataset)].input_ids.tolist() for index in range(6 * BATCH)]
    assert len(dataset) > 10
    assert [*chain(*tokens_of(open_rows(path, **keys), range(1, 7)))] == rows
    whole = open_rows(path, **keys)
    tokens_of(whole, [1, 2])
    resumed = open_rows(path, progress=whole.progress(2), **keys)
    assert [*chain(*tokens_of(resumed, range(3, 7)))] == rows[2 * BATCH :]


def test_every_kind_of_source_gives_its_rows(open_rows, chat, write_jsonl, tmp_path, tokenizer):
    rows = [chat(f"q{index}", str(index), tools=None if index else [{"name": "add"}]) for index in range(BATCH)]
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(tmp_path / "rows.parquet")
    table.save_to_disk(tmp_path / "saved")
    (tmp_path / "list.json").write_text(json.dumps(rows))
    hub = tmp_path / "hub"
    (hub / "main").mkdir(parents=True)
    (hub / "README.md").write_text("---\nconfigs:\n- {config_name: main, data_files: main/train.parquet}\n---\n")
    shutil.copy(tmp_path / "rows.parquet", hub / "main/train.parquet")
    lines = write_jsonl(rows).read_bytes().splitlines(keepends=True)
    with gzip.open(tmp_path / "part-0.jsonl.gz", "wb") as file:
        file.writelines(lines[:3])
    (tmp_path / "part-1.jsonl").write_bytes(b"".join(lines[3:]))
    names = ["train.jsonl", "list.json", "rows.parquet", "saved", "hub", "hub:main:train", "part-*"]
    one, *others = [tokens_of(open_rows(tmp_path / name, shuffle=False), [1, 2]) for name in names]
    assert len({json.dumps(row) for row in one[0]}) == BATCH
    assert others == [one] * 6
    (tmp_path / "part-1.jsonl").write_bytes(b"".join(lines[3:5]) + b"{")
    with pytest.raises(UserError, match=r"part-1\.jsonl, line 3: not JSON"):
        tokens_of(open_rows(tmp_path / "part-*", shuffle=False), [1])
    text = "question,answer\n" + "".join(f"q{index},{index}\n" for index in range(BATCH))
    (tmp_path / "rows.csv").write_text(text)
    table = open_rows(tmp_path / "rows.csv", shuffle=False, columns={"question": "prompt", "answer": "response"})
    assert [tokenizer.decode(row) for row in tokens_of(table, [2])[0]] == [
        f"q{index}{index}<|im_end|>" for index in range(BATCH)
    ]


@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 0)])
@pytest.mark.parametrize("step", [1, 4, 9])
def test_a_resumed_run_goes_on_with_the_same_rows(open_rows, write_jsonl, rows_50, chat, step, before, after):
    other = write_jsonl([chat("other", str(index)) for index in range(11)], "other.jsonl")
    options = dict(max_length=60, shuffle_buffer_size=12, weights=[2.0, 0.5])
    path = write_jsonl(rows_50)
    whole = open_rows(path, other, dataloader_num_workers=before, **options)
    tokens_of(whole, range(1, step + 3))  # reads ahead of the step that is saved
    progress = whole.progress(step)
    expected = tokens_of(whole, range(step + 1, step + 6))
    resumed = open_rows(path, other, progress=progress, dataloader_num_workers=after, **options)
    assert resumed.progress(step) == progress
    assert tokens_of(resumed, range(step + 1, step + 6)) == expected
    assert whole.progress(step + 5) == resumed.progress(step + 5)


def test_rows_have_the_numbers_of_their_positions(open_rows, write_jsonl, chat):
    rows = open_rows(write_jsonl([chat("q", "a" * (1 + index)) for index in range(20)]), shuffle=False)
    assert rows.rows_of_step(2, BATCH) == list(range(8, 16))
    sample = rows[9]
    assert (sample.row_id, rows.lengths[9]) == (9, len(sample.input_ids))
    assert rows.num_labels[np.int64(9)] == sample.num_labels > 0
    assert rows.num_patches[9] == 0
    assert rows.rows_of_step(1, BATCH) == list(range(8))
    rows.rows_of_step(9, BATCH)
    with pytest.raises(ValueError, match="rows of step 2 are gone; the oldest is row 24"):
        rows.rows_of_step(2, BATCH)


class Repeated:
    """Generations of three steps. The first rows of a generation are those of its third step."""

    def rows_of_step(self, step, batch):
        generation, place = divmod(step - 1, 3)
        first = generation * (2 * batch + 3) + (0 if place == 2 else 3 + place * batch)
        return list(range(first, first + batch))


@pytest.mark.parametrize("step", range(1, 7))
def test_a_run_goes_on_in_the_middle_of_a_generation(open_rows, write_jsonl, rows_50, step):
    options = dict(max_length=60, more=dict(order=Repeated(), steps_per_generation=3))
    path = write_jsonl(rows_50)
    whole = open_rows(path, **options)
    tokens_of(whole, range(1, step + 1))
    progress = whole.progress(step)
    expected = tokens_of(whole, range(step + 1, step + 9))
    resumed = open_rows(path, progress=progress, **options)
    assert tokens_of(resumed, range(step + 1, step + 9)) == expected


class TestBadRows:
    def test_a_bad_row_ends_the_run_when_it_is_drawn(self, open_rows, write_jsonl, chat):
        path = write_jsonl([*[chat("q", "a")] * 12, "{", *[chat("q", "a")] * 9])
        for workers in (0, 2):
            rows = open_rows(path, shuffle=False, dataloader_num_workers=workers)
            rows.rows_of_step(1, BATCH)
            saved = rows.progress(1)
            with pytest.raises(UserError) as raised:
                rows.rows_of_step(2, BATCH)
            assert str(raised.value) == (
                f"{path}, line 13: not JSON: Expecting property name enclosed in double quotes at column 2 "
                "(data_errors: skip drops such rows)"
            )
            assert rows.progress(1) == saved

    def test_skipped_rows_take_no_position_and_are_counted(self, open_rows, write_jsonl, chat):
        path = write_jsonl([*[chat("q", "a")] * 5, "{", "", chat("q", "a" * 500), *[chat("q", "a")] * 9])
        rows = open_rows(path, shuffle=False, data_errors="skip")
        assert len({json.dumps(row) for row in tokens_of(rows, [1])[0]}) == 1
        bad = f"{path}, line 6: not JSON: Expecting property name enclosed in double quotes at column 2"
        dropped = {"longer than max_length": 1, "not JSON": 1}
        assert rows.feed.report() == DataReport(10, 8, dropped, first_bad_row=bad)

    def test_counts_are_those_of_each_source(self, section, write_jsonl, chat, tokenizer):
        long = write_jsonl([{"prompt": "", "response": "a" * 30}] * 2, "long.jsonl")
        path = write_jsonl([chat("q", "a"), chat("<|im_end|>", "a")])
        data = section(long, path, max_length=20, truncation_strategy="split", shuffle=False)
        seen = []
        streams = Streams.open(data, tokenizer, RowOptions())
        feed = streams.feed(streams.start(), seed=0, rows_ahead=0, on_first=lambda *first: seen.append(first))
        rows = [feed.take(1)[0] for _ in range(6)]
        assert [row.is_piece for row in rows if row.source == 0] in ([False, True, False], [False, True, False, True])
        report = feed.report()
        assert report.rows_used + report.pieces == 6 and report.pieces in (1, 2)
        assert report.first_special == f"{path}, line 2: <|im_end|> in the content of role user"
        assert report.describe_forms() == [f"{long}: 2 prompt + response (plain text)", f"{path}: 2 messages"]
        ((first, counts),) = seen
        assert first == rows[:1] and counts.rows_used == 1

    def test_a_source_of_which_no_row_is_used_ends_the_run(self, open_rows, write_jsonl, chat):
        good = write_jsonl([chat("q", "a")])
        path = write_jsonl([chat("q", "a" * 500)] * 3, "long.jsonl")
        with pytest.raises(UserError, match=r"long\.jsonl: yields nothing to train on: none of its rows is used; "):
            tokens_of(open_rows(good, path), range(1, 9))

    def test_a_row_that_the_run_cannot_use_is_named_by_its_place(self, open_rows, write_jsonl, chat):
        path = write_jsonl([chat("q", str(index)) for index in range(20)])
        rows = open_rows(path, shuffle=False, find_problem=lambda row: "has no tag" if row.index == 9 else None)
        rows.rows_of_step(1, BATCH)
        with pytest.raises(UserError, match=r"train\.jsonl, line 10: has no tag"):
            rows.rows_of_step(2, BATCH)

    def test_a_killed_worker_ends_the_run_in_one_line(self, open_rows, write_jsonl, chat, tmp_path):
        plugin = tmp_path / "plugin.py"
        plugin.write_text(
            "import os, signal\nfrom megatron_gkd.data import register_preprocessor\n"
            '@register_preprocessor("killed")\n'
            "def killed(row):\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        rows = open_rows(
            write_jsonl([chat("q", "a")] * 3),
            dataloader_num_workers=1,
            preprocessor="killed",
            external_plugins=[str(plugin)],
        )
        with pytest.raises(UserError, match=r"data\.dataloader_num_workers = 1: a process that tokenizes was killed"):
            rows.rows_of_step(1, BATCH)


def test_sources_are_the_same_where_their_content_is(write_jsonl, chat, section, tokenizer):
    def identity(path):
        return Streams.open(section(path), tokenizer, RowOptions()).sources[0].identity

    plugin = write_jsonl(["x = 1"], "plugin.py")
    options = dict(external_plugins=[str(plugin)], columns={"a": "b"})
    one = write_jsonl([chat("q", "a")])
    before = Streams.open(section(one, **options), tokenizer, RowOptions()).preparation()
    plugin.write_text("x = 2")
    after = Streams.open(section(one, **options), tokenizer, RowOptions()).preparation()
    assert [key for key in before if before[key] != after[key]] == ["data.external_plugins (hash of each)"]
    assert before["data.columns (of each source)"] == [{"a": "b"}]
    assert identity(one) == identity(write_jsonl([chat("q", "a")], "copy.jsonl"))
    assert identity(one) != identity(write_jsonl([chat("q", "b")], "other.jsonl"))
