"""Streamed rows, and rows that are grouped by length."""

import pytest

BUFFER = "data.shuffle_buffer_size = 5: needs data.streaming and data.shuffle = true"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ("--streaming --train_iters null --num_train_epochs 1", "train.num_train_epochs = 1: the number of rows is not "
         "known with data.streaming; set train.train_iters in its place"),
        ("--streaming --val_dataset [] --split_dataset_ratio 0.25", "data.split_dataset_ratio = 0.25: the number of "
         "rows is not known with data.streaming; name the validation rows in data.val_dataset"),
        ("--streaming --val_dataset [] --preprocessing_num_workers 4", "data.preprocessing_num_workers = 4: with "
         "data.streaming, rows are tokenized by data.dataloader_num_workers processes; set that key"),
        ("--streaming --dataset [train.jsonl#7]", "data.dataset = train.jsonl#7: data.streaming reads a source from "
         "its start, and can't draw 7 of its rows; leave out #n, or set data.streaming to false"),
        ("--streaming --lmbda 0.5 --prompt_only on_policy_only", "data.prompt_only = on_policy_only: with "
         "data.streaming and distill.lmbda = 0.5, rows that could take the place of prompts are not known; set "
         "distill.lmbda = 1, or data.streaming to false"),
        ("--shuffle_buffer_size 5", BUFFER),
        ("--shuffle_buffer_size 5 --streaming --shuffle false", BUFFER),
        ("--group_by_length --streaming", "data.group_by_length = true: lengths are not known ahead with "
         "data.streaming; set one of the two"),
        ("--group_by_length --shuffle false", "data.group_by_length = true: needs data.shuffle = true, since it "
         "changes the order of the rows"),
        ("--group_by_length --lmbda 1 --num_generations 2", "data.group_by_length = true: with "
         "rollout.num_generations = 2, the completions of a prompt are spread over the steps of a generation; set one "
         "of the two"),
        ("--group_by_length --packing", "data.group_by_length = true: rows of one length pack worse than rows of "
         "several, and data.packing already fills microbatches and balances ranks; set one of the two"),
    ],
)  # fmt: skip
def test_refused(workspace, arguments, problem):
    assert workspace.problems(*arguments.split(), world_size=2) == [problem]


@pytest.mark.parametrize(
    "arguments",
    [
        "--streaming",
        "--streaming --shuffle_buffer_size 5 --dataloader_num_workers 2 --packing",
        "--streaming --shuffle false --preprocessing_num_workers 4",
        "--streaming --lmbda 0.5 --engine megatron",
        "--streaming --lmbda 1 --prompt_only on_policy_only",
        "--group_by_length --micro_batch_size 2",
    ],
)
def test_accepted(workspace, arguments):
    assert workspace.problems(*arguments.split(), world_size=2) == []
