import json
import subprocess
import sys

import pytest

from megatron_gkd.errors import UserError
from megatron_gkd.reporting import MetricsLog, curves, plot_curves, read_metrics

PANELS = ["loss", "divergence", "top1_agreement", "grad_norm", "lr", "tokens_per_second"]


def record_run(folder, steps, keys, validation=()):
    with MetricsLog(folder, tensorboard=False) as log:
        for step in range(1, steps + 1):
            log.write({"step": step, **{key: (n + 1) / step for n, key in enumerate(keys)}})
            if step % 5 == 0 and validation:
                log.write({"step": step, "split": "validation", **dict.fromkeys(validation, 2.0 / step)})
    return log.path


@pytest.fixture
def drawn(monkeypatch):
    """The axes that a plot draws, by record key."""
    seen = {}
    draw = curves._draw
    monkeypatch.setattr(curves, "_draw", lambda axes, key, splits: (draw(axes, key, splits), seen.update({key: axes})))
    return seen


def test_a_picture_of_every_recorded_number(tmp_path, drawn):
    metrics = record_run(tmp_path, 20, PANELS, validation=("loss", "divergence"))
    picture = plot_curves(metrics, tmp_path / "curves.png")
    assert picture == tmp_path / "curves.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert list(drawn) == PANELS
    training, validation = drawn["divergence"].get_lines()
    assert list(training.get_xdata()) == list(range(1, 21))
    assert list(training.get_ydata()) == [2 / step for step in range(1, 21)]
    assert list(validation.get_xdata()) == [5, 10, 15, 20]
    assert [text.get_text() for text in drawn["loss"].get_legend().get_texts()] == ["training", "validation"]
    assert len(drawn["lr"].get_lines()) == 1 and drawn["lr"].get_legend() is None


def test_cross_entropy_only_has_no_divergence_to_draw(tmp_path, drawn):
    plot_curves(record_run(tmp_path, 3, ["loss", "lr"]), tmp_path / "curves.png")
    assert list(drawn) == ["loss", "lr"]


def test_gaps_are_left_out(tmp_path, drawn):
    with MetricsLog(tmp_path, tensorboard=False) as log:
        for step, loss in enumerate((1.0, float("nan"), 3.0), start=1):
            log.write({"step": step, "loss": loss})
    plot_curves(log.path, tmp_path / "curves.png")
    (line,) = drawn["loss"].get_lines()
    assert list(line.get_xdata()) == [1, 3] and list(line.get_ydata()) == [1.0, 3.0]


@pytest.mark.parametrize("content", ["", json.dumps({"step": 1, "source": "dataset"}) + "\n"])
def test_nothing_to_draw(tmp_path, content):
    (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"metrics\.jsonl: has no numbers to draw"):
        plot_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def test_read_metrics_splits_training_from_validation(tmp_path):
    training, validation = read_metrics(record_run(tmp_path, 10, ["loss"], validation=("loss",)))
    assert [record["step"] for record in training] == list(range(1, 11))
    assert [record["step"] for record in validation] == [5, 10]


def test_neither_torch_nor_matplotlib_before_they_are_needed():
    program = "import sys, megatron_gkd.reporting; sys.exit(len({'torch', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0
