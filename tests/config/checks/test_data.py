"""Names of data, and which keys of the data go together: one line a mistake."""

import pytest

TAGS = "[{tags: [train.jsonl], teacher_model: teacher}, {tags: [%s], teacher_model: teacher}]"
BY_SOURCE = [
    "--teacher_model",
    "null",
    "--offload_teacher_model",
    "false",
    "--teacher_tag_key",
    "dataset",
    "--teachers",
]


@pytest.mark.parametrize(
    ("arguments", "problems"),
    [
        (["--dataset", "owner/name:main:test#5", "s3://bucket/*.jsonl", "https://host/x", "train.jsonl#9"], []),
        (["--dataset", "./*.jsonl"], []),
        (["--dataset", "none.jsonl#5"], ["data.dataset = none.jsonl#5: must be a file or folder that exists"]),
        (
            ["--dataset", "none"],
            ["data.dataset = none: must be a file or folder that exists, or a hub id (owner/name[:subset][:split])"],
        ),
        (["--dataset", "none/*.jsonl"], ["data.dataset = none/*.jsonl: no file matches this pattern"]),
        (
            ["--val_dataset", "train.jsonl#x"],
            ["data.val_dataset = train.jsonl#x: #x must be a number of rows >= 1 (#500); no file has this name either"],
        ),
        (
            ["--dataset", "rows.txt"],
            [
                "data.dataset = rows.txt: unknown kind of file; allowed are .jsonl, .json, .csv, .tsv, .parquet, "
                ".arrow, text kinds also with .gz, .zst, .xz, .bz2"
            ],
        ),
        (
            ["--split_dataset_ratio", "0.1"],
            ["data.split_dataset_ratio = 0.1: must be 0 with data.val_dataset, which has the validation rows"],
        ),
        (["--split_dataset_ratio", "0.1", "--val_dataset", "[]", "--eval_interval", "5"], []),
        (
            ["--split_dataset_ratio", "0.1", "--val_dataset", "[]", "--dataset", "train.jsonl#5", "train.jsonl#7"],
            [
                "data.split_dataset_ratio = 0.1: data.dataset names train.jsonl 2 times, so that validation rows of "
                "one would be trained on by another; name it once, with a weight"
            ],
        ),
        (
            ["--split_dataset_ratio", "1"],
            ["data.split_dataset_ratio = 1: must be a number in [0, 1)"],
        ),
        (["--columns", "{question: prompt, answer: response}"], []),
        (
            ["--dataset", "{path: train.jsonl, columns: {a: prompt, b: prompt}}"],
            [
                "data.dataset[0].columns = {'a': 'prompt', 'b': 'prompt'}: prompt is the new name of a, b; must be "
                "that of one of them"
            ],
        ),
        ([*BY_SOURCE, TAGS % "val.jsonl"], []),
        (
            [*BY_SOURCE, TAGS % "vall.jsonl"],
            [
                "teacher.teachers[1].tags = ['vall.jsonl']: vall.jsonl is no entry of data.dataset or "
                "data.val_dataset, without #n; did you mean val.jsonl?",
                "data.val_dataset = val.jsonl: no teacher has this tag (teacher.teacher_tag_key = dataset)",
            ],
        ),
        ([*BY_SOURCE, TAGS % "owner/name:main", "--val_dataset", "owner/name:main#8"], []),
    ],
)
def test_data_keys(workspace, arguments, problems):
    (workspace.folder / "rows.txt").write_text("")
    assert workspace.problems(*arguments) == problems
