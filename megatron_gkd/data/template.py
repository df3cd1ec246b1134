r"""Rendering of rows with the student's chat template, and the tokens among them that are trained on.

A chat template is a program: it may rewrite earlier turns when later ones exist (Qwen3 removes their <think> blocks),
so a conversation is rendered once, whole, and the assistant turns are searched in that text:

- a turn starts where the generation prompt of the messages before it ends; or, where those render differently on their
  own, at its own header ("<|im_start|>assistant\n"), counted over the whole text;
- it ends with the end-of-turn marker ("<|im_end|>"), which is trained on; the white space after it is not.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_gkd.data.bad_row import BadRow
from megatron_gkd.data.loss_weights import EMPTY_THINK, LossStrategy, shift_weights
from megatron_gkd.data.row_forms import Conversation, PlainText, Row, TokenIds
from megatron_gkd.data.sample import IGNORED_LABEL, shift_labels
from megatron_gkd.data.vision.image import Image
from megatron_gkd.data.vision.placeholders import expand_placeholders, refuse_literals, require_tokens
from megatron_gkd.data.vision.processing import ImageProcessing

Span = tuple[int, int]  # start and end in characters

_OPEN_THINKING = re.compile(r"<think>\s*(</think>\s*)?$")  # some templates end the generation prompt with it
_NO_TOKEN = 2**40
_PROBE = "probe-of-the-chat-template"


@dataclass(frozen=True)
class Markers:
    """The text around an assistant turn: `header` before it and `end_of_turn` after it (either may be empty)."""

    header: str
    end_of_turn: str


class RenderedRow(NamedTuple):
    """A row as tokens.

    Attributes:
        input_ids: int64 [L].
        labels: int64 [L], the shifted labels of the turns that are trained on, and always of the last response; all
            -100 in a prompt alone.
        weights: float32 [L], the weight of the loss of the token that each position predicts, also outside `labels`;
            None where it is 1 for each label and 0 elsewhere.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    weights: np.ndarray | None


@dataclass
class RowRenderer:
    """Render checked rows as token ids, labels and weights.

    Attributes:
        tokenizer: the student's fast tokenizer.
        strategy: which tokens are trained on.
        template_kwargs: arguments of the chat template; those of a row win over them.
        vocab_size: number of ids that every model of the run can read; None: of the tokenizer's tokens.
        processing: what the student's processor makes of images; None where it reads text alone.
    """

    tokenizer: PreTrainedTokenizerBase
    strategy: LossStrategy = field(default_factory=LossStrategy)
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    vocab_size: int | None = None
    processing: ImageProcessing | None = None

    def __call__(self, row: Row, images: Sequence[Image] = ()) -> RenderedRow:
        """Render a row.

        Args:
            row: what is rendered.
            images: those that the row refers to, in order.

        Raises:
            BadRow: "chat template", "not Unicode", "foreign token id", "number of images", "placeholder in a text" or
                "loss": the row cannot be rendered, its turns or images cannot be found, its ids are of another
                vocabulary, or the wrong message has a loss of its own.
        """
        rendered = self._tokenize(row)
        if self.processing is not None:
            rendered = self._put_images(row, images, rendered)
        input_ids = rendered.input_ids
        most = (len(self.tokenizer) if self.vocab_size is None else self.vocab_size) - 1
        foreign = input_ids[(input_ids < 0) | (input_ids > most)]
        if len(foreign):
            token = self.tokenizer.convert_ids_to_tokens(int(foreign[0])) if 0 <= foreign[0] < 2**31 else None
            named = "" if token is None else f" ({token!r})"
            reason = f"{foreign[0]}{named} is none of the ids that all models of the run have, which are 0 to {most}"
            raise BadRow("foreign token id", reason)
        is_plain = rendered.weights is None or np.array_equal(rendered.weights, rendered.labels != IGNORED_LABEL)
        return rendered._replace(weights=None) if is_plain else rendered

    def _put_images(self, row: Row, images: Sequence[Image], rendered: RenderedRow) -> RenderedRow:
        """Return the row with the tokens of `images`, which token ids have already. None of them is trained on."""
        assert self.processing is not None
        input_ids, labels, weights = rendered
        if isinstance(row, TokenIds):
            require_tokens(row.prompt, images, self.processing)
            require_tokens(row.response or [], (), self.processing)
            return RenderedRow(input_ids, labels, self._without_images(input_ids, weights))
        texts = [value for name, value in vars(row).items() if name not in ("images", "teacher_images")]
        refuse_literals(texts, self.processing, self.tokenizer)
        expanded, labels = expand_placeholders(input_ids, labels, images, self.processing)
        if weights is not None:
            # In place of labels, numbers that are no token id: they show where the expansion puts each position.
            _, origins = expand_placeholders(input_ids, np.arange(len(input_ids)) + _NO_TOKEN, images, self.processing)
            weights = np.where(origins == IGNORED_LABEL, 0, weights[np.maximum(origins - _NO_TOKEN, 0)])
        return RenderedRow(expanded, labels, self._without_images(expanded, weights))

    def _without_images(self, input_ids: np.ndarray, weights: np.ndarray | None) -> np.ndarray | None:
        if weights is None or self.processing is None:
            return weights
        is_image = np.isin(input_ids, self.processing.reserved_ids)
        return np.where(np.append(is_image[1:], False), 0, weights).astype(np.float32)

    def _tokenize(self, row: Row) -> RenderedRow:
        if isinstance(row, TokenIds):
            return self._token_ids(row)
        return self._plain_text(row) if isinstance(row, PlainText) else self._conversation(row)

    def _token_ids(self, row: TokenIds) -> RenderedRow:
        try:
            input_ids = np.array(row.prompt + (row.response or []), dtype=np.int64)
        except OverflowError as error:
            raise BadRow("foreign token id", "an id is far above those of any tokenizer") from error
        if row.response is None:
            return _prompt_alone(row.prompt)
        return self._response(input_ids, len(row.prompt), self._count_empty_think(row.response))

    def _plain_text(self, row: PlainText) -> RenderedRow:
        prompt = self._bos + self.encode(row.prompt)["input_ids"]
        if row.response is None:
            return _prompt_alone(prompt)
        response = self.encode(row.response)["input_ids"]
        if self.tokenizer.eos_token_id is not None:
            response = [*response, self.tokenizer.eos_token_id]
        input_ids = np.array(prompt + response, dtype=np.int64)
        return self._response(input_ids, len(prompt), self._count_empty_think(response))

    def _response(self, input_ids: np.ndarray, start: int, ignored: int) -> RenderedRow:
        """Return a row whose response starts at `start` with so many ignored tokens."""
        is_response = np.arange(len(input_ids)) >= start
        weights = np.ones(len(input_ids)) if self.strategy.has_prompts else is_response.astype(np.float64)
        weights[start : start + ignored] = 0
        return RenderedRow(input_ids, shift_labels(input_ids, is_response), shift_weights(weights))

    def _count_empty_think(self, response: list[int]) -> int:
        """Return how many tokens an empty block of thoughts has, with which a response starts that is to be ignored."""
        if not self.strategy.ignores_empty_think:
            return 0
        block = EMPTY_THINK.match(self._decode(response))
        if block is None:
            return 0
        ends = (count for count in range(len(response), 0, -1) if len(self._decode(response[:count])) <= block.end())
        return next(ends, 0)

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _conversation(self, row: Conversation) -> RenderedRow:
        if row.messages[-1]["role"] != "assistant":
            text = self.render_text(row, len(row.messages), add_generation_prompt=True)
            return _prompt_alone(self.encode(text)["input_ids"])
        text = self.render_text(row, len(row.messages))
        turns = [index for index, message in enumerate(row.messages) if message["role"] == "assistant"]
        turn_weights = self.strategy.weigh_turns(row.messages, row.losses)
        spans = {
            turn: self._span(row, text, turn, turns) for turn in turns if turn_weights[turn] > 0 or turn == turns[-1]
        }
        text = text[: spans[turns[-1]][1]]
        encoding = self.encode(text, return_offsets_mapping=True)
        input_ids = np.array(encoding["input_ids"], dtype=np.int64)
        starts = np.array(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2)[:, 0]
        trained = np.zeros(len(input_ids), dtype=bool)
        weights = np.full(len(input_ids), float(self.strategy.has_prompts))
        for turn, (start, end) in spans.items():
            is_turn = (starts >= start) & (starts < end)
            trained |= is_turn
            weights[is_turn] = turn_weights[turn]
            block = EMPTY_THINK.match(text, start, end) if self.strategy.ignores_empty_think else None
            if block is not None:
                weights[is_turn & (starts < block.end())] = 0
        return RenderedRow(input_ids, shift_labels(input_ids, trained), shift_weights(weights))

    def _span(self, row: Conversation, text: str, turn: int, turns: list[int]) -> Span:
        """Return where the assistant turn `row.messages[turn]`, with its end-of-turn marker, is in the `text`."""
        start = self._start(row, text, turn, turns)
        marker = self._markers.end_of_turn
        until_here = text if turn == turns[-1] else self.render_text(row, turn + 1)
        if text.startswith(until_here):
            found = text.rfind(marker, start, len(until_here)) if marker else -1
            return start, len(until_here) if found < 0 else found + len(marker)
        found = text.find(marker, start) if marker else -1
        if found < 0:
            raise BadRow("chat template", f"the end of messages[{turn}] cannot be found in the rendered text")
        return start, found + len(marker)

    def _start(self, row: Conversation, text: str, turn: int, turns: list[int]) -> int:
        prompt = self.render_text(row, turn, add_generation_prompt=True)
        if text.startswith(prompt):
            return len(prompt)
        header = self._markers.header
        ends = [match.end() for match in re.finditer(re.escape(header), text)] if header else []
        if len(ends) != len(turns):
            raise BadRow("chat template", f"the start of messages[{turn}] cannot be found in the rendered text")
        return ends[turns.index(turn)]

    def render_text(self, row: Conversation, count: int, *, add_generation_prompt: bool = False) -> str:
        """Return the text of the first `count` messages."""
        if count == 0:
            raise BadRow("chat template", "messages[0] is an assistant turn; a message must precede it")
        if self.tokenizer.chat_template is None:
            raise BadRow("chat template", "the tokenizer has none; write rows as `prompt` and `response` text")
        kwargs = {**self.template_kwargs, **row.template_kwargs}
        try:
            text = self.tokenizer.apply_chat_template(
                row.messages[:count],
                tools=None if row.tools is None else list(row.tools),
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **kwargs,
            )
        except Exception as error:  # a template is code that comes with the model, and raises what it likes
            raise BadRow("chat template", f"it fails for this row: {type(error).__name__}: {error}") from error
        return str(text)  # it is text already, without `tokenize`

    @cached_property
    def _markers(self) -> Markers:
        """The markers, from the rendering of a conversation of two messages."""
        probe = Conversation([{"role": "user", "content": _PROBE}, {"role": "assistant", "content": _PROBE}])
        before = self.render_text(probe, 1)
        prompt = self.render_text(probe, 1, add_generation_prompt=True)
        header = _OPEN_THINKING.sub("", prompt.removeprefix(before)) if prompt.startswith(before) else ""
        tail = self.render_text(probe, 2).rpartition(_PROBE)[2]
        return Markers(header, tail.rstrip())

    @cached_property
    def _bos(self) -> list[int]:
        """The beginning-of-sequence token, where this tokenizer puts one before plain text."""
        bos = self.tokenizer.bos_token_id
        return [bos] if bos is not None and self.tokenizer("", verbose=False)["input_ids"][:1] == [bos] else []

    def encode(self, text: str, **kwargs: Any) -> Any:
        """Return what the tokenizer makes of a text, without special tokens around it."""
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can hold half a surrogate pair; a tokenizer cannot read it
            raise BadRow("not Unicode", f"the text holds {text[error.start]!r}, half of a surrogate pair") from error
        return self.tokenizer(text, add_special_tokens=False, verbose=False, **kwargs)


def _prompt_alone(prompt: list[int]) -> RenderedRow:
    input_ids = np.array(prompt, dtype=np.int64)
    return RenderedRow(input_ids, shift_labels(input_ids, np.zeros(len(input_ids), dtype=bool)), None)
