"""A build that is killed goes on where it was, and gives the same rows as one that is not."""

import os
import re
import signal
import time
from pathlib import Path

import pytest
from world import start_process

from megatron_gkd.data import shards
from megatron_gkd.data.build import build_dataset
from megatron_gkd.errors import RunStopped
from megatron_gkd.reporting import phases

COUNT, SHARD_ROWS = 40, 4
PLUGIN = """
import os, signal, time
from pathlib import Path
from megatron_gkd.data import register_preprocessor

FOLDER = Path({folder!r})

@register_preprocessor({name!r})
def log(row):
    with open(FOLDER / "rows.log", "a") as file:
        file.write(f"{{row['x']}}\\n")
    if row["x"] == {at} and not (FOLDER / "reached").exists():
        (FOLDER / "reached").touch()
        {then}
    if row["x"] % 9 == 4:
        return None
    return {{"prompt": "p ", "response": "r" * (1 + row["x"] % 5)}}
"""
DIE = "os.kill(os.getpid(), signal.SIGKILL)"


def _build(section, tokenizer):
    shards.SHARD_ROWS = SHARD_ROWS
    build_dataset(section, "train", tokenizer)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(shards, "SHARD_ROWS", SHARD_ROWS)


@pytest.fixture
def data(section, write_jsonl, tmp_path):
    """`data(then, workers)`: rows whose preprocessor does `then` at row 21, for the first time."""

    def make(then, workers=1, at=21):
        plugin = tmp_path / "plugin.py"
        name = f"log_{os.urandom(8).hex()}"
        plugin.write_text(PLUGIN.format(folder=str(tmp_path), name=name, at=at, then=then))
        path = write_jsonl([{"x": index} for index in range(COUNT)])
        options = dict(preprocessor=name, external_plugins=[str(plugin)], preprocessing_num_workers=workers)
        return section(path, **options)

    return make


def processed(tmp_path):
    """The rows that were tokenized since the last call."""
    log = tmp_path / "rows.log"
    rows = [int(line) for line in log.read_text().splitlines()]
    log.unlink()
    return rows


def contents(dataset):
    return [(dataset[row].input_ids.tolist(), dataset[row].labels.tolist()) for row in range(len(dataset))]


def run(section, tokenizer):
    """Build in another process; returns its exit code."""
    process = start_process(_build, section, tokenizer)
    process.join(timeout=60)
    return process.exitcode


def test_a_killed_build_goes_on_with_the_shards_that_it_lacks(data, tokenizer, tmp_path):
    section = data(DIE)
    assert run(section, tokenizer) == -signal.SIGKILL
    assert processed(tmp_path) == list(range(22))
    dataset, report = build_dataset(section, "train", tokenizer)
    assert processed(tmp_path) == list(range(20, COUNT))
    other = _elsewhere(section, tmp_path)
    whole, whole_report = build_dataset(other, "train", tokenizer)
    assert contents(dataset) == contents(whole) and len(dataset) == 36
    assert report == whole_report and report.dropped == {"dropped by the preprocessor": 4}
    ((report,), (whole_report,)) = (list(Path(one.dataset_cache_dir).glob("*/report.json")) for one in (section, other))
    assert report.read_text() == whole_report.read_text()
    assert not list(Path(section.dataset_cache_dir).glob("*.unfinished"))


def _elsewhere(section, tmp_path):
    return type(section)(**{**vars(section), "dataset_cache_dir": str(tmp_path / "elsewhere")})


def test_a_killed_worker_is_one_line_and_costs_unfinished_shards_only(data, tokenizer, tmp_path):
    section = data("time.sleep(0.5); " + DIE, workers=2)
    with pytest.raises(RunStopped, match=r"^data.preprocessing_num_workers = 2: a process that tokenizes was killed"):
        build_dataset(section, "train", tokenizer)
    finished = {int(file.stem) for file in Path(section.dataset_cache_dir).glob("*.unfinished/parts/*.json")}
    assert {0, 1, 2, 3, 4} <= finished and 5 not in finished
    processed(tmp_path)
    dataset, _ = build_dataset(section, "train", tokenizer)
    assert {row // 4 for row in processed(tmp_path)}.isdisjoint(finished)
    assert contents(dataset) == contents(build_dataset(_elsewhere(section, tmp_path), "train", tokenizer)[0])


def test_workers_end_with_the_process_that_started_them(data, tokenizer, tmp_path):
    section = data("(FOLDER / 'pids').write_text(f'{os.getpid()} {os.getppid()}'); time.sleep(60)", workers=2)
    process = start_process(_build, section, tokenizer)
    worker, parent = _wait_for(lambda: (tmp_path / "pids").read_text().split())
    assert int(parent) == process.pid
    process.kill()
    process.join()
    _wait_for(lambda: not _is_alive(int(worker)))


def _wait_for(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if found := condition():
                return found
        except FileNotFoundError:
            pass
        time.sleep(0.05)
    raise TimeoutError


def _is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_bad_rows_of_all_shards_are_counted_and_nothing_is_kept(data, tokenizer, tmp_path):
    section = data("pass")
    section.preprocessor, section.external_plugins = None, []
    with pytest.raises(RunStopped, match=r"line 1: no messages.* \(40 bad rows in all; data_errors: skip drops them"):
        build_dataset(section, "train", tokenizer)
    assert not list(Path(section.dataset_cache_dir).iterdir())


@pytest.mark.parametrize(("rows", "count"), [(1, 1), (4, 1), (5, 2), (4 * 256, 256), (4 * 256 + 1, 205), (10**6, 256)])
def test_there_are_never_more_shards_than_may_be_open_together(rows, count):
    writer = shards.ShardWriter(range(rows), None, None)
    assert writer.count == count


def test_by_default_every_core_works(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(7)), raising=False)
    assert shards.default_workers() == 7
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(300)), raising=False)
    assert shards.default_workers() == 16


def test_few_rows_start_no_process(section, write_jsonl, chat, tokenizer, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_ROWS", 2048)
    monkeypatch.setattr(shards, "ProcessPoolExecutor", None)
    data = section(write_jsonl([chat("q", "a")] * 100), preprocessing_num_workers=None)
    assert len(build_dataset(data, "train", tokenizer)[0]) == 100


@pytest.mark.parametrize("workers", [1, 2])
def test_progress_counts_rows_shard_by_shard(data, tokenizer, tmp_path, workers, monkeypatch, capsys):
    """A build that is continued begins with what is finished."""
    monkeypatch.setattr(phases, "LINE_EVERY_S", 0)
    section = data(DIE)
    run(section, tokenizer)
    capsys.readouterr()
    section.preprocessing_num_workers = workers
    build_dataset(section, "train", tokenizer)
    name = Path(section.dataset[0].path).name
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(f"Tokenizing {name}: ")]
    counts = [line.removeprefix(f"Tokenizing {name}: ").partition(" rows")[0] for line in lines]
    assert counts == [f"{done} of 40" for done in (20, 24, 28, 32, 36, 40)]
    assert all(re.search(r" rows \(\d+(\.\d)? rows/s\)$", line) for line in lines[1:])
