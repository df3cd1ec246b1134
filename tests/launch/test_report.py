import pytest

from megatron_gkd.launch.failures import Failure
from megatron_gkd.launch.memory import count_memory_kills
from megatron_gkd.launch.report import End, Stop, describe, exit_code, format_ranks


def failed(rank, message, time=0.0, code=2, traceback=None, is_shared=False):
    return End(rank, code, time, Failure(message, traceback, code, is_shared, time))


def hung(rank, time=0.0):
    return End(rank, 75, time, Failure("rank 1 of 2 hangs", None, 75, True, time, "hang"))


def killed(rank, number, time=0.0, **how):
    return End(rank, -number, time, **how)


def ok(rank):
    return End(rank, 0, 0.0)


@pytest.mark.parametrize(
    ("ends", "code"),
    [
        ([ok(0), ok(1)], 0),
        ([End(0, 75, 1.0), End(1, 75, 0.0)], 75),
        ([ok(0), End(1, 75, 0.0)], 75),
        ([End(0, 75, 0.0), failed(1, "x", 1.0)], 2),
        ([failed(0, "x", 2.0), failed(1, "y", 1.0, code=1)], 1),
        ([killed(0, 9), ok(1)], 137),
        ([killed(0, 15, 1.0, stopped=Stop.FAILURE_ELSEWHERE), failed(1, "x", 2.0)], 2),
        ([killed(0, 15, forwarded=15), killed(1, 15, forwarded=15)], 75),
        ([End(0, 130, 0.0, forwarded=2), End(1, 75, 0.0)], 75),
        ([End(0, 75, 0.0), killed(1, 9, stopped=Stop.TIMEOUT)], 137),
        ([failed(0, "RuntimeError: Connection closed by peer", 1.0, code=1), killed(1, 9, 2.0)], 137),
        ([failed(0, "http://t:8000: Connection refused", 1.0, code=69), killed(1, 9, 2.0)], 69),  # of a server
        ([End(0, 7, 0.0)], 7),
        ([hung(0, 5.0), killed(1, 9, 1.0, stopped=Stop.FAILURE_ELSEWHERE)], 75),
        ([hung(0, 5.0), failed(1, "x", 1.0, code=1)], 75),
    ],
)
def test_the_exit_code_is_that_of_the_cause(ends, code):
    assert exit_code(ends) == code


def test_each_message_is_printed_once_with_its_ranks_in_the_order_of_time():
    ends = [failed(0, "late", 9.0), failed(5, "early", 1.0), failed(6, "early", 1.1), failed(3, "early", 1.2)]
    assert describe(ends, 8) == "ranks 3, 5-6 of 8: early\nrank 0 of 8: late"


def test_a_hang_is_the_cause_and_its_code_is_no_interruption():
    ends = [hung(0, 5.0), killed(1, 9, 1.0, stopped=Stop.FAILURE_ELSEWHERE)]
    assert not ends[0].is_interruption
    assert describe(ends, 2) == "rank 1 of 2 hangs\nrank 1 of 2 stopped, or lost the connection, after that"


def test_a_rank_that_ends_for_another_ones_failure_is_no_cause():
    consequence = End(0, 2, 1.0, Failure("rank 1 has failed: a row", None, 2, False, 1.0, "consequence"))
    ends = [consequence, failed(1, "a row", 3.0)]
    assert exit_code(ends) == 2
    assert describe(ends, 2) == "rank 1 of 2: a row\nrank 0 of 2 stopped, or lost the connection, after that"
    assert describe([consequence], 2) == "rank 0 of 2: rank 1 has failed: a row"


def test_a_kill_for_lack_of_memory_says_so():
    assert describe([killed(1, 9)], 2) == "rank 1 of 2 was killed by SIGKILL (out of memory?)"
    assert describe([killed(1, 9, lacked_memory=True)], 2) == (
        "rank 1 of 2 was killed by SIGKILL (out of memory: the kernel has killed a process of this node for lack of "
        "host memory)"
    )
    assert count_memory_kills() >= 0


def test_a_message_of_all_ranks_names_none():
    assert describe([failed(0, "bad row"), failed(1, "bad row")], 2) == "bad row"
    assert describe([failed(1, "stopped after step 2\nsaved", is_shared=True)], 8) == "stopped after step 2\nsaved"


def test_a_traceback_is_printed_once_for_each_place():
    here, there = "Traceback\n  here\nKeyError: 0\n", "Traceback\n  there\nKeyError: 0\n"
    ends = [failed(rank, "KeyError: 0", rank, 1, there if rank == 2 else here) for rank in range(3)]
    assert describe(ends, 4) == f"ranks 0-1 of 4: KeyError: 0\n{here}{there}".rstrip()


@pytest.mark.parametrize(
    "message",
    [
        "RuntimeError: [pair.cc:553] Connection closed by peer [127.0.0.1]:2204. This is typically caused by",
        "RuntimeError: [pair.cc:537] Read error [127.0.0.1]:3712: Connection reset by peer.",
        "DistNetworkError: recv failed",
        "DistBackendError: NCCL error in: ProcessGroupNCCL.cpp: remote process exited or there was a network error",
        "the connection to rank 0 is lost, which has probably ended; see its message (x)",
    ],
)
def test_consequences_of_a_failure_are_one_line_behind_it(message):
    ends = [failed(rank, message, 1.0, 1, f"Traceback\n{message}") for rank in range(7)] + [killed(7, 9, 2.0)]
    assert describe(ends, 8).splitlines() == [
        "rank 7 of 8 was killed by SIGKILL (out of memory?)",
        "ranks 0-6 of 8 stopped, or lost the connection, after that",
    ]
    assert describe(ends[:7], 8).startswith(f"ranks 0-6 of 8: {message}\nTraceback"), "nothing else explains it"
    assert message not in describe(ends[:7], 8, is_explained=True)


def test_ends_without_a_message():
    assert describe([killed(0, 11)], 2) == "rank 0 of 2 was killed by SIGSEGV"
    assert describe([End(0, 9, 0.0), End(1, 9, 0.0)], 2) == "ranks 0-1 of 2 ended with exit code 9 without a message"
    assert describe([killed(1, 9, stopped=Stop.TIMEOUT)], 2, 30) == (
        "rank 1 of 2 was killed for not ending within 30 s after a signal (--shutdown-timeout)"
    )


def test_interruptions():
    assert describe([ok(0), End(1, 75, 0.0)], 2) == ""
    assert describe([failed(rank, "saved step 3", code=75) for rank in (0, 1)], 2) == "saved step 3"
    assert describe([killed(rank, 10, forwarded=10) for rank in (0, 1)], 4) == (
        "ranks 0-1 of 4 ended by SIGUSR1 before saving was possible"
    )


@pytest.mark.parametrize(("ranks", "text"), [([0], "0"), ([2, 1, 0], "0-2"), ([7, 0, 3, 4], "0, 3-4, 7")])
def test_ranges_of_ranks(ranks, text):
    assert format_ranks(ranks) == text
