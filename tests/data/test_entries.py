"""What becomes of an entry's rows: new names of their keys, preprocessors, and tags."""

import json

import datasets
import pytest

from megatron_gkd.data import plugins, register_dataset, register_preprocessor
from megatron_gkd.data.build import build_dataset
from megatron_gkd.data.entries import EntryOptions, read_entries
from megatron_gkd.data.tokenizing import RowOptions
from megatron_gkd.errors import RunStopped, UserError


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    monkeypatch.setattr(plugins, "_preprocessors", {})
    monkeypatch.setattr(plugins, "_datasets", {})


@pytest.fixture
def texts(tokenizer):
    def make(section):
        dataset, _ = build_dataset(section, "train", tokenizer)
        decoded = (tokenizer.decode(dataset[index].input_ids) for index in range(len(dataset)))
        return [text.removesuffix("<|im_end|>") for text in decoded]

    return make


def set_entry(section, index, **keys):
    for name, value in keys.items():
        setattr(section.dataset[index], name, value)
    return section


class TestColumns:
    def test_keys_get_new_names(self, section, write_jsonl, texts):
        path = write_jsonl(["", [1], {"question": "q ", "answer": "a"}, {"prompt": "p ", "response": "r"}])
        data = section(path, columns={"question": "prompt", "answer": "response"}, data_errors="skip")
        assert texts(data) == ["q a", "p r"]

    def test_an_entry_has_its_own(self, section, write_jsonl, texts):
        first = write_jsonl([{"question": "q ", "answer": "a"}], "first.jsonl")
        second = write_jsonl([{"q": "q ", "a": "b"}], "second.jsonl")
        third = write_jsonl([{"prompt": "q ", "response": "c"}], "third.jsonl")
        data = section(first, second, third, columns={"question": "prompt", "answer": "response"})
        data = set_entry(data, 1, columns={"q": "prompt", "a": "response"})
        assert texts(set_entry(data, 2, columns={})) == ["q a", "q b", "q c"]

    def test_names_change_at_the_same_time_and_replace_others(self):
        options = EntryOptions({"a": "b", "b": "a", "c": "d"})
        assert options.rename({"a": 1, "b": 2, "c": 3, "d": 4, "e": 5}) == {"a": 2, "b": 1, "d": 3, "e": 5}
        assert options.rename({"c": None, "d": 4}) == {"d": 4}

    def test_the_preprocessor_reads_the_new_names(self, section, write_jsonl, texts):
        register_preprocessor("upper")(lambda row: {"prompt": row["q"].upper(), "response": row["a"]})
        path = write_jsonl([{"question": "q ", "answer": "a"}])
        data = section(path, columns={"question": "q", "answer": "a"}, preprocessor="upper")
        assert texts(data) == ["Q a"]

    def test_a_csv_file_with_conversations(self, section, tmp_path, texts):
        messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
        datasets.Dataset.from_dict({"dialog": [json.dumps(messages)]}).to_csv(tmp_path / "rows.csv")
        (text,) = texts(section(tmp_path / "rows.csv", columns={"dialog": "messages"}))
        assert text == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na"

    @pytest.mark.parametrize("kind", ["jsonl", "parquet"])
    def test_a_key_that_no_row_has(self, section, write_jsonl, texts, tmp_path, kind):
        rows = [{"question": "q"}, {"answer": "a"}, {"x": 1}]
        path = write_jsonl([*rows, "{", [2]]) if kind == "jsonl" else tmp_path / "rows.parquet"
        if kind == "parquet":
            datasets.Dataset.from_dict({"question": ["q"], "answer": ["a"], "x": [1]}).to_parquet(path)
        with pytest.raises(RunStopped) as error:
            texts(section(path, columns={"answer": "response", "qestion": "prompt"}))
        assert str(error.value) == (
            f"data.columns = qestion: no row of {path} has this key; its keys are question, answer, x; did you mean "
            "question?"
        )


class TestPreprocessors:
    @pytest.fixture
    def plugin(self, tmp_path, chat):
        (tmp_path / "plugin.py").write_text(
            "from megatron_gkd.data import register_dataset, register_preprocessor\n"
            "def answer(text):\n"
            "    return lambda row: {'prompt': row['q'], 'response': text}\n"
            "register_preprocessor('by_name')(answer('named'))\n"
            "register_preprocessor('by_entry')(answer('entry'))\n"
            f"register_dataset({str(tmp_path / 'mine.jsonl')!r}, columns={{'question': 'q'}})(answer('registered'))\n"
        )
        return str(tmp_path / "plugin.py")

    def test_the_more_specific_one_is_used(self, section, write_jsonl, texts, plugin, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        write_jsonl([{"question": "q "}], "mine.jsonl")
        other = write_jsonl([{"q": "q "}], "other.jsonl")
        data = section("mine.jsonl", other, other, external_plugins=[plugin], preprocessor="by_name")
        assert texts(set_entry(data, 2, preprocessor="by_entry")) == ["q registered", "q named", "q entry"]
        data.dataset[0].preprocessor, data.dataset[0].columns = "by_entry", {"question": "q"}
        assert texts(data)[0] == "q entry"

    def test_an_unknown_one_of_an_entry(self, section, write_jsonl, texts):
        data = set_entry(section(write_jsonl([{"q": "q"}])), 0, preprocessor="nobody")
        with pytest.raises(RunStopped, match=r"^preprocessor 'nobody' is not registered"):
            texts(data)

    @pytest.mark.parametrize(
        ("name", "found"),
        [
            ("owner/name", "owner/name"),
            ("owner/name#5", "owner/name"),
            ("owner/name:main", "owner/name:main"),
            ("owner/name:main:test#5", "owner/name"),
            ("MS::owner/name", "owner/name"),
            ("s3://bucket/x.jsonl#2", "s3://bucket/x.jsonl"),
            ("owner/other", None),
        ],
    )
    def test_names_of_registered_data(self, section, name, found):
        for one in ("owner/name", "owner/name:main", "s3://bucket/x.jsonl"):
            register_dataset(one)(dict)
        (entry,) = read_entries(section(name), "train")
        assert entry.options.dataset == found

    def test_a_data_set_is_registered_once(self):
        register_dataset("owner/name")(dict)
        with pytest.raises(UserError, match="two preprocessors are registered for the data set 'owner/name'"):
            register_dataset("owner/name")(dict)


class TestTags:
    def test_the_tag_is_the_source(self, section, write_jsonl, tokenizer, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        rows = [{"prompt": "q ", "response": "a", "dataset": "not this"}, {"prompt": "q ", "response": "b"}]
        write_jsonl(rows, "a.jsonl")
        write_jsonl(rows, "b.jsonl")
        for options, split in (({}, "train"), ({"split_dataset_ratio": 0.5}, "validation")):
            data = section("a.jsonl", "./b.jsonl#3", **options)
            dataset, _ = build_dataset(data, split, tokenizer, RowOptions(tag_key="dataset"))
            tags = [dataset[index].tag for index in range(len(dataset))]
            assert tags == ["a.jsonl"] * dataset.sizes[0] + ["./b.jsonl"] * dataset.sizes[1]
            assert dataset.tags == {"a.jsonl", "./b.jsonl"}

    def test_another_name_of_a_source_is_another_tag(self, section, write_jsonl, tokenizer, tmp_path, monkeypatch):
        """The rows of both are in the cache, under keys of their own."""
        monkeypatch.chdir(tmp_path)
        write_jsonl([{"prompt": "q ", "response": "a"}], "a.jsonl")
        for name in ("a.jsonl", "./a.jsonl"):
            dataset, _ = build_dataset(section(name), "train", tokenizer, RowOptions(tag_key="dataset"))
            assert dataset[0].tag == name
