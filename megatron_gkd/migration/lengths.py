"""The lengths of tools that count prompt and completion apart, as lengths of whole sequences."""

from __future__ import annotations

from typing import Any

from megatron_gkd.migration.draft import Draft


def join_lengths(draft: Draft) -> None:
    """Set the longest sequence from the longest prompt and completion, where the student samples.

    ms-swift's and TRL's `max_length` limits a row, of which on-policy steps keep the prompt; a completion follows it.
    """
    leaves = draft.leaves
    prompt, completion = _number(leaves, "max_length"), _number(leaves, "max_completion_length")
    if not prompt or not completion or not leaves.get("lmbda") or "max_prompt_length" in leaves:
        return
    longest = prompt + completion
    engine = _number(leaves, "vllm_max_model_len") if leaves.get("engine") == "vllm" else None
    if engine and completion < engine < longest:
        prompt = engine - completion
    elif engine and engine < longest:
        draft.drop("vllm_max_model_len", f"a prompt with its completion may have {longest} tokens")
    elif engine and engine > longest:
        leaves.pop("vllm_max_model_len")
        draft.notes.append(f"rollout.vllm_max_model_len = null: data.max_length ({longest}), as nothing is longer")
    leaves |= {"max_length": longest, "max_prompt_length": prompt}
    draft.notes.append(
        f"data.max_length = {longest}: limits a prompt with its completion here, and max_prompt_length = {prompt} the "
        "prompt; rows of the data may be as long as max_length, too"
    )


def _number(leaves: dict[str, Any], leaf: str) -> int | None:
    value = leaves.get(leaf)
    return value if isinstance(value, int) and not isinstance(value, bool) else None
