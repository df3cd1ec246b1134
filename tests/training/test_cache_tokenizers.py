"""A cache is of the student's tokens where its ids decode to the same bytes, whatever the vocabulary calls them."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
from byte_tokenizers import DEEPSEEK, byte_level_tokenizer, sentencepiece_tokenizer

from megatron_gkd.checkpoint_format.cache_manifest import FILE, Manifest
from megatron_gkd.config.schema import TeacherSection
from megatron_gkd.data.cache import hash_tokenizer
from megatron_gkd.errors import UserError
from megatron_gkd.models.token_bytes import TokenBytes
from megatron_gkd.training.build_teacher import read_manifests


def write_manifest(folder, tokenizer, **changes):
    folder.mkdir(exist_ok=True)
    known = Manifest(4, 1.0, hash_tokenizer(tokenizer), "t", 300, None, TokenBytes.from_tokenizer(tokenizer).digest())
    (folder / FILE).write_text(replace(known, **changes).text())
    return TeacherSection(teacher_cache=str(folder))


def test_a_cache_of_other_names_for_the_same_tokens_is_accepted(tmp_path):
    section = write_manifest(tmp_path, byte_level_tokenizer())
    assert len(read_manifests(section, sentencepiece_tokenizer())) == 1
    of_older_release = write_manifest(tmp_path, byte_level_tokenizer(), vocabulary=None)
    assert len(read_manifests(of_older_release, byte_level_tokenizer())) == 1
    with pytest.raises(UserError, match="of another tokenizer than the student's; score the rows anew"):
        read_manifests(of_older_release, sentencepiece_tokenizer())


def test_a_cache_of_other_control_tokens_needs_check_tokenizers_warn(tmp_path, caplog):
    section = write_manifest(tmp_path, byte_level_tokenizer(DEEPSEEK))
    with pytest.raises(UserError, match="its rows are of another tokenizer than the student's"):
        read_manifests(section, byte_level_tokenizer())
    with caplog.at_level(logging.WARNING, "megatron_gkd"):
        read_manifests(section.model_copy(update={"check_tokenizers": "warn"}), byte_level_tokenizer())
    (record,) = caplog.records
    assert "their ids are taken for the student's (teacher.check_tokenizers = warn)" in record.getMessage()


def test_shards_of_older_releases_are_still_of_their_cache():
    known = Manifest(4, 1.0, "t", "t", 300)
    assert replace(known, vocabulary="v").identity == known.identity
    assert replace(known, images="v").identity != known.identity
