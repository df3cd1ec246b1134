"""The tokens that end a completion, beside those that the recipe names."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_gkd.config.schema import Recipe
from megatron_gkd.data.end_of_turn import find_end_of_turn, find_marker_of_text
from megatron_gkd.data.report import DataReport
from megatron_gkd.errors import UserError
from megatron_gkd.models.checkpoint import Checkpoint
from megatron_gkd.training.setup import Models


@dataclass(frozen=True)
class CompletionEnds:
    """What ends a completion.

    Attributes:
        token_ids: the EOS of the student's generation_config.json or config.json, that of its tokenizer, where rows are
            conversations the end of a turn of the chat template, and `rollout.stop_token_ids`; rising.
        names: the tokens, for people, in the order of `token_ids`.
        texts: `rollout.stop_words`.
        added: those of `token_ids` that neither the student's configuration nor the recipe names.
        unused_marker: what the chat template ends a turn with, where that is several tokens and ends no completion.
    """

    token_ids: tuple[int, ...]
    names: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    added: tuple[int, ...] = ()
    unused_marker: str | None = None

    @classmethod
    def find(cls, recipe: Recipe, models: Models, report: DataReport | None) -> CompletionEnds:
        """Return what ends the completions of a run.

        Args:
            recipe: of the run.
            models: its checkpoints.
            report: counts of the rows; None where they are not known yet, and may be conversations.

        Raises:
            UserError: an id is beyond the student's vocabulary.
        """
        tokenizer, section = models.tokenizer, recipe.rollout
        _require_known_ids(recipe, models.student)
        named = {*models.student.eos_token_ids, *section.stop_token_ids}
        own, marker = [tokenizer.eos_token_id], None
        if report is None or report.conversations:
            own.append(find_end_of_turn(tokenizer, recipe.data.chat_template_kwargs))
            marker = find_marker_of_text(tokenizer, recipe.data.chat_template_kwargs)
            marker = None if marker in section.stop_words else marker
        # A tokenizer may have more tokens than the model.
        added = {one for one in own if one is not None and one < models.student.vocab_size} - named
        token_ids = tuple(sorted(named | added))
        names = tuple(map(str, tokenizer.convert_ids_to_tokens(list(token_ids))))
        return cls(token_ids, names, section.stop_words, tuple(sorted(added)), marker)

    def warning(self) -> str | None:
        """Return the warning that is due at the start, if there is one."""
        if self.unused_marker is None:
            return None
        return (
            f"the chat template ends a turn with {self.unused_marker}, which is several tokens of the student's "
            "tokenizer and ends no completion; name it in rollout.stop_words"
        )

    def describe(self) -> str:
        """Return all ends for the start report: `<|endoftext|> (0), <|im_end|> (2), 'User:'`."""
        tokens = [f"{name} ({id_})" for name, id_ in zip(self.names, self.token_ids, strict=True)]
        return ", ".join([*tokens, *map(repr, self.texts)]) or "nothing but their length"


def _require_known_ids(recipe: Recipe, student: Checkpoint) -> None:
    """Raise a UserError where an id that ends completions, or `rollout.top_k`, is beyond the student's vocabulary."""
    section, size = recipe.rollout, student.vocab_size
    beyond = [one for one in section.stop_token_ids if one >= size]
    if beyond:
        raise UserError(f"rollout.stop_token_ids = {beyond}: must be ids of the student's vocabulary, below {size}")
    if section.top_k is not None and section.top_k > size:
        raise UserError(f"rollout.top_k = {section.top_k}: must be at most the {size} ids of the student's vocabulary")
    beyond = [one for one in student.eos_token_ids if one >= size]
    if beyond:
        raise UserError(
            f"student.model = {recipe.student.model}: eos_token_id {beyond} of its generation_config.json or "
            f"config.json is beyond its vocabulary of {size} ids"
        )
