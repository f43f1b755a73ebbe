"""Length and scripts of a prompt, the only facts about it that are kept."""

from __future__ import annotations

import unicodedata

SCRIPTS = (
    "latin", "cyrillic", "greek", "arabic", "hebrew", "devanagari", "thai", "han", "kana",
    "hangul", "other", "none",
)  # fmt: skip
_NAMES = {
    "LATIN": "latin", "FULLWIDTH": "latin", "CYRILLIC": "cyrillic", "GREEK": "greek",
    "ARABIC": "arabic", "HEBREW": "hebrew", "DEVANAGARI": "devanagari", "THAI": "thai",
    "CJK": "han", "IDEOGRAPHIC": "han", "HIRAGANA": "kana", "KATAKANA": "kana",
    "KATAKANA-HIRAGANA": "kana", "HALFWIDTH": "kana", "HANGUL": "hangul",
}  # fmt: skip


def script_shares(text: str) -> dict[str, float]:
    """Shares of a text's letters by script, those above 0; {"none": 1.0} without letters.

    Coarse: a letter's script is the first word of its Unicode name.
    """
    counts: dict[str, int] = {}
    for character in text:
        if unicodedata.category(character)[0] == "L":
            first = unicodedata.name(character, "").split(" ", 1)[0]
            script = _NAMES.get(first, "other")
            counts[script] = counts.get(script, 0) + 1
    total = sum(counts.values())
    if not total:
        return {"none": 1.0}
    return {script: round(count / total, 4) for script, count in sorted(counts.items())}
