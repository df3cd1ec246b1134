"""Tokenizers are compared by the bytes of their ids, whatever these are called."""

from __future__ import annotations

import logging

import pytest
from byte_tokenizers import DEEPSEEK, FIRST_ADDED, QWEN, byte_level_tokenizer, sentencepiece_tokenizer
from checkpoints import tiny_tokenizer
from tokenizers import normalizers

from megatron_gkd.errors import UserError
from megatron_gkd.models.token_bytes import TokenBytes, possible_bytes
from megatron_gkd.models.tokenizer_comparison import Difference, compare_tokenizers, list_file, report_differences


def test_equal_tokenizers_have_no_differences():
    assert compare_tokenizers(tiny_tokenizer(), tiny_tokenizer()) == []


def test_ids_that_only_one_has_are_no_differences():
    assert compare_tokenizers(byte_level_tokenizer(QWEN[:2]), byte_level_tokenizer(QWEN)) == []


@pytest.mark.parametrize("build", [byte_level_tokenizer, sentencepiece_tokenizer])
def test_the_bytes_of_a_vocabulary(build):
    vocabulary = TokenBytes.from_tokenizer(build())
    assert [vocabulary.of_id[byte] for byte in range(256)] == [bytes([byte]) for byte in range(256)]
    assert vocabulary.of_id[258] == b" the"
    assert vocabulary.of_id[FIRST_ADDED] == b"<|endoftext|>"
    assert vocabulary.added == set(range(FIRST_ADDED, FIRST_ADDED + len(QWEN)))


def test_the_same_bytes_under_other_names_are_the_same_tokens():
    level, pieces = byte_level_tokenizer(), sentencepiece_tokenizer()
    shared = set(level.get_vocab().items()) & set(pieces.get_vocab().items())
    assert len(shared) < FIRST_ADDED, "the names differ"
    assert compare_tokenizers(level, pieces) == compare_tokenizers(pieces, level) == []
    assert TokenBytes.from_tokenizer(level).digest() == TokenBytes.from_tokenizer(pieces).digest()


def test_renamed_control_tokens_are_listed_by_id():
    found = compare_tokenizers(byte_level_tokenizer(), byte_level_tokenizer(DEEPSEEK))
    assert [one.subject for one in found] == [f"id {FIRST_ADDED + index}" for index in range(5)]
    assert found[1] == Difference(f"id {FIRST_ADDED + 1}", "'<|im_start|>'", "'<｜User｜>'")
    digests = {TokenBytes.from_tokenizer(byte_level_tokenizer(added)).digest() for added in (QWEN, DEEPSEEK)}
    assert len(digests) == 2


def test_a_word_of_sentencepiece_in_an_added_token_is_its_own_text():
    found = TokenBytes.from_tokenizer(sentencepiece_tokenizer(DEEPSEEK))
    assert found.of_id[FIRST_ADDED] == "<｜end▁of▁sentence｜>".encode()


def test_another_segmentation_of_plain_text_is_a_difference():
    other = tiny_tokenizer()
    other.backend_tokenizer.normalizer = normalizers.Replace(" ", "")
    found = compare_tokenizers(tiny_tokenizer(), other)
    assert len(found) == 2 and found[0].subject == "token 1 of 'The 12 quick brown foxes jump over 345 lazy dogs.'"


def test_names_of_an_unknown_vocabulary_stand_for_several_bytes():
    assert b" the" in possible_bytes("Ġthe") and b" the" in possible_bytes("▁the")
    assert b"\xe4" in possible_bytes("<0xE4>") and b"\xe4" in possible_bytes("ä")
    assert b" the" not in possible_bytes("the")


DIFFERENCES = [Difference(f"id {index}", f"'a{index}'", f"'b{index}'") for index in range(25)]


def test_strict_refuses_with_the_number_and_the_first():
    with pytest.raises(UserError) as error:
        report_differences(DIFFERENCES, "teacher.teacher_model = t", "strict")
    assert str(error.value) == (
        "teacher.teacher_model = t: its tokenizer is not the student's: 25 differences, the first are: id 0 is 'a0' "
        "for the student and 'b0' for the teacher; id 1 is 'a1' for the student and 'b1' for the teacher; id 2 is 'a2' "
        "for the student and 'b2' for the teacher; their distributions cannot be compared at these ids: name a teacher "
        "of the student's family, or train all the same with teacher.check_tokenizers = warn"
    )


def test_warn_goes_on_and_writes_the_list(tmp_path, caplog):
    file = list_file(str(tmp_path), "teacher.teachers[1]")
    with caplog.at_level(logging.WARNING, "megatron_gkd"):
        report_differences(DIFFERENCES, "teacher.teacher_model = t", "warn", file)
    (record,) = caplog.records
    message = record.getMessage()
    assert "25 differences, the first are: id 0 is" in message and "id 19 is" in message and "id 20 is" not in message
    assert f"the list is in {tmp_path}/tokenizer_differences.teachers[1].txt" in message and "\n" not in message
    lines = file.read_text().splitlines()
    assert lines[0] == "teacher.teacher_model = t:" and len(lines) == 26
    assert lines[25] == "id 24 is 'a24' for the student and 'b24' for the teacher"


@pytest.mark.parametrize("mode", ["strict", "warn"])
def test_no_differences_are_no_message(mode, caplog):
    report_differences([], "teacher.teacher_model = t", mode)
    assert not caplog.records
