"""Evaluate an exported checkpoint with transformers alone."""

from collections.abc import Sequence
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


@torch.inference_mode()
def evaluate(checkpoint: Path, teacher: Path, problems: Sequence[Problem], batch_size: int = 100) -> Scores:
    """Return the scores of a Hugging Face directory; both models compute in fp32 on the CPU."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model, teacher_model = (AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32) for p in (checkpoint, teacher))
    correct = sum(
        extract_answer(text) == problem.answer
        for text, problem in zip(solve(model, tokenizer, problems, batch_size), problems, strict=True)
    )
    tokens, total_divergence, total_cross_entropy = 0, 0.0, 0.0
    for begin in range(0, len(problems), batch_size):
        input_ids, labels = _encode(tokenizer, problems[begin : begin + batch_size])
        is_response = labels != IGNORED
        student_logits, teacher_logits = (m(input_ids).logits[is_response] for m in (model, teacher_model))
        tokens += int(is_response.sum())
        total_divergence += divergence(student_logits, teacher_logits, beta=BETA).sum().item()
        total_cross_entropy += cross_entropy(student_logits, labels[is_response], reduction="sum").item()
    return Scores(correct / len(problems), total_divergence / tokens, total_cross_entropy / tokens)


def solve(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], batch_size: int = 100
) -> list[str]:
    """Return greedy solutions."""
    solutions = []
    for begin in range(0, len(problems), batch_size):
        prompts = [_prompt(tokenizer, problem) for problem in problems[begin : begin + batch_size]]
        batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False)
        tokens = model.generate(
            **batch,
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        solutions += tokenizer.batch_decode(tokens[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
    return solutions


def _prompt(tokenizer: PreTrainedTokenizerBase, problem: Problem) -> str:
    return tokenizer.apply_chat_template(problem.messages()[:1], add_generation_prompt=True, tokenize=False)


def _encode(tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem]) -> tuple[Tensor, Tensor]:
    """Return token ids and labels, int64 [N, L], of prompts and reference solutions.

    Labels are shifted: a position has the next token's id where that is of the solution or its end-of-turn token, and
    IGNORED elsewhere. Rows are padded on the right, where causal attention does not look.
    """
    rows = []
    for problem in problems:
        prompt = tokenizer(_prompt(tokenizer, problem)).input_ids
        rows.append((prompt, tokenizer(problem.solution + END_OF_TURN).input_ids))
    longest = max(len(prompt) + len(solution) for prompt, solution in rows)
    input_ids = torch.full((len(rows), longest), tokenizer.pad_token_id)
    labels = torch.full((len(rows), longest), IGNORED)
    for index, (prompt, solution) in enumerate(rows):
        end = len(prompt) + len(solution)
        input_ids[index, :end] = torch.tensor(prompt + solution)
        labels[index, len(prompt) - 1 : end - 1] = torch.tensor(solution)
    return input_ids, labels
