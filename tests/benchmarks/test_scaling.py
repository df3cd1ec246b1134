"""The benchmark of scaling measures a layout, and writes tables of what it finds."""

from __future__ import annotations

import json

import pytest
from benchmarks import planned_scaling, scaling
from benchmarks.collective_counts import CASES, MICROBATCHES
from benchmarks.environment import describe


def measure(rank, world_size, name, folder):
    from benchmarks.scaling import LAYOUTS, Folders, time_layout

    return time_layout(LAYOUTS[name], Folders(folder), steps=1)


def test_a_layout_is_timed(gloo_world, tmp_path, monkeypatch):
    tiny = dict(hidden_size=32, intermediate_size=48, num_attention_heads=2, head_dim=16, vocab_size=64)
    for name in ("student", "teacher"):
        scaling.save_model(tmp_path / name, 2, **tiny)
    strong, weak, moved = gloo_world(2).run(measure, "DP2", tmp_path)[0]
    assert len(strong) == len(weak) == 1 and strong[0] > 0 and weak[0] > 0
    parameters = 64 * 32 + 32 + 2 * (32 * 32 * 4 + 3 * 32 * 48 + 2 * 32 + 2 * 16)
    assert moved == pytest.approx(4 * parameters * 1.5, rel=0.05)  # a scatter's input, half of a gather's


def test_the_tables(tmp_path):
    seconds = {name: {"strong": [8.0 / min(one.processes, 2)], "weak": [2.0]} for name, one in scaling.LAYOUTS.items()}
    counts = {
        name: {str(m): [[*key, count] for key, count in case.expected(m).items()] for m in MICROBATCHES}
        for name, case in CASES.items()
    }
    environment = describe(scaling.torch.device("cpu")) | {"cpu_count": 2}
    run = {"environment": environment, "seconds": seconds, "bytes": dict.fromkeys(seconds, 1000), "collectives": counts}
    text = scaling.write(run, tmp_path)
    assert "| TP2+SP | 2 | 4 | 2.00 | 100% | 2 | 100% |" in text
    assert "| DP4 | 4 | 4 | 2.00 | 100% | 2 | 200% |" in text, "four processes share two cores"
    assert "| TP2 | tp | all_gather | m(1 + 2c) | 6 | 12 |" in text
    written = {path.suffix: path for path in tmp_path.iterdir()}
    assert json.loads(written[".json"].read_text())["seconds"] == seconds and written[".md"].read_text() == text


def test_every_layout_fits_the_rows():
    for layout in scaling.LAYOUTS.values():
        for rows in (scaling.STRONG_ROWS, scaling.WEAK_ROWS * layout.processes):
            assert rows % layout.data_parallel == 0
    assert all(planned_scaling.STRONG_ROWS % (gpus // 4) == 0 for gpus in planned_scaling.GPUS)
