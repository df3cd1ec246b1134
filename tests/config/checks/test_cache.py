"""Caches that don't fit the recipe are refused before any process starts, from their manifests."""

import json

import pytest

from megatron_gkd.checkpoint_format.cache_manifest import FILE, Manifest

ALONE = ["--offload_teacher_model", "false", "--teacher_model", "null", "--teacher_cache", "cache"]
BESIDE = ["--teacher_cache", "cache"]


@pytest.fixture
def cache(workspace):
    (workspace.folder / "cache").mkdir()
    manifest = Manifest(k=64, temperature=0.7, tokenizer="t", teacher="big", vocab_size=320)
    (workspace.folder / "cache" / FILE).write_text(manifest.text())
    return workspace


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([*ALONE, "--lmbda", "0.5"], "distill.lmbda = 0.5: must be 0 with teacher.teacher_cache alone"),
        (
            [*ALONE, "--gkd_logits_topk", "65"],
            "distill.gkd_logits_topk = 65: must be <= the 64 tokens of teacher.teacher_cache",
        ),
        (
            BESIDE,
            "distill.gkd_logits_topk = null: must be set, and <= 64, as rows of teacher.teacher_cache = cache have so",
        ),
        (
            [*ALONE, "--gkd_logits_topk", "8", "--gkd_topk_tail", "bucket"],
            "distill.temperature = 0.9: must be 0.7 with gkd_topk_tail = bucket and teacher.teacher_cache = cache, ",
        ),
        ([*ALONE, "--teacher_kind", "none"], "teacher.teacher_cache = cache: not with teacher.teacher_kind = none"),
        (
            [*BESIDE, "--teacher_kind", "cache"],
            "teacher.teacher_model = teacher: not with teacher.teacher_kind = cache",
        ),
        (
            [*ALONE[:-1], "null", "--teacher_kind", "cache"],
            "teacher.teacher_cache = null: must name a folder where teacher.teacher_kind = cache",
        ),
        (
            [*ALONE[:-1], "student"],
            "teacher.teacher_cache = student: must be a folder that megatron-gkd score has written",
        ),
    ],
)
def test_refused(cache, arguments, problem):
    found = cache.problems(*arguments)
    assert [line for line in found if line.startswith(problem)], found


def test_a_cache_that_fits_is_accepted(cache):
    assert cache.problems(*ALONE) == []
    assert cache.problems(*ALONE, "--gkd_logits_topk", "64") == []
    bucket = ["--gkd_logits_topk", "8", "--gkd_topk_tail", "bucket", "--temperature", "0.7"]
    assert cache.problems(*ALONE, *bucket) == []
    assert cache.problems(*BESIDE, "--gkd_logits_topk", "64", "--lmbda", "0.5") == []


def test_a_cache_of_another_version(cache):
    path = cache.folder / "cache" / FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 99}))
    (problem,) = cache.problems(*ALONE)
    assert problem.endswith("must be megatron_gkd teacher cache 1: score the rows anew")
