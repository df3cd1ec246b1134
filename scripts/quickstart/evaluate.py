"""How good an exported checkpoint is, measured with transformers alone."""

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


@dataclass(frozen=True)
class Scores:
    accuracy: float  # share of problems whose greedy solution ends in the right answer
    divergence: float  # generalized JSD (BETA) to the teacher, nats a response token
    cross_entropy: float  # of the reference solutions, nats a response token


@torch.inference_mode()
def evaluate(checkpoint: Path, teacher: Path, problems: Sequence[Problem]) -> Scores:
    """Scores of a Hugging Face directory; both models in fp32 on the CPU."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model, teacher_model = (AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32) for p in (checkpoint, teacher))
    correct = sum(
        extract_answer(text) == problem.answer
        for text, problem in zip(solve(model, tokenizer, problems), problems, strict=True)
    )
    tokens, total_divergence, total_cross_entropy = 0, 0.0, 0.0
    for problem in problems:
        input_ids, start = _encode(tokenizer, problem)
        student_logits, teacher_logits = (m(input_ids).logits[0, start - 1 : -1] for m in (model, teacher_model))
        labels = input_ids[0, start:]
        tokens += len(labels)
        total_divergence += divergence(student_logits, teacher_logits, beta=BETA).sum().item()
        total_cross_entropy += cross_entropy(student_logits, labels, reduction="sum").item()
    return Scores(correct / len(problems), total_divergence / tokens, total_cross_entropy / tokens)


def solve(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], batch_size: int = 100
) -> list[str]:
    """Greedy solutions."""
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


def _encode(tokenizer: PreTrainedTokenizerBase, problem: Problem) -> tuple[Tensor, int]:
    """Prompt and reference solution up to its end-of-turn token, int64 [1, L], and the solution's first position."""
    prompt = tokenizer(_prompt(tokenizer, problem)).input_ids
    return torch.tensor([prompt + tokenizer(problem.solution + END_OF_TURN).input_ids]), len(prompt)
