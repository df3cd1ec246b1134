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
