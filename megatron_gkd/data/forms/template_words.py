"""The words that a chat template compares with: roles are among them."""

from __future__ import annotations

import re

_WORD = re.compile(r"""(['"])([\w-]+)\1""")


def find_template_words(template: object) -> frozenset[str]:
    """Return the quoted words of a tokenizer's chat template: one text, one for each name, or None."""
    return frozenset(word for _, word in _WORD.findall(str(template or "")))
