"""Plans of real models from their config.json, each in a process of its own, as on a command line."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys

import pytest
from recipe_workspace import Workspace
from world import REPOSITORY

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}


def run(folder, *command):
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def tables():
    """The check of the documentation's tables, which plans 512 GPUs among others, and its seconds of CPU time."""
    begin = _seconds_of_children()
    return run(REPOSITORY, "scripts/write_planning_tables.py", "--check"), _seconds_of_children() - begin


def _seconds_of_children():
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_the_tables_of_the_documentation_are_those_of_the_plans(tables):
    checked, _ = tables
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_512_gpus_are_planned_within_a_minute(tables):
    _, seconds = tables
    assert seconds < 60


def test_suggestions_of_a_command_are_measured_and_fit(tmp_path):
    workspace = Workspace(tmp_path)
    options = ["--gpus", 8, "--gpu-memory", "10GB", "--json", "--suggest", 2, "--measure-at-most", 3]
    overrides = ["--global_batch_size", 16, "--max_length", 64]
    planned = run(tmp_path, "-m", "megatron_gkd", "plan", workspace.recipe, *options, *overrides)
    assert planned.returncode == 0, planned.stderr
    tree = json.loads(planned.stdout)
    assert tree["fits"] and len(tree["suggestions"]) == 2 and tree["layouts_measured"] == 3
    best = tree["suggestions"][0]
    checked = run(
        tmp_path, "-m", "megatron_gkd", "check", workspace.recipe, "--nproc", 8, *overrides, *best["overrides"].split()
    )
    assert checked.returncode == 0, checked.stderr
