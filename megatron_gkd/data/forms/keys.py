"""The keys that hold the prompt and the response of a row, and the choice among several of them."""

from __future__ import annotations

from collections.abc import Sequence, Set
from difflib import get_close_matches
from typing import Any

from megatron_gkd.data.bad_row import BadRow

CONFLICT = "conflicting keys"  # why a row is bad

CONVERSATIONS = ("messages", "conversations", "conversation")
SYSTEMS = (("system",), ("system_prompt",))
# Of each group one key alone may be in a row; where one is, later groups are further keys without a meaning.
PROMPTS = (("prompt", "query"), ("instruction", "question", "problem", "input"))
RESPONSES = (
    ("response", "completion"),
    ("answer", "output", "solution", "target", "targets", "answers", "answer_key"),
    ("text", "content"),
)
ALPACA_RESPONSES = (("response", "completion", "output"), *RESPONSES[1:])
BESIDE_MESSAGES = ("prompt", "query", "instruction", "response", "completion", "output")
"""Keys that no row with messages may have, unless one of its messages has the same content."""

_TOKEN_IDS = ("prompt_token_ids", "response_token_ids", "teacher_prompt_token_ids")
_OTHERS = ("history", "images", "videos", "tools", "teacher_prompt", "teacher_images", "chat_template_kwargs")
_KNOWN = {
    *CONVERSATIONS,
    *_TOKEN_IDS,
    *_OTHERS,
    *(name for group in (*SYSTEMS, *PROMPTS, *RESPONSES) for name in group),
}


def use_known_names(row: dict[str, Any]) -> dict[str, Any]:
    """Return the row without nulls and with the known keys in lower case, and `image` and `video` as lists.

    A key stays as it is where the row has the lower-case one, too.
    """
    row = {key: value for key, value in row.items() if value is not None}
    for key in list(row):
        known = str(key).lower()
        if known != key and known in _KNOWN and known not in row:
            row[known] = row.pop(key)
    for single, several in (("image", "images"), ("video", "videos")):
        if row.get(single) and several not in row:
            row[several] = row[single]
        if isinstance(row.get(several), (str, bytes, dict)):
            row[several] = [row[several]]
    return row


def choose(keys: Set[str], groups: Sequence[Sequence[str]], role: str) -> str | None:
    """Return the key of a row that has the role of `groups`; None where it has none of them.

    Args:
        keys: of the row, the known ones in lower case.
        groups: of keys, the first one first.
        role: what the key holds, for messages: `prompt`.

    Raises:
        BadRow: "conflicting keys": two keys of one group.
    """
    for group in groups:
        found = [name for name in group if name in keys]
        if len(found) > 1:
            raise BadRow(
                CONFLICT,
                f"{' and '.join(found)} may each be the {role}; rename or remove all but one (data.columns: "
                f"{{{found[1]}: unused_{found[1]}}})",
            )
        if found:
            return found[0]
    return None


def describe_missing(row: dict[str, Any]) -> str:
    """Return what a row without messages and prompt needs, what it has, and a near match."""
    keys = sorted(map(str, row))
    prompts = ", ".join(name for group in PROMPTS for name in group)
    needs = f"`messages`, or a prompt ({prompts}) and its `response`"
    return f"a row needs {needs}; this one has {', '.join(keys) or 'nothing'}{near_match(keys, _KNOWN)}"


def describe_missing_response(row: dict[str, Any], prompt: str) -> str:
    """Return that the row with the prompt's key has no response, and a near match of one."""
    responses = {name for group in RESPONSES for name in group}
    near = near_match(sorted(map(str, row.keys() - _KNOWN)), responses)
    return f"the row has a {'prompt' if prompt == 'prompt' else f'prompt ({prompt})'} but no response{near}"


def near_match(keys: Sequence[str], known: Set[str]) -> str:
    """Return `; did you mean messages in place of mesages?`, or nothing where no key is like a known one."""
    for key in keys:
        near = get_close_matches(key.lower(), sorted(known - set(keys)), n=1, cutoff=0.75)
        if key not in known and near:
            return f"; did you mean {near[0]} in place of {key}?"
    return ""
