"""The options of the quickstart."""

import sys

import pytest
from quickstart import __main__ as quickstart


@pytest.mark.parametrize("option", ["--seeds=3", "--on-policy", "--self", "--lora"])
def test_options_of_the_experiment_need_it(option, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["quickstart", option])
    with pytest.raises(SystemExit):
        quickstart._parse()
    assert f"{option.partition('=')[0]}: needs --experiment" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["quickstart", "--experiment", option])
    assert quickstart._parse().experiment


def test_seeds_are_positive(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["quickstart", "--experiment", "--seeds", "0"])
    with pytest.raises(SystemExit):
        quickstart._parse()
    assert "--seeds = 0: must be at least 1" in capsys.readouterr().err


def test_images_take_seeds_and_no_option_of_the_experiment(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["quickstart", "--images", "--seeds", "3"])
    plan = quickstart._plan(quickstart._parse())
    assert [row.recipe for row in plan.rows] == ["images_ce", "images_gkd"] and list(plan.seeds) == [1, 2, 3]
    for option in ("--experiment", "--lora"):
        monkeypatch.setattr(sys, "argv", ["quickstart", "--images", option])
        with pytest.raises(SystemExit):
            quickstart._parse()
    assert "--lora: needs --experiment" in capsys.readouterr().err
