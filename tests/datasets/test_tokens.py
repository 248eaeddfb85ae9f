"""Tokens keep their promises on any text of any script, and are the words that Unicode's own segmentation gives."""

from __future__ import annotations

import re
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedveil.datasets.text import read_sms
from fedveil.datasets.tokens import joined, space, tokenise

any_text = st.text(st.characters(exclude_categories=()), max_size=60)  # lone surrogates too
# of the scripts that have rules of their own
many_scripts = st.text(st.sampled_from("aÉß0٣²_'. \u0301\u0327กำั็ສີកុំမြ東々にーアｶﾞคि़कً\u200cש\u05c1🇯👩🏽\u200d❤\ufe0f鈥\u200b\u200f\u00adİΣ"), max_size=30)  # fmt: skip


def without_marks(raw: str) -> list[str]:
    """The tokens of a text of letters, digits and signs without marks, a character at a time: the slow and obvious way."""
    tokens: list[str] = []
    last = ""
    for character in raw.lower():
        kind = "letter" if character.isalnum() else "space" if character.isspace() else "other"
        if unicodedata.category(character) == "Nd":
            character, kind = "0", "digit"
        if kind in ("letter", "digit") and kind == last:
            tokens[-1] += character
        elif kind != "space":
            tokens.append(character)
        last = kind
    return tokens


def test_the_example_in_the_documentation():
    assert tokenise("Win £1,000!") == ["win", "£", "0", ",", "000", "!"]
    assert tokenise("Don't_stop ٣٤x\n") == ["don", "'", "t", "_", "stop", "00", "x"]
    assert tokenise(" \t\u3000") == []


# latin, greek and cyrillic letters that have no other form, digits, signs
@given(st.text(st.sampled_from("abzÀÉöøßñŁœαωЖяЇ٣७2²½Ⅷ_'\".,;:!?£€…–(/@# \t\n\u3000"), max_size=60))
def test_words_of_letters_without_marks_are_what_they_were_in_the_first_version(raw):
    assert tokenise(raw) == without_marks(raw)


def test_every_real_message_has_the_tokens_that_it_had_in_the_first_version(real_data):
    _, texts = read_sms(real_data / "sms" / "SMSSpamCollection")
    assert sum(not text.isascii() for text in texts) > 400
    assert all(tokenise(text) == without_marks(text) for text in texts)


@given(any_text | many_scripts)
def test_tokens_are_stable_and_hold_no_space(raw):
    tokens = tokenise(raw)
    assert tokenise(" ".join(tokens)) == tokens
    assert tokenise(joined(tokens)) == tokens
    assert not any(token == "" or any(map(str.isspace, token)) for token in tokens)


@given(any_text | many_scripts)
def test_nothing_that_is_seen_is_lost(raw):
    def seen(text: str) -> str:
        text = re.sub(r"\s", "", text.lower().replace("\u200b", " "))
        text = "".join(c for c in text if not ignored(c))
        return re.sub(r"\d", "0", unicodedata.normalize("NFC", text))

    assert sorted(unicodedata.normalize("NFD", "".join(tokenise(raw)))) == sorted(
        unicodedata.normalize("NFD", seen(raw))
    )


def ignored(character: str) -> bool:
    """Whether a sign of format has no form of its own (Unicode's Default_Ignorable_Code_Point, without tags and music)."""
    return bool(re.match("[\u00ad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff]", character))


def test_every_single_character_of_unicode_is_tokenised_stably():
    for code in range(sys.maxunicode + 1):
        tokens = tokenise(chr(code))
        assert tokenise(" ".join(tokens)) == tokens


@pytest.mark.parametrize("language", ["wordless", "words"])
def test_every_letter_with_a_mark_is_whole(language):
    """Marks never stand apart: of all letters with all marks of Unicode's first planes, a sample of each script."""
    marks = [chr(c) for c in range(0x300, 0x1F000) if unicodedata.category(chr(c)) in ("Mn", "Mc", "Me")]
    base = {"wordless": "東", "words": "क"}[language]
    assert len(marks) > 2000
    for mark in marks:
        assert len(tokenise(base + mark + " " + base)) == 2


# as uniseg 0.10.1 splits them by UAX 29 (Unicode 16), but for spaces
WORDS = {
    "Japanese": ("東京へ行く、コーヒーを2杯", "東 京 へ 行 く 、 コーヒー を 0 杯"),
    "half-width kana": ("ｺｰﾋｰを飲む", "ｺｰﾋｰ を 飲 む"),
    "Latin within Japanese": ("iPhoneを買った", "iphone を 買 っ た"),
    "Chinese": ("今天天气很好。", "今 天 天 气 很 好 。"),
    "Thai": ("สวัสดีครับ", "ส วั ส ดี ค รั บ"),
    "Lao": ("ສະບາຍດີ", "ສ ະ ບ າ ຍ ດີ"),
    "Khmer": ("សួស្តី", "សួ ស្ តី"),
    "Burmese": ("မင်္ဂလာပါ", "မ င်္ ဂ လာ ပါ"),
    "Hindi": ("सुन्दर मौसम है।", "सुन्दर मौसम है ।"),
    "Bengali": ("আমার সোনার বাংলা", "আমার সোনার বাংলা"),
    "Tamil": ("வணக்கம் நண்பர்", "வணக்கம் நண்பர்"),
    "Arabic with marks": ("كِتَابٌ جميل", "كِتَابٌ جميل"),
    "Persian, with a joiner": ("می‌خواهم", "می‌خواهم"),
    "Hebrew with points": ("שָׁלוֹם עולם", "שָׁלוֹם עולם"),
    "Korean": ("한국어 텍스트", "한국어 텍스트"),
    "Vietnamese, decomposed": ("tie\u0302\u0301ng Vie\u0323\u0302t", "tiếng việt"),
    "Turkish": ("İstanbul", "i̇stanbul"),
    "emoji": ("👩‍💻👍🏽🇯🇵🇫🇷❤️", "👩‍💻 👍🏽 🇯🇵 🇫🇷 ❤️"),
}


@pytest.mark.parametrize("name", WORDS)
def test_words_are_those_of_unicodes_own_segmentation(name):
    raw, words = WORDS[name]
    assert tokenise(raw) == words.split()


@pytest.mark.parametrize("unseen", ["\u200f", "\u202b", "\u2067", "\u00ad", "\ufeff", "\u2060"])
def test_what_nobody_sees_changes_no_word(unseen):
    assert tokenise(f"{unseen}mo{unseen}ney שָׁ{unseen}לוֹם{unseen}") == ["money", "שָׁלוֹם"]


def test_a_space_of_no_width_ends_a_word():
    assert tokenise("free\u200bmoney") == ["free", "money"]


def test_a_text_for_people_has_spaces_where_its_script_has_them():
    assert joined(tokenise("東京へ行く コーヒー it is 5 สวัสดี")) == "東京へ行くコーヒー it is 0 สวัสดี"
    assert joined(["コーヒー", "ミルク"]) == "コーヒー ミルク"  # two words stay two
    assert [space("", "a"), space("a", "b"), space("東", "京"), space("東", "b")] == ["", " ", "", " "]
