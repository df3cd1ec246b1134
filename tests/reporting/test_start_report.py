import dataclasses
import io
import re
import sys

import pytest

from megatron_gkd.reporting import Progress
from megatron_gkd.reporting.start_report import ModelLine, RowsLine, StartReport, format_lines

REPORT = StartReport(
    versions={"megatron-gkd": "0.1.0", "torch": "2.13.0", "megatron-core": "0.16.1"},
    device="NVIDIA H100 80GB HBM3",
    processes=16,
    nodes=2,
    layout={"layout": "16 processes = tensor 8 x context 1 x pipeline 1 x data 2", "step": "8 rows = data 2 x ..."},
    precision="bf16",
    kernels="compiled (CUDA)",
    attention="sdpa (torch)",
    student=ModelLine("student", "Qwen/Qwen3-1.7B", "qwen3", 1_720_574_976, trainable=1_720_574_976),
    teachers=[
        ModelLine("teachers[0]", "Qwen/Qwen3-8B", "qwen3", 8_190_735_360, location="in device memory, of the tag a"),
        ModelLine("teachers[1]", "http://host:8000", location="a vLLM server, of the tag b"),
    ],
    rollouts="engine vllm, lmbda 0.5 of each step",
    rows=[
        RowsLine(
            "training",
            "49998 of 50000 rows used; dropped: 2 not JSON",
            31_234_567,
            forms=("a.jsonl: 49000 messages; 2 of 49002 rows dropped", "b.jsonl: 998 query + response"),
            example=("9 tokens, 2 trained on, between >>> and <<<:", "user: q", "assistant: >>>a<<<"),
        ),
        RowsLine("validation", "9 of 9 rows used", 512),
    ],
    train_iters=500,
    epochs=0.08,
    first_step=101,
    origin="resumed from runs/x/checkpoints/step-000100",
    checkpoints="every 50 steps in runs/x/checkpoints, all kept",
    output_dir="runs/x",
)

GOLDEN = """\
megatron-gkd  0.1.0 (torch 2.13.0, megatron-core 0.16.1)
device        NVIDIA H100 80GB HBM3, 16 processes on 2 nodes
layout        16 processes = tensor 8 x context 1 x pipeline 1 x data 2
step          8 rows = data 2 x ...
precision     bf16
kernels       compiled (CUDA)
attention     sdpa (torch)
student       Qwen/Qwen3-1.7B: qwen3, 1.72 B parameters, all trainable
teachers[0]   Qwen/Qwen3-8B: qwen3, 8.19 B parameters, in device memory, of the tag a
teachers[1]   http://host:8000: a vLLM server, of the tag b
rollouts      engine vllm, lmbda 0.5 of each step
rows          training: 31.2 M tokens; 49998 of 50000 rows used; dropped: 2 not JSON
              validation: 512 tokens; 9 of 9 rows used
forms         a.jsonl: 49000 messages; 2 of 49002 rows dropped
              b.jsonl: 998 query + response
first row     9 tokens, 2 trained on, between >>> and <<<:
              user: q
              assistant: >>>a<<<
steps         500 (0.08 epochs), starting at step 101, resumed from runs/x/checkpoints/step-000100
checkpoints   every 50 steps in runs/x/checkpoints, all kept
output        runs/x"""


def text_of(**changes) -> list[str]:
    return format_lines(dataclasses.replace(REPORT, **changes).lines()).splitlines()


def test_the_whole_report():
    assert "\n".join(text_of()) == GOLDEN


def test_a_new_run_on_one_process():
    lines = text_of(processes=1, nodes=1, teachers=[], rollouts=None, checkpoints=None, first_step=1, origin=None)
    for line in (
        "device        NVIDIA H100 80GB HBM3, 1 process on 1 node",
        "teacher       none: cross-entropy on the rows",
        "steps         500 (0.08 epochs), starting at step 1",
        "checkpoints   none (output.save_interval = null)",
    ):
        assert line in lines
    assert not any(line.startswith("rollouts") for line in lines)


def test_unknown_facts_are_left_out():
    assert text_of(nodes=None)[1] == "device        NVIDIA H100 80GB HBM3, 16 processes"
    assert text_of(train_iters=100)[18].startswith("steps         100 (0.08 epochs), all of them done, resumed from")


def test_a_part_of_the_parameters():
    assert ModelLine("student", "x", "llama", 2000, trainable=500).text() == (
        "x: llama, 2.00 K parameters, 500 trainable"
    )


def test_plain_lines_where_there_is_no_terminal(capsys):
    Progress(1, True).show_lines(REPORT.lines())
    assert capsys.readouterr().out == GOLDEN + "\n"


@pytest.mark.parametrize("is_enabled", [True, False])
def test_a_table_on_a_terminal_and_nothing_on_other_ranks(is_enabled, monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    Progress(1, is_enabled).show_lines(REPORT.lines())
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())
    lines = [line.rstrip() for line in shown.splitlines()]
    if is_enabled:
        assert "teachers[1]   http://host:8000: a vLLM server, of the tag b" in lines, "text in brackets is no markup"
        assert all(len(line) <= 60 for line in lines) and len(lines) > len(GOLDEN.splitlines())
    else:
        assert lines == []
    assert capsys.readouterr().out == ""
