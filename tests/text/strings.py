"""Random texts of many scripts, the same for the same seed: what tokenizers are compared on."""

from __future__ import annotations

import random
from collections.abc import Iterator

RANGES = [
    (0x20, 0x7E),  # ASCII, the most of it
    (0x30, 0x39),
    (0x00, 0x1F),  # control characters, tabs and line breaks among them
    (0x7F, 0xA0),
    (0xA1, 0x24F),  # Latin with diacritics
    (0x300, 0x36F),  # combining marks
    (0x370, 0x3FF),  # Greek
    (0x400, 0x52F),  # Cyrillic
    (0x531, 0x58F),  # Armenian
    (0x591, 0x5F4),  # Hebrew
    (0x600, 0x6FF),  # Arabic, its digits and marks
    (0x900, 0x97F),  # Devanagari
    (0xE01, 0xE5B),  # Thai
    (0x1780, 0x17F9),  # Khmer
    (0x10A0, 0x10FF),  # Georgian
    (0x1100, 0x11FF),  # Hangul jamo, which compose
    (0x1E00, 0x1FFF),  # Latin and Greek extended
    (0x2000, 0x206F),  # spaces, dashes, zero-width joiners
    (0x2070, 0x218F),  # superscripts, fractions, letterlike signs
    (0x2190, 0x27BF),  # arrows, mathematics, signs
    (0x3000, 0x30FF),  # CJK punctuation, kana
    (0x4E00, 0x9FFF),
    (0xAC00, 0xD7A3),  # Hangul
    (0xE000, 0xE0FF),  # private use
    (0xFB00, 0xFDFF),  # ligatures, Arabic forms
    (0xFE00, 0xFFFD),  # variation selectors, full-width forms, the replacement character
    (0xFFFE, 0xFFFF),  # no characters at all
    (0x10400, 0x104FF),
    (0x1D400, 0x1D7FF),  # mathematical letters and digits
    (0x1F300, 0x1FAFF),  # emoji
    (0x20000, 0x2A6DF),
    (0xE0100, 0xE01EF),
]
_WORDS = (
    "the The DON'T it's we'VE I'll 'S naïve e\u0301 schön Ångström 北京 天安门 こんにちは カタカナ 안녕 Привет мир שלום مرحبا नमस्ते สวัสดี ἄνθρωπος "
    "👨\u200d👩\u200d👧 🇩🇪 ❤️\u200d🔥 🙂🙂 \uff11\uff12\uff13 ½ ² ٣٤ Ⅷ 2024 31415926 3.14 1,000 x1y2 fooBar HTTPServer snake_case <s> </s> [INST] "
    "<|im_end|> <think> \u2581 \u2581\u2581 <0x0A> \ufffd ... !!! -- == => {} (); // ''' `` \\n"
)
WORDS = _WORDS.split(" ")
SPACES = ["", " ", " ", " ", "  ", "   ", " " * 7, " " * 20, *"\n\r\t\u00a0\u3000\u2028\x0b\x85", "\n\n", "\r\n", " \n ", "\n  ", "\t\t"]


def random_strings(count: int, seed: int) -> Iterator[str]:
    """`count` texts of up to a dozen runs: words, one script's characters, digits, spaces, or anything."""
    rng = random.Random(seed)
    for _ in range(count):
        yield "".join(_run(rng) + rng.choice(SPACES) for _ in range(rng.randrange(13)))


def _run(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.45:
        return rng.choice(WORDS)
    if kind < 0.85:
        low, high = rng.choice(RANGES)
        return "".join(chr(rng.randint(low, high)) for _ in range(rng.randrange(1, 9)))
    if kind < 0.95:
        return rng.choice(SPACES) * rng.randrange(1, 5)
    return "".join(chr(_any(rng)) for _ in range(rng.randrange(1, 5)))


def _any(rng: random.Random) -> int:
    code = rng.randrange(0x110000 - 0x800)
    return code if code < 0xD800 else code + 0x800  # no surrogates: no text has them
