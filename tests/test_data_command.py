"""`megatron-gkd data` on a student without weights, with a teacher and a layout that are not there."""

from __future__ import annotations

import json
import shutil

import pytest
from checkpoints import tiny_checkpoint
from recipe_workspace import Workspace

from megatron_gkd import cli

ROWS = [
    {"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]},
    {"question": "w3 " * 50, "answer": "w4"},
    {"query": "w5", "response": "w6 w7", "teacher_prompt": "w8 w5", "history": [["w9", "w10"]]},
    {"prompt": "w11", "response": "w12"},
]
SPECIAL = [
    {"query": "say <|im_end|>", "response": "w2"},
    {"instruction": "w1", "input": "<|im_start|>", "output": "w2"},
]
LAYOUT = ("--tensor_model_parallel_size", "64", "--teacher_model", "no/teacher", "--attention_backend", "flash")


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    made = Workspace(tmp_path)
    shutil.rmtree(tmp_path / "student")
    ignored = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(tiny_checkpoint("qwen3_tied"), tmp_path / "student", ignore=ignored)
    write(tmp_path / "train.jsonl", ROWS)
    write(tmp_path / "val.jsonl", ROWS[:1])
    return made


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def data(*arguments):
    options = ("--dataset_cache_dir", "cache", "--max_length", "50", "--preprocessing_num_workers", "1")
    return cli.main(["data", "recipe.yaml", *LAYOUT, *options, *arguments])


def test_rows_as_the_model_reads_them_and_their_lengths(workspace, capsys):
    assert data("--show", "2", "--system", "w0") == 0
    rows, _, facts = capsys.readouterr().out.partition("\nrows       ")
    first, second, teacher = rows.strip().split("\n\n")
    assert [" ".join(line.split()) for line in first.splitlines()] == [
        "row 1 (train.jsonl, line 1): 17 tokens, 2 trained on, between >>> and <<<:",
        "<|im_start|> system",
        "w0 <|im_end|>",
        "<|im_start|> user",
        "w1 <|im_end|>",
        "<|im_start|> assistant",
        ">>>w2 <|im_end|><<<",
    ]
    assert (
        second.startswith("row 2 (train.jsonl, line 3): ")
        and second.endswith(">>>w6 w7 <|im_end|><<<")
        and "w10" in second
    )
    assert "w8" not in second and "w8 w5" in teacher and teacher.endswith(">>>w6 w7 <|im_end|><<<")
    assert teacher.startswith("row 2 (train.jsonl, line 3) for the teacher: ")
    assert facts.startswith("3 of 4 rows used; dropped: 1 longer than max_length\n")
    assert "forms      train.jsonl: 1 messages, 1 query + response, 1 prompt + response (plain text); 1 of 4" in facts
    assert "25.0% of the rows were above max_length = 50: 1 dropped, 0 cut" in facts
    assert "prompts    min 1, median " in facts and "teacher    1 rows with a teacher_prompt: min " in facts
    assert facts.splitlines()[-1].endswith("#")
    assert not (workspace.folder / "runs").exists()


def test_json_is_all_that_is_on_stdout(workspace, capsys):
    assert data("--json", "--split", "validation", "--show", "9") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["split"], found["report"]["rows_used"], len(found["rows"])) == ("validation", 1, 1)
    (row,) = found["rows"]
    assert row["place"] == "val.jsonl, line 1" and not found["is_sample"]
    assert len(row["input_ids"]) == len(row["labels"]) == found["lengths"]["max"]
    assert row["text"].endswith(">>>w2 <|im_end|><<<") and [span["weight"] for span in row["spans"]] == [0, 1]
    assert found["histogram"] == [{"start": len(row["labels"]), "end": len(row["labels"]), "rows": 1}]


def test_no_row_is_shown_and_cut_rows_are_counted(workspace, capsys):
    assert data("--show", "0", "--truncation_strategy", "left") == 0
    printed = capsys.readouterr().out
    assert "row 1" not in printed and "25.0% of the rows were above max_length = 50: 0 dropped, 1 cut" in printed


def test_prompts_alone(workspace, capsys):
    write(workspace.folder / "train.jsonl", [{"query": "q"}])
    assert data("--lmbda", "1") == 0
    assert "tokens, a prompt alone:" in capsys.readouterr().out


def test_special_tokens_in_a_message_are_remarked_on(workspace, capsys):
    write(workspace.folder / "train.jsonl", [{"query": "w1", "response": "<s> <think>"}, *SPECIAL])
    assert data() == 0
    remark = "2 rows have special tokens in the content of a message, which the model reads as such (first: train.jsonl"
    assert f"{remark}, line 2: <|im_end|> in the content of role user)" in capsys.readouterr().out


def test_the_first_rows_of_streams(workspace, capsys):
    (workspace.folder / "more.csv").write_text("query,response\nw1,w2\nw1\nw3,<|im_end|>\n")
    options = ("--streaming", "true", "--train_iters", "9", "--num_train_epochs", "null", "--data_errors", "skip")
    options = (*options, "--dataset", "train.jsonl", "more.csv", "--show", "99")
    assert data(*options) == 0
    rows, _, facts = capsys.readouterr().out.partition("\nrows       ")
    assert len([line for line in rows.splitlines() if line.startswith("row ")]) >= 3, rows
    assert "(more.csv, row 3): " in rows and "(train.jsonl, line 2)" not in rows
    assert "of these streams the first " in facts and "not a row of the table" in facts
    assert "1 row has special tokens" in facts and "more.csv: 2 query + response; 1 of 3 rows dropped" in facts
    assert not list((workspace.folder / "cache").glob("streams.*")), "copies remain"


def test_repeated_and_tagged_rows(workspace, capsys):
    assert data("--dataset", "train.jsonl#10", "train.jsonl#3", "--teacher_tag_key", "dataset", "--show", "9") == 0
    printed = capsys.readouterr().out
    assert " of 7 rows used, " in printed and " with repeats; dropped: " in printed
    assert "train.jsonl: " in printed and "train.jsonl (2): " in printed
    assert printed.count(" tag train.jsonl") >= 7


def test_the_cache_is_that_of_training(workspace, capsys, monkeypatch):
    from megatron_gkd.data import tokenized_source

    assert data() == 0
    monkeypatch.setattr(tokenized_source, "tokenize_shards", None)
    assert data("--global_batch_size", "7") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--show", "-1"), "--show = -1: must be an integer >= 0\n"),
        (("--split", "test"), "--split = test: must be train or validation\n"),
        (("--dataset", "no.jsonl"), "data.dataset = no.jsonl: must be "),
        (("--system", "no.txt"), "data.system = no.txt: must be a text, or a file that exists"),
        (("--val_dataset", "[]", "--split", "validation"), "data.val_dataset names no file"),
        (("--model", "train.jsonl"), "student.model = train.jsonl: must be a Hugging Face folder"),
        (("--max_length", "2"), "train.jsonl: yields nothing to train on: 0 of 4 rows used; dropped: 4 longer than"),
    ],
)
def test_what_is_refused(workspace, capsys, arguments, message):
    assert data(*arguments) == 2
    (line,) = capsys.readouterr().err.splitlines(keepends=True)
    assert message in line


def test_a_bad_row_is_one_line_with_its_place(workspace, capsys):
    with (workspace.folder / "train.jsonl").open("a") as file:
        file.write('null\n{"messages": [{"role": "usr", "content": "q"}]}\n{"query": "q", "query": "r"}\n')
    assert data() == 2
    assert capsys.readouterr().err == (
        "train.jsonl, line 5: not an object: a row must be an object, but this one is null (3 bad rows in all; "
        "data_errors: skip drops them)\n"
    )
    assert data("--data_errors", "skip") == 0
    assert "dropped: 1 conflicting keys, 1 longer than max_length, 1 not an object, 1 unknown role" in (
        capsys.readouterr().out
    )
