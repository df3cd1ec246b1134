"""The experiment with images: its pictures and rows, its models, and their evaluation."""

import json
import re
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from quickstart.evaluate import compare, extract_answer, generate
from quickstart.images import prepare
from quickstart.images.digits import HEIGHT, NUMBER, SUM, WIDTH, Reading, make_readings
from quickstart.images.evaluate import Encoder, evaluate
from quickstart.images.task import IMAGES
from quickstart.training import Training
from quickstart.word_problems import WORD_PROBLEMS
from transformers import AutoModelForImageTextToText, AutoTokenizer

SHAPE = {
    "text_config": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
    "vision_config": {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2},
}


@pytest.fixture(scope="module")
def splits():
    return prepare.make_splits()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with rows, their pictures, and two untrained models with one tokenizer."""
    directory = tmp_path_factory.mktemp("images")
    prepare.write_readings(directory, "rows", islice(make_readings(3), 30))
    prepare.write_tokenizer(directory / "tokenizer", directory / "rows.jsonl")
    for seed, name in enumerate(("student", "teacher")):
        prepare.write_untrained(directory / name, directory / "tokenizer", SHAPE, seed)
    return directory


def digits_read(reading: Reading) -> tuple[int, int]:
    a, b = re.match(r"(\d)\D+(\d)\.", reading.solution).groups()
    return int(a), int(b)


def answer_of(question: str, digits: tuple[int, int]) -> int:
    return sum(digits) if question == SUM else int("{}{}".format(*digits))


def test_no_picture_is_in_two_splits(splits):
    seeds = [reading.seed for readings in splits.values() for reading in readings]
    assert len(seeds) == len(set(seeds))


@pytest.mark.parametrize("split", ["test", "validation", "teacher_train"])
def test_solutions_read_the_digits_and_answer_the_question(splits, split):
    for reading in splits[split]:
        assert digits_read(reading) == reading.digits
        assert extract_answer(reading.solution) == reading.answer == answer_of(reading.question, reading.digits)


def test_slips_are_as_frequent_as_asked_and_carried_on_while_the_answer_stays_right(splits):
    readings = splits["student_train"]
    wrong = [a != b for reading in readings for a, b in zip(reading.digits, digits_read(reading), strict=True)]
    assert abs(sum(wrong) / len(wrong) - prepare.SLIPS) < 0.03
    for reading in readings:
        assert extract_answer(reading.solution) == answer_of(reading.question, digits_read(reading))
        assert reading.answer == answer_of(reading.question, reading.digits)
    assert {reading.question for reading in readings} == {SUM, NUMBER}


def test_a_picture_is_a_function_of_its_reading_and_shows_both_digits(splits):
    for reading in splits["validation"][:20]:
        picture = np.asarray(reading.draw())
        assert picture.shape == (HEIGHT, WIDTH) and np.array_equal(picture, np.asarray(reading.draw()))
        left, right = picture[:, : WIDTH // 2], picture[:, WIDTH // 2 :]
        assert min((left > 100).sum(), (right > 100).sum()) >= 5


def test_readings_and_pictures_survive_their_files(written):
    readings = list(prepare.read_readings(written / "rows.jsonl"))
    assert readings == list(islice(make_readings(3), 30))
    for line, reading in zip((written / "rows.jsonl").read_text().splitlines(), readings, strict=True):
        file = written / json.loads(line)["messages"][0]["content"][0]["image"]
        assert np.array_equal(np.asarray(Image.open(file)), np.asarray(reading.draw()))


def test_a_digit_is_one_token(written):
    tokenizer = AutoTokenizer.from_pretrained(written / "tokenizer")
    assert tokenizer.tokenize("4+9=13") == ["4", "+", "9", "=", "1", "3"]


def test_a_row_is_within_the_recipes_length(written, splits):
    input_ids, _ = Encoder(written / "student").encode_rows(splits["validation"])
    assert input_ids["input_ids"].shape[1] <= 64


def test_an_untrained_model_reads_nothing_and_differs_from_another_but_not_from_itself(written):
    readings = list(prepare.read_readings(written / "rows.jsonl"))
    student, teacher = written / "student", written / "teacher"
    apart, same = evaluate(student, teacher, readings), evaluate(teacher, teacher, readings)
    assert apart.accuracy == 0
    assert apart.divergence > 1e-3
    assert same.divergence == pytest.approx(0, abs=1e-6)


def test_batches_are_scored_and_continued_as_their_rows_are_alone(written):
    """Padding, and the order of images in a batch, change nothing."""
    model, encoder = AutoModelForImageTextToText.from_pretrained(written / "student"), Encoder(written / "student")
    teacher = AutoModelForImageTextToText.from_pretrained(written / "teacher")
    readings = list(prepare.read_readings(written / "rows.jsonl"))[:4]
    assert {reading.question for reading in readings} == {SUM, NUMBER}
    together = compare(model, teacher, [encoder.encode_rows(readings)])
    alone = compare(model, teacher, [encoder.encode_rows([reading]) for reading in readings])
    assert together == pytest.approx(alone, rel=1e-5)
    texts = generate(model, encoder.tokenizer, encoder.encode_prompts(readings))
    assert texts == [
        text for reading in readings for text in generate(model, encoder.tokenizer, encoder.encode_prompts([reading]))
    ]


def test_the_picture_matters(written):
    encoder = Encoder(written / "student")
    model = AutoModelForImageTextToText.from_pretrained(written / "student")
    inputs, labels = encoder.encode_rows([next(make_readings(5))])
    with torch.no_grad():
        seen = model(**inputs).logits
        blank = model(**{**inputs, "pixel_values": torch.zeros_like(inputs["pixel_values"])}).logits
    assert (seen - blank)[labels >= 0].abs().max() > 1e-4


def test_a_training_is_repeated_where_its_pictures_change(written):
    training = Training("Training", "images_ce", written / "run", written / "student", written / "rows.jsonl")
    assert {written / "rows.jsonl", written / "rows"} <= set(training.stage().inputs)


@pytest.mark.parametrize("shape", [prepare.TEACHER, prepare.STUDENT], ids=["teacher", "student"])
def test_two_tensor_parallel_ranks_can_divide_the_models(shape):
    assert shape["text_config"]["num_attention_heads"] % 2 == 0
    assert shape["text_config"]["intermediate_size"] % 2 == 0


def test_files_of_the_package_that_decide_results_exist():
    for task in (IMAGES, WORD_PROBLEMS):
        assert all(isinstance(path, Path) and path.is_file() for path in [*task.code, *task.evaluation_code])
