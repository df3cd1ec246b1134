"""Evaluate an exported checkpoint with transformers alone."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from megatron_gkd.ops.reference import divergence
from quickstart.problems import Problem, extract_answer
from quickstart.tokenizer import END_OF_TURN

BETA = 0.5  # the symmetric Jensen-Shannon divergence, whatever a student was trained with
MAX_NEW_TOKENS = 64
IGNORED = -100  # the label of a position that is not measured


@dataclass(frozen=True)
class Scores:
    """The measurements of one checkpoint.

    Attributes:
        accuracy: share of problems whose greedy solution ends in the right answer.
        divergence: generalized JSD (BETA) to the teacher, in nats per response token.
        cross_entropy: of the reference solutions, in nats per response token.
    """

    accuracy: float
    divergence: float
    cross_entropy: float


def evaluate(checkpoint: Path, teacher: Path, problems: Sequence[Problem], batch_size: int = 100) -> Scores:
    """Return the scores of a Hugging Face directory; both models compute in fp32 on the CPU."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model, teacher_model = (AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32) for p in (checkpoint, teacher))
    solutions = solve(model, tokenizer, problems, batch_size)
    accuracy = count_right(solutions, [problem.answer for problem in problems]) / len(problems)
    batches = (_encode(tokenizer, problems[i : i + batch_size]) for i in range(0, len(problems), batch_size))
    return Scores(accuracy, *compare(model, teacher_model, batches))


def count_right(solutions: Sequence[str], answers: Sequence[int]) -> int:
    """Return the number of solutions that end in the right answer."""
    return sum(extract_answer(text) == answer for text, answer in zip(solutions, answers, strict=True))


@torch.inference_mode()
def compare(
    model: PreTrainedModel, teacher: PreTrainedModel, batches: Iterable[tuple[dict[str, Tensor], Tensor]]
) -> tuple[float, float]:
    """Return a model's divergence to the teacher and its cross-entropy, in nats per response token.

    Args:
        model: whose scores they are.
        teacher: another model with the same tokenizer.
        batches: the arguments of both models, and labels, int64 [N, L], as of `label_responses`.
    """
    tokens, total_divergence, total_cross_entropy = 0, 0.0, 0.0
    for inputs, labels in batches:
        is_response = labels != IGNORED
        student_logits, teacher_logits = (m(**inputs).logits[is_response] for m in (model, teacher))
        tokens += int(is_response.sum())
        total_divergence += divergence(student_logits, teacher_logits, beta=BETA).sum().item()
        total_cross_entropy += cross_entropy(student_logits, labels[is_response], reduction="sum").item()
    return total_divergence / tokens, total_cross_entropy / tokens


def solve(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], batch_size: int = 100
) -> list[str]:
    """Return greedy solutions."""
    solutions = []
    for begin in range(0, len(problems), batch_size):
        prompts = [_prompt(tokenizer, problem) for problem in problems[begin : begin + batch_size]]
        solutions += generate(model, tokenizer, pad_prompts(tokenizer, prompts))
    return solutions


def pad_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Return ids and attention mask of prompts, padded on the left."""
    return dict(tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False))


@torch.inference_mode()
def generate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, inputs: dict[str, Tensor]) -> list[str]:
    """Return greedy continuations of prompts that are padded on the left."""
    tokens = model.generate(
        **inputs,
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def _prompt(tokenizer: PreTrainedTokenizerBase, problem: Problem) -> str:
    return tokenizer.apply_chat_template(problem.messages()[:1], add_generation_prompt=True, tokenize=False)


def _encode(tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem]) -> tuple[dict[str, Tensor], Tensor]:
    prompts = [_prompt(tokenizer, problem) for problem in problems]
    input_ids, labels = label_responses(tokenizer, prompts, [problem.solution for problem in problems])
    return {"input_ids": input_ids}, labels


def label_responses(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], responses: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Return token ids and labels, int64 [N, L], of prompts and responses.

    Labels are shifted: a position has the next token's id where that is of the response or its end-of-turn token, and
    IGNORED elsewhere. Rows are padded on the right, where causal attention does not look.
    """
    rows = [
        (tokenizer(prompt).input_ids, tokenizer(response + END_OF_TURN).input_ids)
        for prompt, response in zip(prompts, responses, strict=True)
    ]
    longest = max(len(prompt) + len(response) for prompt, response in rows)
    input_ids = torch.full((len(rows), longest), tokenizer.pad_token_id)
    labels = torch.full((len(rows), longest), IGNORED)
    for index, (prompt, response) in enumerate(rows):
        end = len(prompt) + len(response)
        input_ids[index, :end] = torch.tensor(prompt + response)
        labels[index, len(prompt) - 1 : end - 1] = torch.tensor(response)
    return input_ids, labels
