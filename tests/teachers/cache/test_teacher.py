"""The files of a teacher cache, its index, and the contract of every teacher."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from teachers.contract import (
    CHECKPOINT,
    LAYOUTS,
    MICROBATCHES,
    TeacherContract,
    in_every_rank,
    mesh_of,
    sample,
    score_microbatches,
    transformers_log_probs,
)

from megatron_gkd.checkpoint_format.cache_manifest import FILE, Manifest
from megatron_gkd.data.sample import IGNORED_LABEL
from megatron_gkd.data.vision.image import Image
from megatron_gkd.errors import UserError
from megatron_gkd.teachers.cache.keys import row_key, row_keys
from megatron_gkd.teachers.cache.shards import CachedRow, write_shard
from megatron_gkd.teachers.cache.teacher import NOT_FOUND, TeacherCache
from megatron_gkd.teachers.cache.writer import plan_shards, require_consistent_tags

ROWS = [sample(length, slice(2, None), seed=length) for length in range(4, 14)]
TEXT_KEY, PROMPTED_KEY = "098ac6c0f1d66e7f4857fd52ebf4408a", "e89e432ac22638dffba71f3e7dd4b533"  # of ROWS[0]
MANIFEST = Manifest(k=5, temperature=0.9, tokenizer="t", teacher="big", vocab_size=200_000)


def entry(row, manifest=MANIFEST) -> CachedRow:
    """Ids from the whole of a large vocabulary, most of them above 131072."""
    generator = np.random.default_rng(row.row_id)
    n = row.num_labels
    ids = np.stack([generator.choice(manifest.vocab_size, manifest.k, replace=False) for _ in range(n)])
    log_probs = -np.sort(generator.random((n, manifest.k), dtype=np.float32) * 9, axis=1)
    return CachedRow(ids.astype(np.int32), log_probs, generator.random(n, dtype=np.float32))


def cache_of(folder: Path, *shards, manifest=MANIFEST) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / FILE).write_text(manifest.text())
    for rows in shards:
        write_shard(folder, manifest, row_keys(rows), [entry(row, manifest) for row in rows])
    return folder


class TestKeys:
    def test_a_row_has_the_same_key_wherever_it_stands(self):
        row = ROWS[0]
        assert row_key(row) == row_key(replace(row, row_id=7, source="student", tag="a"))

    def test_the_key_depends_on_all_that_the_teacher_reads(self):
        row = ROWS[3]
        other_labels = row.labels.copy()
        other_labels[2] = IGNORED_LABEL
        others = [
            replace(row, input_ids=row.input_ids[:-1], labels=row.labels[:-1]),
            replace(row, labels=other_labels),
            replace(row, teacher_prompt=row.input_ids[:2]),
            replace(row, teacher_prompt=row.input_ids[:3]),
        ]
        assert len({row_key(one) for one in (row, *others)}) == 5

    def test_the_key_depends_on_what_images_show_and_not_on_where_they_are(self):
        first, other = Image("/a.png", 8, 8, "1"), Image("/a.png", 8, 8, "2")
        row = replace(ROWS[3], images=(first,))
        assert row_key(row) == row_key(replace(row, images=(replace(first, location="/b.png"),)))
        prompted = replace(row, teacher_prompt=row.input_ids[:2], teacher_images=())
        others = [
            ROWS[3],
            replace(row, images=(other,)),
            replace(row, images=(first, first)),
            prompted,
            replace(prompted, teacher_images=None),
            replace(prompted, teacher_images=(first,)),
            replace(prompted, images=(), teacher_images=(first,)),
        ]
        assert len({row_key(one) for one in (row, *others)}) == 8

    def test_rows_of_text_have_the_keys_of_older_caches(self):
        assert row_key(ROWS[0]).hex() == TEXT_KEY
        assert row_key(replace(ROWS[0], teacher_prompt=ROWS[0].input_ids[:2], teacher_images=())).hex() == PROMPTED_KEY


class TestFiles:
    def test_every_row_is_read_as_it_was_written_whatever_shard_has_it(self, tmp_path):
        cache = TeacherCache(cache_of(tmp_path, ROWS[:4], ROWS[4:9]))
        places = cache.find(row_keys(ROWS[::-1]))
        assert (places == NOT_FOUND).tolist() == [True] + [False] * 9 and len(cache) == 9
        for row, place in zip(ROWS[8::-1], places[1:], strict=True):
            found, expected = cache.read(place), entry(row)
            assert (found.ids == expected.ids).all() and (found.log_probs == expected.log_probs).all()
            assert (found.tail == expected.tail).all() and expected.ids.max() > 131072

    @pytest.mark.parametrize("keep", [0.0, 0.3, 0.99])
    def test_a_truncated_shard_is_named(self, tmp_path, keep):
        (shard,) = cache_of(tmp_path, ROWS).glob("*.safetensors")
        shard.write_bytes(shard.read_bytes()[: int(shard.stat().st_size * keep)])
        with pytest.raises(UserError, match=f"{shard.name}: is cut off or damaged"):
            TeacherCache(tmp_path)

    def test_a_changed_byte_is_found_when_its_row_is_read(self, tmp_path):
        (shard,) = cache_of(tmp_path, ROWS).glob("*.safetensors")
        content = bytearray(shard.read_bytes())
        at = content.rindex(entry(ROWS[4]).log_probs.tobytes())
        content[at + 3] ^= 1
        shard.write_bytes(content)
        cache = TeacherCache(tmp_path)
        places = cache.find(row_keys(ROWS))
        cache.read(places[3])
        with pytest.raises(UserError, match=f"{shard.name}: row 4 is damaged"):
            cache.read(places[4])

    def test_a_shard_of_another_cache_is_named(self, tmp_path):
        other = cache_of(tmp_path / "other", ROWS, manifest=replace(MANIFEST, teacher="small"))
        (shard,) = other.glob("*.safetensors")
        folder = cache_of(tmp_path / "cache", ROWS[:2])
        shard.rename(folder / shard.name)
        with pytest.raises(UserError, match=f"{shard.name}: is a shard of another teacher cache"):
            TeacherCache(folder)

    def test_unfinished_files_are_not_read(self, tmp_path):
        (cache_of(tmp_path, ROWS[:2]) / ".rows-0.safetensors.77").write_bytes(b"half")
        assert len(TeacherCache(tmp_path)) == 2

    def test_the_manifest_of_a_text_model_is_as_it_was_before_there_were_images(self):
        assert "images" not in MANIFEST.text()
        assert replace(MANIFEST, images="p").identity != MANIFEST.identity

    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            (None, "there is no manifest.json in it"),
            ("{", "is not that of a teacher cache"),
            (json.dumps({"format": "x", "version": 1}), "must be megatron_gkd teacher cache 1"),
            (MANIFEST.text().replace('"version": 1', '"version": 99'), "score the rows anew"),
            (MANIFEST.text().replace('"k"', '"kk"'), "is not that of a teacher cache"),
        ],
    )
    def test_an_invalid_manifest(self, tmp_path, text, problem):
        if text is not None:
            (tmp_path / FILE).write_text(text)
        with pytest.raises(UserError, match=problem):
            TeacherCache(tmp_path)


class TestPlan:
    def shards(self, folder, rows, **options):
        labels = np.array([row.num_labels for row in rows])
        plan = plan_shards(row_keys(rows), labels, TeacherCache(folder), **{"shard_rows": 4, "k": 5} | options)
        return [shard.tolist() for shard in plan]

    def test_equal_rows_count_once_and_rows_without_labels_not_at_all(self, tmp_path):
        silent = replace(ROWS[0], labels=np.full_like(ROWS[0].labels, IGNORED_LABEL))
        rows = [*ROWS[:3], ROWS[1], silent, *ROWS[3:6]]
        assert self.shards(cache_of(tmp_path), rows) == [[0, 1, 2, 5], [6, 7]]

    def test_existing_rows_do_not_change_the_division(self, tmp_path):
        assert self.shards(cache_of(tmp_path, ROWS[4:8]), ROWS) == [[0, 1, 2, 3], [8, 9]]
        assert self.shards(cache_of(tmp_path, ROWS[:2]), ROWS) == [[2, 3], [8, 9]]

    def test_a_shard_has_no_more_bytes_than_it_may(self, tmp_path, monkeypatch):
        monkeypatch.setattr("megatron_gkd.teachers.cache.writer.SHARD_BYTES", 44 * (2 + 3 + 4))
        assert self.shards(cache_of(tmp_path), ROWS)[:2] == [[0, 1, 2], [3]]

    def test_equal_rows_with_different_tags_are_refused(self):
        keys = row_keys([ROWS[0], ROWS[1], ROWS[0]])
        require_consistent_tags(keys, ["a", "b", "a"])
        with pytest.raises(UserError, match="rows 2 and 0 are the same, but their tags"):
            require_consistent_tags(keys, ["a", "b", "b"])


# ---- the contract, of a cache that transformers has filled

K, TEMPERATURE = 11, 0.7


def fill(folder: Path) -> Path:
    manifest = Manifest(k=K, temperature=TEMPERATURE, tokenizer="t", teacher="transformers", vocab_size=99)
    rows = {row_key(one): one for samples in MICROBATCHES.values() for one in samples if one.num_labels}
    (folder / FILE).write_text(manifest.text())
    entries = []
    for row in rows.values():
        log_probs = transformers_log_probs(CHECKPOINT(), row.input_ids, row.label_positions)
        best = log_probs.topk(K)
        rest = log_probs.scatter(1, best.indices, -torch.inf)
        tail = (rest / TEMPERATURE).logsumexp(-1)
        entries.append(CachedRow(best.indices.int().numpy(), best.values.float().numpy(), tail.float().numpy()))
    write_shard(folder, manifest, row_keys(rows.values()), entries)
    return folder


def results_of(rank, world_size, layout, folder, k):
    from megatron_gkd.teachers.cache.teacher import CachedTeacher, open_cache

    with mesh_of(layout) as mesh:
        return score_microbatches(CachedTeacher(open_cache(folder), mesh, k=k), mesh)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return fill(tmp_path_factory.mktemp("cache"))


class TestCachedTeacher(TeacherContract):
    @pytest.fixture(scope="class", params=LAYOUTS)
    @classmethod
    def results(cls, request, gloo_world, folder):
        return in_every_rank(gloo_world, request.param, results_of, folder, None)


class TestFewerOfTheCachedTokens(TeacherContract):
    """The others join the tail."""

    @pytest.fixture(scope="class", params=LAYOUTS[:1])
    @classmethod
    def results(cls, request, gloo_world, folder):
        return in_every_rank(gloo_world, request.param, results_of, folder, 4)


def topk_of(rank, world_size, layout, folder, rows):
    from megatron_gkd.data.microbatch import collate
    from megatron_gkd.teachers.cache.teacher import CachedTeacher, open_cache

    with mesh_of(layout) as mesh:
        (signal,) = CachedTeacher(open_cache(folder), mesh).score([collate(rows, pad_multiple=1, pad_token_id=0)])
        return signal


def test_ids_of_a_large_vocabulary_reach_the_loss(gloo_world, tmp_path):
    (signal,) = gloo_world(1).run(topk_of, {}, cache_of(tmp_path, ROWS), ROWS[5:2:-1])
    entries = [entry(row) for row in ROWS[5:2:-1]]
    assert signal.ids.tolist() == np.concatenate([one.ids for one in entries]).tolist()
    assert signal.ids.max() > 131072 and signal.ids.dtype == torch.int64
    assert signal.values.tolist() == np.concatenate([one.log_probs for one in entries]).tolist()
    assert signal.tail.tolist() == np.concatenate([one.tail for one in entries]).tolist()
    assert signal.temperature == MANIFEST.temperature


def test_a_missing_row_is_an_error_on_all_ranks(gloo_world, tmp_path):
    folder = cache_of(tmp_path, ROWS, manifest=replace(MANIFEST, vocab_size=99))
    with pytest.raises(UserError, match="row 1 is not in the teacher cache"):
        in_every_rank(gloo_world, "TP2xPP2", results_of, folder, None)
