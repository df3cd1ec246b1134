"""Which rows a split has: `#n` and `split_dataset_ratio`."""

from dataclasses import replace

import numpy as np
import pytest

from megatron_gkd.data.build import build_dataset
from megatron_gkd.data.selection import Selection
from megatron_gkd.data.tokenizing import RowOptions
from megatron_gkd.errors import RunStopped

ROWS = np.arange(3, 103)  # the first three are blank lines


def order_of(selection, rows=ROWS):
    chosen = selection.choose(rows)
    order = chosen.order(chosen.rows)
    return chosen.rows if order is None else chosen.rows[order]


class TestSize:
    def test_without_a_size_all_rows_are_used(self):
        assert order_of(Selection()).tolist() == ROWS.tolist()
        assert Selection(seed=5, position=2).key is None

    @pytest.mark.parametrize("size", [1, 40, 99])
    def test_below_the_number_rows_are_drawn_without_replacement(self, size):
        drawn = order_of(Selection(size, seed=1))
        assert len(drawn) == len(set(drawn)) == size and set(drawn) <= set(ROWS)
        assert drawn.tolist() == sorted(drawn)

    @pytest.mark.parametrize("size", [100, 101, 250, 300])
    def test_above_it_whole_passes_are_filled_up_with_a_sample(self, size):
        rows, counts = np.unique(order_of(Selection(size, seed=1)), return_counts=True)
        assert rows.tolist() == ROWS.tolist()
        assert counts.sum() == size and set(counts) <= {size // 100, -(-size // 100)}

    def test_the_draw_is_a_function_of_the_seed_and_the_position(self):
        selection = Selection(40, seed=1)
        drawn = order_of(selection).tolist()
        assert order_of(Selection(40, seed=1)).tolist() == drawn
        others = [replace(selection, seed=2), replace(selection, position=1)]
        assert all(order_of(other).tolist() != drawn for other in others)
        assert len({str(one.key) for one in (selection, *others)}) == 3

    def test_a_larger_draw_has_the_rows_of_a_smaller(self):
        assert set(order_of(Selection(20, seed=1))) < set(order_of(Selection(40, seed=1)))

    def test_samples_of_repeated_rows(self):
        """Row 4 was left out, and row 5 has become two samples."""
        chosen = Selection(250, seed=1).choose(ROWS)
        samples = np.array([3, 5, 5, *range(6, 103)])
        order = samples[chosen.order(samples)]
        counts = dict(zip(*np.unique(order, return_counts=True), strict=True))
        for row in ROWS:
            expected = (3 if row in chosen.rest else 2) * {4: 0, 5: 2}.get(row, 1)
            assert counts.get(row, 0) == expected


class TestRatio:
    @pytest.mark.parametrize(
        ("size", "ratio", "training", "validation"),
        [(None, 0.1, 90, 10), (None, 0.001, 99, 1), (None, 0.999, 1, 99), (50, 0.1, 45, 5), (250, 0.1, 240, 10)],
    )
    def test_validation_rows_are_not_trained_on(self, size, ratio, training, validation):
        selection = Selection(size, ratio, seed=3)
        trained, validated = order_of(selection), order_of(replace(selection, split="validation"))
        assert (len(trained), len(validated)) == (training, validation)
        assert len(set(validated)) == validation and not set(trained) & set(validated)
        if size is None:
            assert set(trained) | set(validated) == set(ROWS)

    @pytest.mark.parametrize(("rows", "size"), [(ROWS[:1], None), (ROWS, 1)])
    def test_one_row_cannot_be_divided(self, rows, size):
        for split in ("train", "validation"):
            with pytest.raises(ValueError, match="1 rows cannot be divided into training and validation"):
                Selection(size, 0.5, split).choose(rows)


class TestSamples:
    @pytest.fixture
    def build(self, section, tokenizer, texts):
        def make(*names, split="train", seed=1, **options):
            dataset, _ = build_dataset(section(*names, **options), split, tokenizer, RowOptions(seed=seed))
            return dataset, texts(dataset)

        return make

    @pytest.fixture
    def texts(self, tokenizer):
        return lambda dataset: [tokenizer.decode(dataset[index].input_ids) for index in range(len(dataset))]

    @pytest.fixture
    def path(self, write_jsonl):
        return write_jsonl(["", *({"prompt": f"{index} ", "response": "a"} for index in range(10))])

    def test_a_draw_keeps_the_places_of_the_rows(self, build, path):
        _, everything = build(path)
        dataset, found = build(f"{path}#4")
        assert len(found) == 4 and dataset.sizes == [4]
        for index, text in enumerate(found):
            line = everything.index(text) + 2
            assert dataset.locate(index) == f"{path}, line {line}" and dataset.source_rows[index] == line - 1
        assert build(f"{path}#4", seed=2)[1] != found == build(f"{path}#4")[1]

    def test_rows_are_repeated(self, build, path):
        dataset, found = build(f"{path}#25")
        _, everything = build(path)
        assert dataset.sizes == [25] and found[:20] == everything * 2
        assert len(set(found[20:])) == 5
        assert dataset.lengths.tolist() == [len(dataset[index].input_ids) for index in range(25)]
        assert dataset.locate(24) == f"{path}, line {everything.index(found[24]) + 2}"

    def test_a_bad_row_of_a_draw_is_reported_by_its_line(self, build, write_jsonl):
        path = write_jsonl([*({"prompt": "q", "response": "a"} for _ in range(9)), "{"])
        problems = set()
        for seed in range(20):
            try:
                build(f"{path}#3", seed=seed)
            except RunStopped as error:
                problems.add(str(error).partition(": not JSON")[0])
        assert problems == {f"{path}, line 10"}

    def test_validation_rows_of_the_training_data(self, build, path):
        options = {"split_dataset_ratio": 0.25}
        training, trained = build(path, **options)
        validation, validated = build(path, split="validation", **options)
        assert (training.sizes, validation.sizes) == ([8], [2])
        assert sorted(trained + validated) == sorted(build(path)[1])
        with pytest.raises(RunStopped, match=rf"^data.split_dataset_ratio = 0.25: {path}: 1 rows cannot be divided"):
            build(f"{path}#1", **options)

    def test_draws_of_several_sources(self, build, path, write_jsonl):
        other = write_jsonl([{"prompt": f"{index} ", "response": "a"} for index in range(10)], "other.jsonl")
        dataset, found = build(f"{path}#5", f"{other}#5", other)
        assert dataset.sizes == [5, 5, 10]
        assert found[:5] != found[5:10]
        assert dataset.locate(12) == f"{other}, line 3"
