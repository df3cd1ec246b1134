"""A folder is locked for one run at a time; locks of killed runs are stale."""

import json
import os
import socket
import threading
import time

import psutil
import pytest
from world import start_process

from megatron_gkd.errors import UserError
from megatron_gkd.runtime import run_lock
from megatron_gkd.runtime.run_lock import RunLock


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.lock"


def owner(**changes):
    me = psutil.Process()
    return {
        "host": socket.gethostname(),
        "boot": run_lock._boot_id(),
        "pid": me.pid,
        "started": me.create_time(),
    } | changes


def test_a_second_run_is_refused_until_the_first_ends(path):
    first = RunLock(path)
    first.acquire()
    with pytest.raises(UserError) as error:
        RunLock(path).acquire()
    message = str(error.value)
    assert message.startswith(f"output.output_dir = {path.parent}: a run is under way there (process {os.getpid()} on ")
    assert "\n" not in message
    first.release()
    assert not path.exists()
    RunLock(path).acquire()


def _hold(path):
    RunLock(path).acquire()
    time.sleep(60)


def test_a_killed_run_does_not_keep_its_lock(path):
    process = start_process(_hold, path)
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)  # it is written, too
    with pytest.raises(UserError, match=f"process {process.pid} on"):
        RunLock(path).acquire()
    process.kill()
    process.join()
    RunLock(path).acquire()
    assert json.loads(path.read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("changes", [{"started": 1.0}, {"pid": 2**22 + 1}, {"pid": None}])
def test_another_process_with_the_same_number_is_no_owner(path, changes):
    path.write_text(json.dumps(owner(**changes)))
    RunLock(path).acquire()


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", json.dumps(owner(host="elsewhere")), json.dumps(owner(boot="before"))],
    ids=["empty", "broken", "list", "another host", "another boot"],
)
def test_a_lock_that_is_not_renewed_is_stale(path, content, monkeypatch):
    monkeypatch.setattr(run_lock, "WATCH_S", 0.3)
    path.write_text(content)
    RunLock(path).acquire()
    assert json.loads(path.read_text())["pid"] == os.getpid()
    assert [file.name for file in path.parent.iterdir()] == ["run.lock"]


def test_the_lock_of_a_live_run_on_another_host_is_kept(path, monkeypatch):
    monkeypatch.setattr(run_lock, "WATCH_S", 5.0)
    path.write_text(json.dumps(owner(host="elsewhere")))
    renewal = threading.Timer(0.3, lambda: os.utime(path, (1, 1)))
    renewal.start()
    with pytest.raises(UserError, match="on elsewhere, since"):
        RunLock(path).acquire()
    assert json.loads(path.read_text())["host"] == "elsewhere"


def test_the_owner_renews_it(path, monkeypatch):
    monkeypatch.setattr(run_lock, "RENEW_EVERY_S", 0.05)
    lock = RunLock(path)
    lock.acquire()
    os.utime(path, (1, 1))
    deadline = time.monotonic() + 20
    while path.stat().st_mtime < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert path.stat().st_mtime > 2
    lock.release()


def test_one_of_many_simultaneous_starts_gets_the_lock(path):
    path.write_text(json.dumps(owner(started=1.0)))
    locks, refused = [RunLock(path) for _ in range(16)], []

    def acquire(lock):
        try:
            lock.acquire()
        except UserError:
            refused.append(lock)

    threads = [threading.Thread(target=acquire, args=(lock,)) for lock in locks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 15


def test_an_unwritable_folder_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"^output.output_dir = {tmp_path}/file: can't be written to") as error:
        RunLock(tmp_path / "file" / "run.lock").acquire()
    assert "\n" not in str(error.value)
