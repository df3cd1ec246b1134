import pytest

from megatron_gkd.config.durations import FORMS, parse_duration


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90), ("1.5", 1.5), ("90s", 90), ("90m", 5400), ("11h30m", 41400), ("1d", 86400), ("1d2h", 93600),
        ("11:30:00", 41400), ("2-00:00:05", 172805), (" 3H ", 10800),
    ],
)  # fmt: skip
def test_forms(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "h", "1h1h", "1:2:3", "5 m", "-"])
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError):
        parse_duration(text)


def test_durations_in_a_recipe(workspace):
    assert workspace.load("--max_runtime", "3h").train.max_runtime == 10800
    assert workspace.load("--max_runtime", "11:30:00").train.max_runtime == 41400
    assert workspace.load("--max_runtime", "60").train.max_runtime == 60
    for wrong in ("soon", "0", "-5", "true"):
        problems = workspace.problems("--max_runtime", wrong)
        assert problems == [f"train.max_runtime = {wrong}: must be a time > 0 ({FORMS}), or null"]
