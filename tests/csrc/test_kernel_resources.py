"""ptxas' reports are understood, and spills are found in them."""

import pytest
from kernel_resources import Kernel, main, parse, table

SUMS = "_ZN3gkd4cuda39_GLOBAL__N__7c18a3e6_7_sums_cu_ed5b4a9711sums_kernelILNS_9FloatTypeE1ENS_5AlphaINS_4FastEEEEEvv"
GRADIENT = "_Z15gradient_kernelILb1EEvv"
CLEAN = f"""ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{SUMS}' for 'sm_80'
ptxas info    : Function properties for {SUMS}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 62 registers, used 1 barriers, 64 bytes smem, 492 bytes cmem[0]
ptxas info    : Compile time = 25.300 ms
ptxas info    : Compiling entry function '{GRADIENT}' for 'sm_80'
ptxas info    : Function properties for {GRADIENT}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers, 528 bytes cmem[0]
"""
SPILLING = f"""ptxas info    : Compiling entry function '{GRADIENT}' for 'sm_100'
ptxas info    : Function properties for {GRADIENT}
    8 bytes stack frame, 12 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 64 registers, used 0 barriers, 8 bytes cumulative stack size
"""


def test_parse():
    assert parse(CLEAN + SPILLING) == [
        Kernel(SUMS, "sm_80", registers=62, shared=64, stack=0, spill_stores=0, spill_loads=0),
        Kernel(GRADIENT, "sm_80", registers=40, shared=0, stack=0, spill_stores=0, spill_loads=0),
        Kernel(GRADIENT, "sm_100", registers=64, shared=0, stack=8, spill_stores=12, spill_loads=24),
    ]
    with pytest.raises(ValueError, match="not understood"):
        parse("ptxas info    : Compiling entry function '_Z1fv' for 'sm_80'\nsomething new")


def test_table_has_a_line_for_each_kernel():
    lines = [line.split() for line in table(parse(SPILLING + CLEAN)).splitlines()[1:]]
    assert [line[-5:] for line in lines] == [
        ["80/100", "40/64", "0", "0/8", "0/36"],
        ["80", "62", "64", "0", "0"],
    ]
    assert lines[0][0] in ("gradient_kernel<true>", GRADIENT)  # without c++filt, as it stands


@pytest.mark.parametrize(("report", "status"), [(CLEAN, 0), (CLEAN + SPILLING, 1), ("", 1)])
def test_exit_status(tmp_path, report, status, capsys):
    path = tmp_path / "report.txt"
    path.write_text(report)
    assert main([str(path)]) == status
    assert ("1 with spills" in capsys.readouterr().out) == (report == CLEAN + SPILLING)
