"""Files of rows in several forms: their samples, counts and bad rows."""

import json

import datasets
import pytest

from megatron_gkd.data.build import build_dataset
from megatron_gkd.data.prompt import extract_prompt
from megatron_gkd.data.tokenizing import RowOptions
from megatron_gkd.errors import RunStopped

Q, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
ROWS = [
    {"messages": [Q, A]},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "messages": None},
    {"query": "q", "response": "a", "history": []},
    {"instruction": "q", "input": "", "output": "a"},
]


def build(section, tokenizer, **options):
    return build_dataset(section, "train", tokenizer, RowOptions(**options))


@pytest.fixture
def texts(tokenizer):
    return lambda dataset: [tokenizer.decode(dataset[index].input_ids) for index in range(len(dataset))]


def test_rows_of_all_forms_are_the_same_sample(section, write_jsonl, tokenizer, texts):
    other = write_jsonl([{"prompt": "q", "response": "a"}, {"prompt": "q " * 999, "response": "a"}], "other.jsonl")
    dataset, report = build(section(write_jsonl(ROWS), other), tokenizer)
    assert len(set(texts(dataset)[:4])) == 1 and texts(dataset)[4] == "qa<|im_end|>"
    assert report.forms == {
        "messages": 1,
        "conversations": 1,
        "query + response": 1,
        "instruction + input + output": 1,
        "prompt + response (plain text)": 1,
    }
    first, second = report.describe_forms()
    assert first.endswith(
        "train.jsonl: 1 messages, 1 conversations, 1 query + response, 1 instruction + input + output"
    )
    assert second.endswith("other.jsonl: 1 prompt + response (plain text); 1 of 2 rows dropped")


def test_tables_and_lists_are_read_in_the_same_forms(section, write_jsonl, tokenizer, texts, tmp_path):
    rows = [{"question": "q", "answer": "a", "system": ""}, {"question": "q", "answer": "a", "system": "s"}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    paths = [write_jsonl(rows), tmp_path / "rows.parquet", tmp_path / "rows.json"]
    found = texts(build(section(*paths, system="S"), tokenizer)[0])
    assert found[:2] == found[2:4] == found[4:]
    assert "system\nS<" in found[0] and "system\ns<" in found[1]


def test_the_system_message_is_part_of_the_cache(section, write_jsonl, tokenizer, texts, tmp_path):
    path, file = write_jsonl(ROWS), tmp_path / "system.txt"
    for text in ("one", "two"):
        file.write_text(text + "\n")
        dataset, _ = build(section(path, system=str(file)), tokenizer)
        assert all(f"<|im_start|>system\n{text}<|im_end|>" in whole for whole in texts(dataset))
    with pytest.raises(RunStopped, match=r"data\.system = no\.txt: must be a text, or a file that exists"):
        build(section(path, system="no.txt"), tokenizer)


def test_bad_rows_have_their_lines_whatever_the_preprocessor(section, write_jsonl, tokenizer, tmp_path):
    plugin = tmp_path / "plugin_of_forms.py"
    plugin.write_text(
        "from megatron_gkd.data import register_preprocessor\n"
        "register_preprocessor('same_row')(lambda row: {**row, 'seen': True})\n"
    )
    bad = ["null", "[]", '{"query": "q", "query": "q", "response": "a"}', '{"messages": [], "query": "x"}']
    options = dict(external_plugins=[str(plugin)], preprocessor="same_row", data_errors="skip")
    _, report = build(section(write_jsonl([*ROWS, *bad]), **options), tokenizer)
    assert report.dropped == {"not an object": 2, "conflicting keys": 2} and report.rows_used == 4
    assert report.first_bad_row.endswith(
        "train.jsonl, line 5: not an object: a row must be an object, but this one is null"
    )
    (tmp_path / "rows.json").write_text(f"[{json.dumps(ROWS[0])}, {bad[2]}]")
    with pytest.raises(RunStopped, match=r"rows\.json, row 2: conflicting keys: an object has the key query 2 times"):
        build(section(tmp_path / "rows.json"), tokenizer)


def test_prompts_are_measured_and_cut_rows_counted(section, write_jsonl, chat, tokenizer):
    path = write_jsonl([chat("q " * length, "a", "q", "answer " * length) for length in range(1, 9)])
    whole, _ = build(section(path, max_length=999), tokenizer)
    limit = int(whole.lengths[4])
    for strategy in ("left", "delete"):
        options = dict(truncation_strategy=strategy, max_length=limit)
        dataset, report = build(section(path, **options), tokenizer)
        lengths = [len(extract_prompt(dataset[index])) for index in range(len(dataset))]
        assert dataset.measure_prompts().tolist() == lengths
        assert report.truncated == (0 if strategy == "delete" else 3)
    dataset, _ = build(section(write_jsonl([{"query": "q"}], "p.jsonl")), tokenizer, allows_prompts=True)
    assert dataset.measure_prompts().tolist() == dataset.lengths.tolist()


def test_losses_of_messages_in_other_forms(section, write_jsonl, tokenizer, trained_text):
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "one", "loss": False}]
    rows = [{"conversations": [*turns, {"from": "human", "value": "q"}, {"from": "gpt", "value": "two", "loss": 0.5}]}]
    dataset, _ = build(section(write_jsonl(rows), system="s", loss_scale="default"), tokenizer)
    assert trained_text(tokenizer, dataset[0].labels) == "two<|im_end|>"
    assert set(dataset[0].label_weights[dataset[0].labels >= 0]) == {0.5}
