"""Write what the experiments start from: files of problems, and untrained models as Hugging Face checkpoints."""

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from quickstart.problems import Problem, make_problems

SEED = 2024
TEACHER_ROWS, STUDENT_ROWS, VALIDATION_ROWS, TEST_ROWS, SELF_ROWS = 16000, 1000, 200, 400, 1000
SLIPS = 0.2  # share of wrong calculations in the student's file

# vLLM's attention on CPUs has kernels for heads of 32, among others.
TEACHER = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "head_dim": 32,
}
STUDENT = {
    "hidden_size": 96,
    "intermediate_size": 224,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "head_dim": 32,
}


def make_splits(seed: int = SEED) -> dict[str, list[Problem]]:
    """Return the problems of each split, without a question in two of them.

    Only the student's file has wrong calculations.
    """
    clean = make_problems(seed)
    splits = {
        "test": list(islice(clean, TEST_ROWS)),
        "validation": list(islice(clean, VALIDATION_ROWS)),
        "teacher_train": list(islice(clean, TEACHER_ROWS)),
    }
    known = {problem.question for problems in splits.values() for problem in problems}
    new = (problem for problem in make_problems(seed + 1, SLIPS) if problem.question not in known)
    splits["student_train"] = list(islice(new, STUDENT_ROWS))
    known |= {problem.question for problem in splits["student_train"]}
    return splits | {"self_train": list(islice((p for p in clean if p.question not in known), SELF_ROWS))}


def write_problems(path: Path, problems: Iterable[Problem]) -> None:
    """Write one chat row per line, with the answer beside it."""
    rows = ({"messages": problem.messages(), "answer": problem.answer} for problem in problems)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_with_hints(path: Path, problems: Iterable[Problem]) -> None:
    """Write every problem twice: as it is, and with a hint in the question."""
    rows = []
    for problem in problems:
        question, solution = problem.messages()
        rows += [[question, solution], [{**question, "content": problem.question_with_hint()}, solution]]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows), encoding="utf-8")


def write_for_self(path: Path, problems: Iterable[Problem]) -> None:
    """Write questions without solutions; the student as its own teacher reads the hint."""
    rows = ({"messages": p.messages()[:1], "teacher_prompt": p.question_with_hint()} for p in problems)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_problems(path: Path) -> Iterator[Problem]:
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        user, assistant = row["messages"]
        yield Problem(user["content"], assistant["content"], row["answer"])


def write_data(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    splits = make_splits()
    write_for_self(directory / "self_train.jsonl", splits.pop("self_train"))
    write_with_hints(directory / "reader_train.jsonl", splits["student_train"])
    for name, problems in splits.items():
        write_problems(directory / f"{name}.jsonl", problems)


def write_tokenizer(directory: Path, training_file: Path) -> None:
    from quickstart.tokenizer import train_tokenizer

    problems = read_problems(training_file)
    train_tokenizer(f"{p.question} {p.solution}" for p in problems).save_pretrained(directory)


def write_untrained(directory: Path, tokenizer_directory: Path, shape: dict[str, int], seed: int) -> None:
    """Write a Qwen3 model with random weights and tied embeddings, in fp32, and its tokenizer."""
    import torch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_directory)
    config = Qwen3Config(
        **shape,
        vocab_size=len(tokenizer),
        num_key_value_heads=2,
        max_position_embeddings=256,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        initializer_range=0.04,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    torch.manual_seed(seed)
    Qwen3ForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
