import json
import os
import socket
import sys
from pathlib import Path
from types import MappingProxyType

import datasets
import numpy as np
import pytest
import torch.distributed as dist
from world import process_queue, start_process

from megatron_gkd.data import build as build_module
from megatron_gkd.data import tokenized_source
from megatron_gkd.data.build import build_dataset
from megatron_gkd.data.prompt import PromptLimits, extract_prompt, max_response_length
from megatron_gkd.data.report import DataReport
from megatron_gkd.data.sample import IGNORED_LABEL
from megatron_gkd.data.teacher_view import teacher_view
from megatron_gkd.data.tokenizing import RowOptions
from megatron_gkd.errors import RunStopped
from megatron_gkd.reporting import phases
from megatron_gkd.runtime.nodes import Nodes


def build(section, tokenizer, split="train"):
    return build_dataset(section, split, tokenizer)


@pytest.fixture
def texts(tokenizer):
    """The text of every sample of a dataset."""
    return lambda dataset: [tokenizer.decode(dataset[index].input_ids) for index in range(len(dataset))]


class TestSamples:
    def test_rows_become_samples(self, section, write_jsonl, chat, tokenizer, trained_text):
        tool_row = chat("add?", "yes", tools=[{"name": "add", "parameters": {"a": 1}}])
        other_tools = chat("sub?", "no", tools=[{"name": "sub", "parameters": [1, "b"]}])
        rows = [chat("q", "a"), tool_row, "", other_tools, {"prompt": "the question ", "response": "answer"}]
        dataset, report = build(section(write_jsonl(rows)), tokenizer)
        assert report == DataReport(rows_read=4, rows_used=4)
        assert [trained_text(tokenizer, dataset[index].labels) for index in range(4)] == [
            "a<|im_end|>",
            "yes<|im_end|>",
            "no<|im_end|>",
            "answer<|im_end|>",
        ]
        for index in range(4):
            sample = dataset[index]
            assert sample.input_ids.dtype == sample.labels.dtype == np.int64
            assert (sample.source, sample.row_id) == ("dataset", index)
            assert dataset.lengths[index] == len(sample.input_ids)
            assert dataset.num_labels[index] == sample.num_labels

    def test_sources_of_several_kinds_follow_one_another(self, section, write_jsonl, chat, tokenizer, tmp_path, texts):
        rows = [chat("q", str(index), tools=None if index else [{"name": "add"}]) for index in range(3)]
        table = datasets.Dataset.from_list(rows)
        table.to_parquet(tmp_path / "rows.parquet")
        table.save_to_disk(tmp_path / "saved")
        paths = [write_jsonl(rows), tmp_path / "rows.parquet", tmp_path / "saved"]
        dataset, report = build(section(*paths), tokenizer)
        assert dataset.sizes == [3, 3, 3]
        assert report.rows_used == len(dataset) == 9
        assert texts(dataset)[:3] == texts(dataset)[3:6] == texts(dataset)[6:]

    def test_workers_give_the_same_rows_and_line_numbers(
        self, section, write_jsonl, chat, tokenizer, texts, tmp_path, monkeypatch
    ):
        monkeypatch.setattr("megatron_gkd.data.shards.SHARD_ROWS", 4)
        path = write_jsonl([chat("q", str(index)) for index in range(20)] + ["{"])
        one, report = build(section(path, data_errors="skip"), tokenizer)
        options = dict(data_errors="skip", preprocessing_num_workers=2, dataset_cache_dir=str(tmp_path / "other"))
        two, parallel_report = build(section(path, **options), tokenizer)
        assert texts(one) == texts(two)
        assert report == parallel_report
        assert "line 21: not JSON" in report.first_bad_row

    def test_the_validation_split(self, section, write_jsonl, chat, tokenizer):
        data = section(write_jsonl([chat("q", "a")] * 2, "validation.jsonl"))
        data.val_dataset, data.dataset = data.dataset, []
        assert len(build(data, tokenizer, "validation")[0]) == 2
        with pytest.raises(RunStopped, match=r"data.dataset names no file"):
            build(data, tokenizer)

    def test_all_turns_and_template_arguments_come_from_the_recipe(
        self, section, write_jsonl, chat, tokenizers, trained_text
    ):
        data = section(write_jsonl([chat("q", "a", "q", "b")]), loss_scale="default")
        data.chat_template_kwargs = {"enable_thinking": False}
        dataset, _ = build(data, tokenizers["qwen3"])
        assert trained_text(tokenizers["qwen3"], dataset[0].labels) == "a<|im_end|>|b<|im_end|>"


class TestDroppedRows:
    def test_truncation_is_counted(self, section, write_jsonl, chat, tokenizer):
        path = write_jsonl([chat("q", "a"), chat("q" * 200, "a"), chat("q", "a" * 200)])
        sizes = {}
        for strategy in ("delete", "left", "right"):
            dataset, report = build(section(path, max_length=60, truncation_strategy=strategy), tokenizer)
            sizes[strategy] = (len(dataset), report.dropped)
            assert dataset.lengths.max() <= 60
            assert report.rows_read == 3
        assert sizes == {
            "delete": (1, {"longer than max_length": 2}),
            "left": (3, {}),
            "right": (2, {"no response token left": 1}),
        }

    def test_bad_rows_are_an_error_that_names_the_first(self, section, write_jsonl, chat, tokenizer):
        path = write_jsonl([chat("q", "a"), '{"messages": [}', chat("q"), {"prompt": 1}])
        with pytest.raises(RunStopped) as error:
            build(section(path), tokenizer)
        assert str(error.value) == (
            f"{path}, line 2: not JSON: Expecting value at column 15 (3 bad rows in all; data_errors: skip drops them)"
        )

    def test_bad_rows_can_be_skipped_and_are_counted(self, section, write_jsonl, chat, tokenizer):
        path = write_jsonl([chat("q", "a"), chat("q"), "{", chat("q"), {"prompt": "a", "response": ""}])
        dataset, report = build(section(path, data_errors="skip"), tokenizer)
        assert len(dataset) == 1
        assert report.summary() == (
            "1 of 5 rows used; dropped: 1 empty response, 2 no assistant turn, 1 not JSON "
            f"(first bad row: {path}, line 2: no assistant turn: the roles are: user; only distill.lmbda = 1, or "
            "data.prompt_only = on_policy_only, takes prompts alone)"
        )

    def test_prompts_alone_are_rows_where_options_allow_them(self, section, write_jsonl, chat, tokenizer):
        path = write_jsonl([chat("q", "a"), chat("q"), {"prompt": "p q"}])
        dataset, _ = build_dataset(section(path), "train", tokenizer, RowOptions(allows_prompts=True))
        answered, conversation, text = (dataset[index] for index in range(3))
        assert dataset.num_labels.tolist()[1:] == [0, 0]
        assert (
            extract_prompt(answered).tolist()
            == extract_prompt(conversation).tolist()
            == conversation.input_ids.tolist()
        )
        assert tokenizer.decode(text.input_ids) == "p q"
        with pytest.raises(RunStopped, match="no assistant turn"):  # and not from the cache
            build(section(path), tokenizer)

    def test_a_bad_row_of_a_table_is_named_by_its_number(self, section, tokenizer, tmp_path, chat):
        datasets.Dataset.from_list([chat("q", "a"), chat("q")]).to_parquet(tmp_path / "rows.parquet")
        with pytest.raises(RunStopped, match=r"rows.parquet, row 2: no assistant turn"):
            build(section(tmp_path / "rows.parquet"), tokenizer)

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            (["{"], "yields nothing to train on: 0 of 1 rows used; dropped: 1 not JSON"),
            ([], "yields nothing to train on: it has no rows"),
            (["", ""], "yields nothing to train on: 0 of 0 rows used"),
        ],
    )
    def test_a_source_without_usable_rows_is_an_error(self, section, write_jsonl, tokenizer, rows, message):
        path = write_jsonl(rows)
        with pytest.raises(RunStopped, match=f"^{path}: {message}"):
            build(section(path, data_errors="skip"), tokenizer)


class TestRoomForACompletion:
    """Rows that the student may answer: a prompt of n tokens, its last being n, and a response."""

    LIMITS = PromptLimits(student=12, teacher=8)

    def build(self, section, write_jsonl, tokenizer, strategy, rows):
        data = section(write_jsonl(rows), max_length=16, truncation_strategy=strategy)
        options = RowOptions(allows_prompts=True, prompt_limits=self.LIMITS)
        dataset, report = build_dataset(data, "train", tokenizer, options)
        for index in range(len(dataset)):
            assert 0 < max_response_length(dataset[index], 16, 16)
        return dataset, report

    def row(self, prompt, response=0, teacher_prompt=0):
        ids = {"prompt_token_ids": list(range(1, prompt + 1))}
        if response:
            ids["response_token_ids"] = list(range(101, 101 + response))
        if teacher_prompt:
            ids["teacher_prompt_token_ids"] = list(range(1, teacher_prompt + 1))
        return ids

    def test_delete_leaves_rows_out_that_fit_but_leave_no_room(self, section, write_jsonl, tokenizer):
        rows = [self.row(12), self.row(13), self.row(16), self.row(17), self.row(12, 4), self.row(13, 1)]
        dataset, report = self.build(section, write_jsonl, tokenizer, "delete", [*rows, self.row(12, 5)])
        assert dataset.lengths.tolist() == [12, 16]
        assert report == DataReport(7, 2, {"prompt longer than max_prompt_length": 4, "longer than max_length": 1})

    @pytest.mark.parametrize("strategy", ["left", "right"])
    def test_the_others_keep_the_end_of_the_prompt(self, section, write_jsonl, tokenizer, strategy):
        rows = [self.row(12), self.row(40), self.row(40, 2), self.row(40, 9)]
        dataset, report = self.build(section, write_jsonl, tokenizer, strategy, rows)
        assert report == DataReport(4, 4, shortened=3)
        assert report.summary() == "4 of 4 rows used; prompts shortened to max_prompt_length: 3"
        expected = [
            list(range(1, 13)),
            list(range(29, 41)),
            [*range(29, 41), 101, 102],
            [*range(29, 41), *range(101, 105)] if strategy == "right" else [*range(34, 41), *range(101, 110)],
        ]
        assert [dataset[index].input_ids.tolist() for index in range(4)] == expected
        assert extract_prompt(dataset[3]).tolist()[-1] == 40 and dataset.num_labels[3] == len(expected[3]) - (
            12 if strategy == "right" else 7
        )

    @pytest.mark.parametrize("strategy", ["delete", "left", "right"])
    def test_a_teachers_prompt_is_never_shortened(self, section, write_jsonl, tokenizer, strategy):
        rows = [self.row(3, 2, teacher_prompt=8), self.row(3, 2, teacher_prompt=9), self.row(3, 0, teacher_prompt=16)]
        dataset, report = self.build(section, write_jsonl, tokenizer, strategy, rows)
        assert report == DataReport(3, 1, {"teacher_prompt without room for a completion": 2})
        assert dataset[0].teacher_prompt.tolist() == list(range(1, 9))

    def test_turns_that_are_trained_on_keep_their_place_in_both_prompts(self, section, write_jsonl, chat, tokenizer):
        row = chat("x" * 30, "1.", "y" * 10, "2.", teacher_prompt="z" * 10)
        data = section(write_jsonl([row]), truncation_strategy="right", loss_scale="default")
        whole, _ = build(data, tokenizer)
        header = len(tokenizer("<|im_start|>user\n")["input_ids"])
        limit = len(extract_prompt(whole[0])) - 5
        limits = PromptLimits(limit, limit)
        dataset, _ = build_dataset(data, "train", tokenizer, RowOptions(prompt_limits=limits))
        for prompt in (extract_prompt, lambda sample: sample.teacher_prompt):
            before = prompt(whole[0]).tolist()
            assert prompt(dataset[0]).tolist() == before[:header] + before[header + 5 :]
        view = teacher_view(dataset[0])
        assert view.input_ids[view.label_positions + 1].tolist() == [
            label for label in dataset[0].labels.tolist() if label != IGNORED_LABEL
        ]

    def test_rows_without_prompt_limits_need_no_room(self, section, write_jsonl, tokenizer):
        data = section(write_jsonl([self.row(15, 1), self.row(3, 2, teacher_prompt=14)]), max_length=16)
        dataset, report = build(data, tokenizer)
        assert report == DataReport(2, 2) and dataset.lengths.tolist() == [16, 5]


PLUGIN = """
from megatron_gkd.data import register_preprocessor

@register_preprocessor("{name}")
def preprocess(row):
    if row["x"] == 0:
        return None
    return {{"prompt": "the question ", "response": str({one} // (row["x"] - 1))}}
"""


class TestPreprocessor:
    @pytest.mark.parametrize("workers", [1, 2])
    def test_it_changes_and_drops_rows(
        self, section, write_jsonl, tokenizer, tmp_path, trained_text, workers, monkeypatch
    ):
        monkeypatch.setattr("megatron_gkd.data.shards.SHARD_ROWS", 2)
        plugin = tmp_path / "plugin.py"
        plugin.write_text(PLUGIN.format(name=f"with_{workers}_workers", one=1))
        options = dict(preprocessor=f"with_{workers}_workers", external_plugins=[str(plugin)], data_errors="skip")
        path = write_jsonl([{"x": 0}, {"x": 1}, {"x": 2}])
        dataset, report = build(section(path, preprocessing_num_workers=workers, **options), tokenizer)
        assert trained_text(tokenizer, dataset[0].labels) == "1<|im_end|>"
        assert report.dropped == {"dropped by the preprocessor": 1, "preprocessor failed": 1}
        assert report.first_bad_row == (
            f"{path}, line 2: preprocessor failed: 'with_{workers}_workers' raised ZeroDivisionError: "
            "integer division or modulo by zero"
        )

    def test_an_unknown_one_is_an_error(self, section, write_jsonl, chat, tokenizer):
        with pytest.raises(RunStopped, match="preprocessor 'nobody' is not registered"):
            build(section(write_jsonl([chat("q", "a")]), preprocessor="nobody"), tokenizer)


class TestCache:
    def folders(self, section):
        return sorted(path.name for path in Path(section.dataset_cache_dir).iterdir())

    def test_a_second_run_reads_no_source(self, section, write_jsonl, chat, tokenizer, texts, monkeypatch):
        data = section(write_jsonl([chat("q", "a")]))
        first, report = build(data, tokenizer)
        monkeypatch.setattr("megatron_gkd.data.tokenized_source.open_source", None)
        second, second_report = build(data, tokenizer)
        assert texts(first) == texts(second)
        assert report == second_report

    def test_it_holds_the_rows_and_nothing_else(self, section, write_jsonl, chat, tokenizer):
        data = section(write_jsonl([chat("q", "a")]))
        build(data, tokenizer)
        (key,) = self.folders(data)
        assert sorted(path.name for path in (Path(data.dataset_cache_dir) / key).iterdir()) == ["report.json", "rows"]

    def test_whatever_changes_the_rows_changes_the_key(self, section, write_jsonl, chat, tokenizers, tmp_path):
        path = write_jsonl([chat("q", "a")])
        plugin = tmp_path / "plugin.py"
        plugin.write_text("")
        data = section(path, external_plugins=[str(plugin)])
        build(data, tokenizers["chatml"])
        build(data, tokenizers["qwen3"])
        for name, value in dict(
            max_length=255,
            truncation_strategy="left",
            loss_scale="default",
            data_errors="skip",
            chat_template_kwargs={"enable_thinking": False},
        ).items():
            setattr(data, name, value)
            build(data, tokenizers["chatml"])
        plugin.write_text("# changed")
        build(data, tokenizers["chatml"])
        os.utime(path, (1, 1))
        build(data, tokenizers["chatml"])
        write_jsonl([chat("q", "another")])
        dataset, _ = build(data, tokenizers["chatml"])
        assert len(self.folders(data)) == 10
        assert "another" in tokenizers["chatml"].decode(dataset[0].input_ids)

    def test_other_changes_do_not_change_the_key(self, section, write_jsonl, chat, tokenizer):
        data = section(write_jsonl([chat("q", "a")]))
        build(data, tokenizer)
        data.preprocessing_num_workers = 2
        data.packing = True
        data.dataset[0].weight = 0.5
        build(data, tokenizer)
        assert len(self.folders(data)) == 1

    def test_a_slow_tokenizer_is_refused(self, section, write_jsonl, chat):
        class Slow:
            is_fast = False

        with pytest.raises(RunStopped, match="tokenizer Slow: a fast tokenizer"):
            build(section(write_jsonl([chat("q", "a")])), Slow())


def _no_space(*arguments, **options):
    raise OSError("disk full")


def _rank(rank, store, results, data, tokenizer, is_leader, fails):
    build_module.VISIBLE_WITHIN_S = 0.2
    phases.LINE_EVERY_S, phases.ANNOUNCE_AFTER_S = 0, 1000  # progress alone
    sys.stdout = Path(store).with_name(f"printed{rank}").open("w")
    if fails:
        tokenized_source.open_source = _no_space
    nodes = Nodes(dist.FileStore(store, 2), rank, 2, is_leader=is_leader)
    try:
        dataset, report = build_dataset(data, "train", tokenizer, nodes=nodes)
        results.put((rank, [dataset[i].input_ids.tolist() for i in range(len(dataset))], report.summary()))
    except Exception as error:
        results.put((rank, type(error).__name__, str(error)))


def _run(tmp_path, tokenizer, sections, leaders, *, fails=False):
    """Return what each rank has: its rows and its report, or the error's type and text."""
    results, store = process_queue(), str(tmp_path / f"store.{os.urandom(4).hex()}")
    processes = [
        start_process(_rank, rank, store, results, section, tokenizer, rank in leaders, fails)
        for rank, section in enumerate(sections)
    ]
    answers = sorted(results.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
    return [answer[1:] for answer in answers]


class TestTwoProcesses:
    @pytest.fixture
    def run(self, tmp_path, tokenizer):
        return lambda data, **options: _run(tmp_path, tokenizer, [data, data], leaders=[0], **options)

    def test_one_rank_builds_and_both_read_the_same(self, run, section, write_jsonl, chat):
        first, second = run(section(write_jsonl([chat("q", "a"), chat("q", "b")])))
        assert first == second
        assert len(first[0]) == 2

    def test_a_bad_row_is_the_same_error_in_both(self, run, section, write_jsonl, chat):
        path = write_jsonl([chat("q", "a"), "{"])
        first, second = run(section(path))
        assert first == second
        assert first[0] == "RunStopped"
        assert first[1].startswith(f"{path}, line 2: not JSON")

    def test_any_other_failure_stops_both(self, run, section, write_jsonl, chat):
        first, second = run(section(write_jsonl([chat("q", "a")])), fails=True)
        assert first == ("OSError", "disk full")
        assert second == ("RunStopped", "OSError: disk full")

    def test_a_cache_that_ranks_of_one_node_do_not_share_is_named(
        self, tmp_path, section, write_jsonl, chat, tokenizer
    ):
        path = write_jsonl([chat("q", "a")])
        sections = [section(path, dataset_cache_dir=str(tmp_path / f"cache{rank}")) for rank in range(2)]
        first, second = _run(tmp_path, tokenizer, sections, leaders=[0])
        assert first[0] == second[0] == "RunStopped"
        assert "cache1: " in second[1] and "name a folder that all ranks of a node see" in second[1]
        assert first[1].endswith(second[1])


class TestTwoNodes:
    """Two ranks, each with a cache and a copy of the file of its own, whose times of change differ."""

    @pytest.fixture
    def run(self, tmp_path, section, write_jsonl, tokenizer):
        def run(*rows_of_node, shared=False, paths=("node0.jsonl", "node1.jsonl")):
            sections = []
            for node, rows in enumerate(rows_of_node):
                path = write_jsonl(rows, paths[node]) if rows else tmp_path / paths[node]
                if rows:
                    os.utime(path, (node + 1, node + 1))
                sections.append(section(path, dataset_cache_dir=str(tmp_path / f"cache{0 if shared else node}")))
            return _run(tmp_path, tokenizer, sections, leaders=[0, 1])

        return run

    def keys(self, tmp_path, node):
        return [path.name for path in (tmp_path / f"cache{node}").iterdir()]

    def test_each_builds_its_own_under_the_key_of_rank_0(self, run, chat, tmp_path):
        rows = [chat("q", "a"), chat("q", "b")]
        first, second = run(rows, rows)
        assert first == second and len(first[0]) == 2
        assert self.keys(tmp_path, 0) == self.keys(tmp_path, 1) and len(self.keys(tmp_path, 0)) == 1
        first, second = run(rows, rows)  # from the caches
        assert first == second and len(first[0]) == 2

    def test_rank_0_alone_shows_its_progress(self, run, chat, tmp_path):
        rows = [chat("q", "a"), chat("q", "b")]
        first, second = run(rows, rows)
        assert first == second and len(first[0]) == 2, "each has built its own"
        first, second = ((tmp_path / f"printed{rank}").read_text().splitlines() for rank in range(2))
        assert [line.partition(" rows")[0] for line in first] == [
            "Tokenizing node0.jsonl: 0 of 2",
            "Tokenizing node0.jsonl: 2 of 2",
        ]
        assert second == []

    def test_the_second_builds_nothing_where_they_share_the_cache(self, run, chat, tmp_path):
        first, second = run([chat("q", "a")], None, shared=True)  # it has not even the file
        assert first == second and len(first[0]) == 1

    def test_different_rows_are_an_error_that_names_file_and_node(self, run, chat, tmp_path):
        first, second = run([chat("q", "a")], [chat("q", "b")])
        assert first[0] == second[0] == "RunStopped"
        assert f"rank 1 on {socket.gethostname()}: {tmp_path}/node1.jsonl: gives other rows on this node" in first[1]
        assert "\n" not in first[1] and first[1].endswith(second[1])
        assert self.keys(tmp_path, 1) == [], "wrong rows would be found by the next start"

    def test_a_missing_file_is_an_error_that_names_the_node(self, run, chat, tmp_path):
        first, second = run([chat("q", "a")], None)
        problem = f"rank 1 on {socket.gethostname()}: {tmp_path}/node1.jsonl: no such file or folder"
        assert first == second == ("RunStopped", problem)

    def test_an_old_cache_of_different_rows_is_an_error(self, run, chat, tmp_path):
        run([chat("q", "a")], [chat("q", "a")])
        (key,) = self.keys(tmp_path, 1)
        report = tmp_path / "cache1" / key / "report.json"
        stored = json.loads(report.read_text())
        report.write_text(json.dumps(stored | {"digest": "0"}))
        first, second = run([chat("q", "a")], [chat("q", "a")])
        assert second[1].endswith(f"Remove {tmp_path}/cache1/{key} on this node before the next start")
        assert first[0] == "RunStopped"


class TestRowsOfTokenIds:
    ROW = MappingProxyType(
        {"prompt_token_ids": [5, 6, 7], "response_token_ids": [8, 9], "prompt": "text", "response": "other text"}
    )

    def test_token_ids_are_used_unchanged(self, section, write_jsonl, chat, tokenizer):
        with_view = {**self.ROW, "teacher_prompt_token_ids": [4, 5, 6, 7]}
        rows = [dict(self.ROW), chat("q", "a"), with_view, {**self.ROW, "masked": True}]
        dataset, report = build(section(write_jsonl(rows)), tokenizer)
        assert report == DataReport(rows_read=4, rows_used=3, dropped={"masked": 1})
        assert dataset[0].input_ids.tolist() == [5, 6, 7, 8, 9]
        assert dataset[0].labels.tolist() == [IGNORED_LABEL, IGNORED_LABEL, 8, 9, IGNORED_LABEL]
        assert dataset[0].teacher_prompt is None and dataset[2].teacher_prompt.tolist() == [4, 5, 6, 7]

    def test_ids_of_another_vocabulary_are_refused(self, section, write_jsonl, tokenizer):
        path = write_jsonl([{**self.ROW, "response_token_ids": [8, 200_000]}])
        with pytest.raises(RunStopped, match=f"foreign token id: 200000 is .* 0 to {len(tokenizer) - 1}"):
            build(section(path), tokenizer)
        dataset, _ = build_dataset(section(path), "train", tokenizer, RowOptions(vocab_size=200_001))
        assert dataset[0].input_ids.tolist() == [5, 6, 7, 8, 200_000]
