"""The page docs/extending.md is followed literally, on a copy of the repository."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import tiny_checkpoint
from docs.markdown import blocks, prose
from world import REPOSITORY

PAGE = REPOSITORY / "docs/extending.md"
COPIED = ("csrc", "megatron_gkd", "tests", "pyproject.toml")
COMMANDS = re.findall(r"^    ((?:[A-Z_]+=\S+ )*)bash scripts/test\.sh (.+)$", prose(PAGE), re.M)
REBUILDS = ("", "tests/ops tests/csrc")  # takes minutes; test_the_functor_computes_the_divergence takes its place
FUNCTOR = r"""
#include <cstdio>
#include "divergences.h"

int main() {
  const gkd::Hellinger functor{gkd::Hellinger::weights(0.5)};
  const float probabilities[][2] = {{0.25f, 0.5f}, {0.5f, 0.25f}, {0.3f, 0.3f}, {1e-6f, 0.9f}};
  for (const auto& [p, q] : probabilities) {
    const auto terms = functor(__builtin_log2f(p), __builtin_log2f(q));
    std::printf("%g %g %g %g\n", p, q, functor.w.value_scale * terms.value, functor.w.slope_scale * terms.slope);
  }
}
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The repository with the page's files and changes."""
    folder = tmp_path_factory.mktemp("extended")
    for name in COPIED:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.json"))
        else:
            shutil.copy(source, folder / name)
    for block in blocks(PAGE):
        if block.language == "diff":
            apply(block.code, folder)
        elif block.title is not None:
            path = folder / block.title
            assert not path.exists(), f"{block.title}: exists already"
            path.write_text(block.code, encoding="utf-8")
    return folder


def apply(diff: str, folder: Path) -> None:
    """Replace the only place that has the diff's context and removed lines."""
    _, target, *lines = diff.splitlines()
    path = folder / target.removeprefix("+++ b/")
    text = path.read_text(encoding="utf-8")
    for hunk in re.split(r"^@@.*\n", "\n".join(lines) + "\n", flags=re.M)[1:]:
        before = "".join(line[1:] + "\n" for line in hunk.splitlines() if line[0] in " -")
        after = "".join(line[1:] + "\n" for line in hunk.splitlines() if line[0] in " +")
        assert text.count(before) == 1, f"{path.name}: {text.count(before)} places for\n{before}"
        text = text.replace(before, after)
    path.write_text(text, encoding="utf-8")


def run(command: list[str], folder: Path, settings: dict[str, str] | None = None) -> str:
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"} | (settings or {})
    for name in ("RANK", "WORLD_SIZE", "PYTEST_XDIST_WORKER", "PYTEST_CURRENT_TEST"):
        environment.pop(name, None)
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_the_page_names_its_tests():
    named = {path for _, arguments in COMMANDS for path in arguments.split()}
    assert {block.title for block in blocks(PAGE, "python") if (block.title or "").startswith("tests/")} < named
    assert REBUILDS in COMMANDS


@pytest.mark.parametrize(("settings", "arguments"), [command for command in COMMANDS if command != REBUILDS])
def test_its_tests_pass(copy, settings, arguments):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *shlex.split(arguments)]
    assert " passed" in run(command, copy, dict(setting.split("=") for setting in settings.split()))


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_the_functor_computes_the_divergence(copy):
    source, program = copy / "functor.cpp", copy / "functor"
    source.write_text(FUNCTOR)
    run(["c++", "-std=c++20", "-I", str(copy / "csrc"), "-o", str(program), str(source)], copy)
    lines = [list(map(float, line.split())) for line in run([str(program)], copy).splitlines()]
    for p, q, value, slope in lines:
        assert value == pytest.approx((math.sqrt(p) - math.sqrt(q)) ** 2 / 2, abs=1e-6)
        assert slope == pytest.approx(math.sqrt(p) * (math.sqrt(p) - math.sqrt(q)) / 2, abs=1e-6)


def test_its_recipe_trains(copy):
    for name, seed in (("student", 1), ("teacher", 2)):
        shutil.copytree(tiny_checkpoint("qwen3", seed=seed), copy / name)
    rows = [{"question": f"w{n} w{n + 1}", "answer": f"w{n} w3" if n % 4 else None} for n in range(24)]
    (copy / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "-m", "megatron_gkd", "train", "extended.yaml", "--dataset_cache_dir", "cache"]
    run(command, copy, {"MEGATRON_GKD_IMPL": "torch"})  # the copy's kernels are not built again
    records = [json.loads(line) for line in (copy / "runs/extended/metrics.jsonl").read_text().splitlines()]
    assert [record["divergence"] > 0 for record in records] == [True] * 4
    assert {record["source"] for record in records} == {"dataset", "student"}
    assert all(abs(record["mismatch_kl"]) < 1e-4 for record in records if record["source"] == "student")
