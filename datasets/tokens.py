"""Tokens of text in any language: words where a script writes spaces, characters where it does not.

These are the words of Unicode's own segmentation (UAX 29, "Unicode Text Segmentation", section 4.1), with two rules of
our own: apostrophes, points and underscores are tokens, and numbers stand apart from letters.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

# First and last code point of each block, or part of one, whose letters are words by themselves: scripts whose lines
# break by a dictionary (UAX 14, class SA), ideographs, and Hiragana.
SINGLE = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F), (0xA9E0, 0xA9FF), (0xAA60, 0xAA7F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x1950, 0x19DF), (0x1A20, 0x1AAF), (0xAA80, 0xAADF), (0x11700, 0x1174F),  # Tai Le, Lue, Tham and Viet, Ahom
    (0x3005, 0x3007), (0x303B, 0x303C), (0x3040, 0x309F), (0x1B001, 0x1B11F), (0x1B150, 0x1B152),  # Hiragana
    # Han; U+9225 is left out: it is a quotation mark of UTF-8 that was read as GBK, and stays in its word
    (0x3400, 0x4DBF), (0x4E00, 0x9224), (0x9226, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFD),
    (0x17000, 0x18DFF), (0x1B170, 0x1B2FF),  # Tangut, Khitan, Nushu
)  # fmt: skip
KATAKANA = (
    (0x3031, 0x3035), (0x30A0, 0x30FF), (0x31F0, 0x31FF), (0xFF66, 0xFF9F), (0x1AFF0, 0x1B000), (0x1B120, 0x1B122),
    (0x1B155, 0x1B167),
)  # fmt: skip
MARKS = (0x0300, 0x1F000), (0xE0100, 0xE01F0)  # where all of Unicode's combining marks lie


def _class(ranges: Iterable[tuple[int, int]]) -> str:
    """Return what stands for these code points within the brackets of a regular expression."""
    return "".join(f"{chr(first)}-{chr(last)}" for first, last in ranges)


# combining marks, the joiners, the five skin colours, and the tags of flags
_MARK = "".join(
    chr(code) for first, end in MARKS for code in range(first, end) if unicodedata.category(chr(code))[0] == "M"
) + _class([(0x200C, 0x200D), (0x1F3FB, 0x1F3FF), (0xE0020, 0xE007F)])
_SINGLE = rf"(?=[{_class(SINGLE)}])[^\W\d_][{_MARK}]*"
_KATAKANA = rf"(?:(?=[{_class(KATAKANA)}])[^\W\d_][{_MARK}]*)+"
_LETTERS = rf"(?:(?![{_class(SINGLE)}{_class(KATAKANA)}])[^\W\d_][{_MARK}]*)+"
_NUMBER = rf"0+[{_MARK}]*"
_FLAG = rf"[\U0001f1e6-\U0001f1ff]{{2}}[{_MARK}]*"
_SIGN = rf"\S[{_MARK}]*(?:(?<=\u200d)[^\w\s][{_MARK}]*)*"  # an emoji may be several, with joiners between them

_DIGIT = re.compile(r"\d")
_ASCII_DIGITS = str.maketrans("123456789", "000000000")
_ASCII_TOKEN = re.compile(r"[a-z]+|0+|\S")
_TOKEN = re.compile("|".join([_SINGLE, _KATAKANA, _LETTERS, _NUMBER, _FLAG, _SIGN]))
_UNSPACED = re.compile(f"{_SINGLE}|{_KATAKANA}"), re.compile(_SINGLE)
# what nobody sees, as signs of direction and soft hyphens
_UNSEEN = re.compile("[\u00ad\u061c\u180e\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff]")


def tokenise(text: str) -> list[str]:
    """Split any text into tokens, without whitespace: `"Win £1,000!" -> ["win", "£", "0", ",", "000", "!"]`.

    Text is lower-cased and composed (NFC), and every decimal digit of any script becomes 0, so that a number shows its
    length only. A run of letters with their marks is a word, a run of digits a number, and every other character, an
    emoji of several code points too, a token by itself. Where a script has no spaces (Chinese, Japanese but for
    Katakana, Thai, Lao, Khmer, Burmese), each letter with its marks is a token: `"東京へ" -> ["東", "京", "へ"]`.
    What nobody sees, as the signs of direction, is left out; a space of no width is a space.
    `tokenise(" ".join(tokens)) == tokens`.
    """
    text = text.lower()
    if text.isascii():
        return _ASCII_TOKEN.findall(text.translate(_ASCII_DIGITS))
    text = unicodedata.normalize("NFC", _UNSEEN.sub("", text.replace("\u200b", " ")))
    return _TOKEN.findall(_DIGIT.sub("0", text))


def joined(tokens: Iterable[str]) -> str:
    """Write tokens as a text for people, with spaces where their scripts have them: `["東", "京", "a"] -> "東京 a"`.

    `tokenise(joined(tokens)) == tokens`.
    """
    written, before = "", ""
    for token in tokens:
        written, before = written + space(before, token) + token, token
    return written


def space(before: str, token: str) -> str:
    """Return what stands between two tokens in a text for people; `before` is empty at its start."""
    unspaced, single = _UNSPACED
    if unspaced.match(before) and unspaced.match(token) and (single.match(before) or single.match(token)):
        return ""
    return " " if before else ""
