"""Bad command lines."""

from __future__ import annotations

from bad_inputs.case import Case

CASES = [
    Case("unknown command", "unknown command; did you mean train?", command=("trian", "recipe.yaml")),
    Case("strange command", "unknown command; the commands are", command=("xyzzy",)),
    Case("no recipe", "the recipe's path must come first", command=("train",)),
    Case("key before the recipe", "the recipe's path must come first", command=("train", "--beta", "1")),
    Case("another recipe", "other.yaml: can't be read", command=("train", "other.yaml")),
    Case("unknown key", "unknown key", arguments=("--frobnicate", "1")),
    Case("near key", "did you mean", arguments=("--bta", "1")),
    Case("wrong section", "belongs in the section", arguments=("--train.beta", "1")),
    Case("unknown section", "beta", arguments=("--nonsense.beta", "1")),
    Case("no value", "needs a value", arguments=("--beta",)),
    Case("two values", "takes one value, not 2", arguments=("--beta", "1", "0")),
    Case("empty value", "distill.beta", arguments=("--beta=",)),
    Case("value without a key", "unexpected argument", arguments=("beta",)),
    Case("two dashes alone", "unexpected argument", arguments=("--", "x")),
    Case("value that is no YAML", "beta", arguments=("--beta", "{")),
    Case("NaN", "distill.beta = nan", arguments=("--beta", ".nan")),
    Case("boolean as a number", "data.packing", arguments=("--packing", "2")),
    Case("list for text", "takes one value", arguments=("--output_dir", "a", "b")),
    Case("nproc 0", "nproc", arguments=("--nproc", "0")),
    Case("nproc as text", "nproc", arguments=("--nproc", "two")),
    Case("nproc that does not divide", "train.global_batch_size", arguments=("--nproc", "3")),
    Case(
        "check of a layout",
        "tensor_model_parallel_size",
        command=("check", "recipe.yaml"),
        arguments=("--nproc", "3", "--tensor_model_parallel_size", "2"),
    ),
    Case("plan without GPUs", "--gpus", command=("plan", "recipe.yaml")),
    Case("plan for no GPU", "gpus", command=("plan", "recipe.yaml", "--gpus", "0")),
    Case("plan for an unknown device", "device", command=("plan", "recipe.yaml", "--gpus", "1", "--device", "abacus")),
    Case("score without an output", "--output", command=("score", "recipe.yaml")),
    Case("score without top-k", "gkd_logits_topk", command=("score", "recipe.yaml", "--output", "c")),
    Case("generate from nobody", "from", command=("generate", "recipe.yaml", "--output", "g.jsonl")),
    Case(
        "generate from another", "from", command=("generate", "recipe.yaml", "--from", "oracle", "--output", "g.jsonl")
    ),
    Case(
        "generate into another kind of file",
        ".jsonl",
        command=("generate", "recipe.yaml", "--from", "student", "--output", "g.txt"),
    ),
    Case(
        "generate nothing",
        "n",
        command=("generate", "recipe.yaml", "--from", "student", "--output", "g.jsonl", "--n", "0"),
    ),
    Case("checkpoint without an action", "list", command=("checkpoint",)),
    Case("checkpoint of an unknown action", "checkpoint", command=("checkpoint", "delete", "runs/x")),
    Case("checkpoints of no run", "runs/none", command=("checkpoint", "list", "runs/none")),
    Case("export of no run", "runs/none", command=("checkpoint", "export", "runs/none")),
    Case("resume of nothing", "train.resume", arguments=("--resume", "runs/none")),
    Case("start of nothing", "train.init_from", arguments=("--init_from", "runs/none")),
]
