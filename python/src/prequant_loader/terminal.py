"""Text that comes from files, as it may reach a terminal or a log: names can hold what would move the cursor, set the window's
title or turn the line around. The characters are those that `prequant` itself spells out."""

from __future__ import annotations

import re

_UNSEEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e0fff\ud800-\udfff]"
)


def plain(text: str) -> str:
    """The text with all that isn't seen as it stands spelled out, `\\x1b`, lone halves of surrogate pairs too."""
    return _UNSEEN.sub(lambda found: ascii(found[0])[1:-1], text)
