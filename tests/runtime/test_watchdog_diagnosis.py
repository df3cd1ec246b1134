"""Which ranks hang, from made-up reports of all ranks."""

from dataclasses import replace

import pytest

from megatron_gkd.runtime.watchdog.diagnosis import History, diagnose
from megatron_gkd.runtime.watchdog.report import End, EndKind, Report

LIMIT, INTERVAL = 10.0, 1.0


def report(rank, **values):
    default = {"phase": "teacher", "step": 12, "changes": 40, "silent_s": 20.0, "is_waiting": True}
    return Report(rank=rank, host=f"host-{rank}", pid=100 + rank, number=1, time=0.0, **default | values)


def diagnosis(reports, *, stopped=(), seconds=20.0):
    """Let all ranks but the stopped ones report each second, with the same silence at the end."""
    history = History()
    for second in range(int(seconds) + 1):
        history.add([one if one.rank in stopped else replace(one, number=second) for one in reports], float(second))
    return diagnose(history, LIMIT, INTERVAL, seconds)


def hanging(reports, **options):
    found = diagnosis(reports, **options)
    return None if found is None else [one.rank for one in found.hanging]


def test_a_run_in_which_any_rank_makes_progress_does_not_hang():
    assert hanging([report(0), report(1, silent_s=9.0, is_waiting=False)]) is None
    assert hanging([report(0), report(1, silent_s=0.0)]) is None  # in a phase without a limit


def test_nothing_is_known_from_one_look():
    history = History()
    history.add([report(0), report(1)], 0.0)
    assert diagnose(history, LIMIT, INTERVAL, 0.0) is None


def test_a_process_that_does_not_report_is_named_whatever_it_reported_last():
    reports = [report(0), report(1, silent_s=0.1, phase="student", changes=39), report(2)]
    found = diagnosis(reports, stopped=(1,))
    assert [one.rank for one in found.hanging] == [1] and found.responding == (0, 2) and found.step == 12
    text = found.describe(3)
    assert text.startswith(
        "rank 1 of 3 on host-1 (process 101) hangs: phase student of step 12, no progress for 20 s; its process is "
        "stopped or does not get to run, last sign of life at "
    )
    assert text.endswith("; the other ranks wait, for 20 s, in phase teacher of step 12")


def test_a_process_that_has_only_just_stopped_is_given_the_same_time():
    assert hanging([report(0), report(1), report(2)], stopped=(1,), seconds=8.0) is None


def test_the_rank_before_knows_for_how_long_a_process_has_been_stopped():
    reports = [report(0, next_is_silent_s=30.0), report(1), report(2)]
    assert hanging(reports, stopped=(1,), seconds=8.0) == [1]
    # Those of one node stop together: the rank before the first one knows it for all of them.
    assert hanging([*reports[:1], report(1), report(2), report(3)], stopped=(1, 2), seconds=8.0) == [1, 2]


def test_the_rank_in_an_earlier_phase_is_named():
    reports = [report(0), report(1, phase="data", changes=38), report(2, changes=41, phase="student")]
    assert hanging(reports) == [1]


def test_the_rank_that_does_not_wait_is_named_within_a_phase():
    assert hanging([report(0), report(1), report(2, is_waiting=False), report(3)]) == [2]


def test_the_rank_with_fewer_collectives_is_named_where_stacks_show_nothing():
    counts = [{"0": 9, "tp": 4}, {"0": 9, "tp": 4}, {"0": 9, "dp": 2}, {"0": 8, "dp": 2}]
    reports = [report(rank, is_waiting=False, collectives=count) for rank, count in enumerate(counts)]
    assert hanging(reports) == [3]


def test_no_rank_is_named_where_all_wait_for_each_other():
    found = diagnosis([report(0), report(1)])
    assert found.hanging == ()
    assert found.describe(2) == "the run hangs: all 2 ranks wait for each other, for 20 s, in phase teacher of step 12"


def test_one_process_can_hang_alone():
    assert hanging([report(0, is_waiting=False)]) == [0]


def test_many_ranks_are_counted():
    found = diagnosis([report(rank, changes=39 if rank < 6 else 40) for rank in range(8)])
    assert found.describe(8).count(" hangs: ") == 4 and "; and 2 more ranks; the other" in found.describe(8)


@pytest.mark.parametrize("kind", EndKind)
def test_what_is_in_the_store_comes_back(kind):
    end = End(kind, "rank 1 hangs", 75, 3, (1,), (0, 2))
    assert End.decode(end.encode().encode()) == end
    one = report(3, collectives={"0": 7})
    assert Report.decode(one.encode().encode()) == one
