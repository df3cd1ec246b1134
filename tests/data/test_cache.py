import os
import time

import pytest
from world import start_process

from megatron_gkd.data.cache import CacheFolder
from megatron_gkd.errors import UserError


@pytest.fixture
def cache(tmp_path):
    return CacheFolder(tmp_path / "deep" / "key")


def write(text):
    return lambda parts, out: (out / "rows").write_text(text)


def fail(parts, out):
    (out / "rows").write_text("half")
    raise UserError("line 3 is bad")


def names(cache):
    return sorted(path.name for path in cache.folder.parent.iterdir())


def test_it_is_built_once(cache):
    cache.build(write("first"))
    cache.build(write("second"))
    assert (cache.folder / "rows").read_text() == "first"
    assert names(cache) == ["key"] and cache.folder.stat().st_mode & 0o777 == 0o755


def test_a_failure_leaves_nothing_where_nothing_was_finished(cache):
    with pytest.raises(UserError, match="line 3 is bad"):
        cache.build(fail)
    assert names(cache) == [] and not cache.is_visible(0.0)
    cache.build(write("good"))
    assert (cache.folder / "rows").read_text() == "good"


def test_finished_parts_of_a_failed_build_remain_for_the_next(cache):
    def break_off(parts, out):
        (parts / "one").write_text("1")
        (out / "rows").write_text("half")
        raise OSError("disk full")

    def go_on(parts, out):
        assert [path.name for path in parts.iterdir()] == ["one"] and not list(out.iterdir())
        (parts / "one").rename(out / "rows")

    with pytest.raises(OSError, match="disk full"):
        cache.build(break_off)
    assert names(cache) == ["key.unfinished"]
    cache.build(go_on)
    assert (cache.folder / "rows").read_text() == "1" and names(cache) == ["key"]


def test_two_runs_may_build_the_same_folder_where_there_are_no_locks(cache):
    def write_while_another_run_publishes(parts, out):
        write("mine")(parts, out)
        cache.folder.mkdir()
        (cache.folder / "rows").write_text("theirs")

    cache.build(write_while_another_run_publishes)
    assert (cache.folder / "rows").read_text() == "theirs"
    assert names(cache) == ["key"]


def _build_slowly(cache, calls):
    def slowly(parts, out):
        with open(calls, "a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.5)
        (out / "rows").write_text("whole")

    cache.build(slowly)
    assert (cache.folder / "rows").read_text() == "whole"


def test_a_second_process_waits_for_the_first(cache, tmp_path):
    calls = tmp_path / "calls"
    processes = [start_process(_build_slowly, cache, calls) for _ in range(3)]
    for process in processes:
        process.join(timeout=30)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(calls.read_text().splitlines()) == 1


def test_a_cache_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"^data.dataset_cache_dir = {tmp_path}/file: cannot be written") as error:
        CacheFolder(tmp_path / "file" / "key").build(write("x"))
    assert "\n" not in str(error.value)
