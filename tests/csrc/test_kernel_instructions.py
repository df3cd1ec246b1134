"""Instructions per pair are counted on the hot path of a loop, and a kernel that grows or vanishes is reported."""

import json
import re

import kernel_instructions
import pytest
from hot_path import hot_path
from kernel_instructions import ROWS, complaints, count, counted_loop, pairs, table
from sass import read

NAME = "sums_kernel<bf16, ForwardKl>"
# A loop as compilers make it: rows that are not aligned take the branch without wide loads; a reference that moves
# takes the one with the multiplication; sums are repeated where they became NaN; a last pack may be left out.
BODY = """\
BSSY B0, 0x00d0
@P0 BRA 0x00b0
LDG.E.U16 R4, desc[UR4][R2.64]
LDG.E.U16 R8, desc[UR4][R2.64]
LDG.E.U16 R5, desc[UR4][R2.64]
BRA 0x00c0
EXIT
BPT
BPT
BPT
BPT
LDG.E.EF.128 R4, desc[UR4][R2.64]
BSYNC B0
LDG.E.EF.128 R8, desc[UR4][R2.64]
@P6 BRA 0x0190
HMNMX2.BF16_V2 R12, R4, R5, !PT
@!P1 BRA 0x0120
FMUL R20, R20, R12
FADD R21, R4, R5
FADD R21, R6, R7
FADD R21, R8, R9
FADD R21, R10, R11
@!P2 BRA 0x0190
FADD R22, R4, R5
FADD R22, R6, R7
IADD3 R2, R2, 0x10, RZ
@!P3 BRA 0x0000
EXIT
BRA 0x01c0
NOP
"""


def listing(body=BODY, symbol="_Z1fv"):
    lines = [f"        /*{16 * i:04x}*/   {line} ;   /* 0x00ff */" for i, line in enumerate(body.splitlines())]
    return "\tcode for sm_90\n\t\tFunction : " + symbol + "\n" + "\n".join(lines) + "\n"


def names(path):
    return [instruction.opcode for instruction in path]


def only_path(body=BODY):
    (function,) = read(listing(body))
    (loop,) = function.loops_with_wide_loads()
    return hot_path(loop)


def test_hot_path_takes_wide_loads_and_their_work_and_nothing_else():
    work = ["HMNMX2.BF16_V2", "BRA", *["FADD"] * 4, "BRA", "IADD3", "BRA"]
    assert names(only_path()) == ["BSSY", "BRA", "LDG.E.EF.128", "BSYNC", "LDG.E.EF.128", "BRA", *work]


def test_loop_that_loads_for_the_next_iteration_is_not_left_without_work():
    body = "FADD R9, R4, R5\n@P0 BRA 0x0030\nFADD R9, R6, R7\nLDG.E.128 R4, desc[UR4][R2.64]\n@P1 BRA 0x0000\nEXIT\n"
    assert names(only_path(body)) == ["FADD", "BRA", "FADD", "LDG.E.128", "BRA"]


def test_count_is_of_the_loop_that_loads_most():
    small = BODY.replace("LDG.E.EF.128 R8", "LDG.E.64 R8")
    shifted = "\n".join(small.splitlines()[:28])
    shifted = re.sub(r"0x0\w{3}", lambda found: f"0x{int(found[0], 16) + 16 * 30:04x}", shifted)
    (function,) = read(listing(BODY.replace("EXIT\nBRA 0x01c0\nNOP", "NOP\nNOP\nNOP") + shifted + "\n"))
    assert len(function.loops_with_wide_loads()) == 2
    path = counted_loop(function)
    assert pairs(NAME, path) == 8 and pairs("softcap_kernel<f32>", path) == 8
    assert count([(NAME, "sm_90", path)]) == {NAME: {"sm_90": round(len(path) / 8, 1)}}
    with pytest.raises(ValueError, match="two kernels"):
        count([(NAME, "sm_90", path)] * 2)


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({NAME: {"sm_90": 21.0}}, []),
        ({NAME: {"sm_90": 15.0}}, []),
        ({NAME: {"sm_90": 21.2}}, ["= 21.2 instructions per pair: 6 % more than the 20.0"]),
        ({}, ["= no count"]),
        ({NAME: {"sm_90": 20.0}, "new<bf16>": {"sm_80": 1.0}}, ["does not have it"]),
    ],
)
def test_complaints_are_one_line_each(counts, expected):
    found = complaints(counts, {NAME: {"sm_90": 20.0}})
    assert len(found) == len(expected) and all("\n" not in line and "--update" in line for line in found)
    assert all(text in line for text, line in zip(expected, found, strict=True))


def test_committed_counts_have_the_rows_of_the_table_and_every_architecture():
    known = json.loads(kernel_instructions.RESULTS.read_text())["instructions per pair"]
    assert all(list(counts) == list(kernel_instructions.ARCHITECTURES) for counts in known.values())
    assert kernel_instructions.RESULTS.with_suffix(".md").read_text().endswith(table(known))
    with pytest.raises(KeyError, match="ROWS"):
        table({name: known[name] for _, name, *_ in ROWS[1:]})
