"""The emulator notices what CUDA does not allow."""

import ctypes

import pytest
from csrc.emulated_kernels import KernelError, check


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("wait_in_some_threads", "not reached by all threads"),
        ("wait_at_two_places", "at different barriers"),
        ("shuffle_in_some_threads", "not reached by all threads"),
        ("read_misaligned", "misaligned"),
        ("wait_in_some_blocks", "not reached by all threads"),
        ("leave_before_others_write", "has ended"),
        ("write_before_others_run", "may not have started"),
        ("write_outside_of_the_memory", "not in dynamic shared memory"),
        ("leave_before_copies_arrive", "before its copies arrived"),
    ],
)
def test_wrong_kernels_fail(library, kernel, message):
    function = getattr(library, f"wrong_{kernel}")
    function.restype = ctypes.c_char_p
    with pytest.raises(KernelError, match=message):
        check(function())
