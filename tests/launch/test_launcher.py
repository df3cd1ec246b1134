"""Real launches of two ranks: exit codes, one report of a failure, signals, and nothing left behind."""

import os
import signal
import socket
import time

import pytest
from launching import finish, is_alive, notes, run, start, wait_for, write_rank
from ports import free_port

WAIT_FOR_A_SIGNAL = """
received = []
for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    signal.signal(signum, lambda number, _: (received.append(number), note("signal", signal.Signals(number).name)))
note("ready", "yes")
while not received:
    time.sleep(0.01)
time.sleep(0.7 if rank else 0.3)
sys.exit(75)
"""


def ready(folder, ranks=(0, 1)):
    wait_for(lambda: all(notes(folder, "ready", rank) for rank in ranks))


def pids(folder, ranks=(0, 1)):
    return [pid for rank in ranks for pid in notes(folder, "pid", rank)]


def test_success_is_0_without_output(tmp_path):
    body = """
    print("hello of", rank, os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"], os.environ["GROUP_WORLD_SIZE"])
    """
    code, err = run(tmp_path, body)
    assert (code, err) == (0, "")
    assert sorted((tmp_path / "launcher.out").read_text().splitlines()) == ["hello of 0 2 0 1", "hello of 1 2 1 1"]


def test_a_mistake_of_the_user_in_one_rank_is_one_line_and_2(tmp_path, monkeypatch):
    body = """
    if rank == 1:
        raise UserError("train.jsonl, line 3: not JSON")
    note("ready", "yes")
    time.sleep(600)
    """
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    code, err = run(tmp_path, body)
    assert code == 2
    first, *others = err.splitlines()
    assert first == "rank 1 of 2: train.jsonl, line 3: not JSON"
    assert others == ["rank 0 of 2 stopped, or lost the connection, after that"]
    assert not any(map(is_alive, pids(tmp_path)))
    assert not list(tmp_path.glob("megatron-gkd-*")), "the ranks' failures"


def test_a_shared_failure_is_printed_once_without_a_rank(tmp_path):
    code, err = run(tmp_path, 'time.sleep(1 - rank)\nraise RunStopped("stopped after step 2 of 4\\nsaved")')
    assert (code, err) == (2, "stopped after step 2 of 4\nsaved\n")


def test_an_unexpected_exception_has_one_traceback_and_hides_no_cause(tmp_path):
    body = """
    if rank == 0:
        raise RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:1")
    time.sleep(0.5)
    raise KeyError("a fault of the program")
    """
    code, err = run(tmp_path, body)
    assert code == 1
    lines = err.splitlines()
    assert lines[0] == "rank 1 of 2: KeyError: 'a fault of the program'"
    assert err.count("Traceback") == 1 and err.count('raise KeyError("a fault') == 1
    assert lines[-1] == "rank 0 of 2 stopped, or lost the connection, after that"


def test_a_killed_rank_is_named_and_ends_the_others(tmp_path):
    body = """
    if rank == 1:
        import subprocess
        note("pid", subprocess.Popen(["sleep", "600"]).pid)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)
    """
    begin = time.monotonic()
    code, err = run(tmp_path, body)
    assert code == 137 and time.monotonic() - begin < 60
    assert err.splitlines() == [
        "rank 1 of 2 was killed by SIGKILL (out of memory?)",
        "rank 0 of 2 stopped, or lost the connection, after that",
    ]
    assert len(pids(tmp_path)) == 3 and not any(map(is_alive, pids(tmp_path)))


def test_an_exit_code_without_a_message_is_kept(tmp_path):
    code, err = run(tmp_path, "os._exit(9 if rank else 0)")
    assert (code, err) == (9, "rank 1 of 2 ended with exit code 9 without a message\n")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_reaches_each_rank_once_and_75_is_kept(tmp_path, signum):
    write_rank(tmp_path, WAIT_FOR_A_SIGNAL)
    launcher = start(tmp_path, "--nproc", "2")
    ready(tmp_path)
    if signum == signal.SIGINT:  # as a terminal sends it
        os.killpg(launcher.pid, signum)
    else:
        os.kill(launcher.pid, signum)
    assert finish(launcher) == 75
    assert [notes(tmp_path, "signal", rank) for rank in (0, 1)] == [[signum.name], [signum.name]]
    note = "SIGINT: stopping after this step; a second Ctrl-C ends at once\n" if signum == signal.SIGINT else ""
    assert (tmp_path / "launcher.err").read_text() == note


@pytest.mark.parametrize("signum", [signal.SIGUSR1, signal.SIGINT])
def test_ranks_that_cannot_handle_a_signal_yet_are_interrupted_too(tmp_path, signum):
    write_rank(tmp_path, 'note("ready", "yes")\ntime.sleep(600)')
    launcher = start(tmp_path, "--nproc", "2")
    ready(tmp_path)
    launcher.send_signal(signum)
    assert finish(launcher) == 75
    last = (tmp_path / "launcher.err").read_text().splitlines()[-1]
    assert last == f"ranks 0-1 of 2 ended by {signum.name} before saving was possible"


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    write_rank(tmp_path, 'signal.signal(signal.SIGINT, signal.SIG_IGN)\nnote("ready", "yes")\ntime.sleep(600)')
    launcher = start(tmp_path, "--nproc", "2")
    ready(tmp_path)
    launcher.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert launcher.poll() is None
    launcher.send_signal(signal.SIGINT)
    assert finish(launcher, 20) == 130
    wait_for(lambda: not any(map(is_alive, pids(tmp_path))), 10)


def test_ranks_that_do_not_end_after_a_signal_are_killed_and_named(tmp_path):
    write_rank(tmp_path, 'signal.signal(signal.SIGTERM, signal.SIG_IGN)\nnote("ready", "yes")\ntime.sleep(600)')
    launcher = start(tmp_path, "--nproc", "2", "--shutdown-timeout", "1")
    ready(tmp_path)
    launcher.send_signal(signal.SIGTERM)
    assert finish(launcher) == 137
    assert (tmp_path / "launcher.err").read_text() == (
        "ranks 0-1 of 2 were killed for not ending within 1 s after a signal (--shutdown-timeout)\n"
    )


def test_ranks_end_with_a_launcher_that_is_killed(tmp_path):
    write_rank(tmp_path, 'note("ready", "yes")\ntime.sleep(600)')
    launcher = start(tmp_path, "--nproc", "2")
    ready(tmp_path)
    launcher.kill()
    finish(launcher)
    wait_for(lambda: not any(map(is_alive, pids(tmp_path))), 10)


def test_a_failure_is_restarted_and_a_mistake_is_not(tmp_path):
    body = """
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        raise KeyError("once")
    if rank:
        raise UserError("a mistake")
    """
    code, err = run(tmp_path, body, "--nproc", "2", "--max-restarts", "3")
    assert code == 2
    assert err.count("KeyError: 'once'\n") == 2, "a line, and the end of the traceback"
    assert err.count("\nrestart ") == 1 and "\nrestart 1 of 3\n" in err
    assert err.splitlines()[-1] == "rank 1 of 2: a mistake"


def test_ranks_that_are_started_again_can_meet(tmp_path):
    body = """
    import torch
    import torch.distributed as dist
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    time.sleep(3 * rank * attempt)  # rank 0 would find rank 1's old address in the store of the first attempt
    dist.init_process_group("gloo")
    total = torch.ones(1)
    dist.all_reduce(total)
    if rank == 1 and attempt == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(total)
    note("total", total.item())
    dist.destroy_process_group()  # its threads may abort a process that ends with it
    """
    code, err = run(tmp_path, body, "--nproc", "2", "--max-restarts", "1")
    assert code == 0, err
    assert [notes(tmp_path, "total", rank) for rank in (0, 1)] == [["4.0"], ["4.0"]]
    assert err.splitlines() == [
        "rank 1 of 2 was killed by SIGKILL (out of memory?)",
        "rank 0 of 2 stopped, or lost the connection, after that",
        "restart 1 of 1",
    ]


def launch_nodes(folder, *options):
    nodes = ("--nproc", "2", "--nnodes", "2", "--rdzv", f"127.0.0.1:{free_port()}")
    return [start(folder, *nodes, *options, "--node-rank", str(node), name=f"node{node}") for node in (1, 0)][::-1]


def test_two_nodes_meet_and_fail_together(tmp_path):
    body = """
    note("node", os.environ["GROUP_RANK"] + os.environ["WORLD_SIZE"])
    if rank == 3:
        while not all(pathlib.Path(f"node-{other}").exists() for other in range(4)):
            time.sleep(0.1)
        raise UserError("shard-7: no such file")
    time.sleep(600)
    """
    write_rank(tmp_path, body)
    launchers = launch_nodes(tmp_path)
    assert [finish(launcher) for launcher in launchers] == [2, 2]
    assert [notes(tmp_path, "node", rank) for rank in range(4)] == [["04"], ["04"], ["14"], ["14"]]
    here, there = ((tmp_path / f"node{node}.err").read_text().splitlines() for node in (1, 0))
    assert here == [
        "rank 3 of 4: shard-7: no such file",
        "rank 2 of 4 stopped, or lost the connection, after that",
    ]
    assert there[0] == f"node 1 ({socket.gethostname()}): rank 3 of 4: shard-7: no such file"
    assert there[1:] == ["ranks 0-1 of 4 stopped, or lost the connection, after that"]
    assert not any(map(is_alive, pids(tmp_path, range(4))))


def test_a_signal_at_one_of_two_nodes_ends_both_with_75(tmp_path):
    body = """
    stop = pathlib.Path("stop")  # for the agreement of the ranks
    signal.signal(signal.SIGUSR1, lambda *_: stop.touch())
    note("ready", "yes")
    while not stop.exists():
        time.sleep(0.05)
    time.sleep(2 if rank < 2 else 0)
    sys.exit(75)
    """
    write_rank(tmp_path, body)
    first, second = launch_nodes(tmp_path)
    ready(tmp_path, range(4))
    second.send_signal(signal.SIGUSR1)
    assert [finish(first), finish(second)] == [75, 75]
    assert [(tmp_path / f"node{node}.err").read_text() for node in (0, 1)] == ["", ""]
