"""Text: vocabularies and word ids; and two data sets of real messages, ham or spam."""

from __future__ import annotations

import gzip
import zlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from fedveil.core.declaration import part
from fedveil.core.errors import DataError
from fedveil.core.examples import Examples, Task
from fedveil.core.foreign import reading
from fedveil.core.settings.sections import Data
from fedveil.datasets import splits
from fedveil.datasets.dataset import DataSet
from fedveil.datasets.published import sources
from fedveil.datasets.tokens import tokenise

PADDING = 0
UNKNOWN = 1
SPECIAL = ("<padding>", "<unknown>")  # no token has this form
HAM_SPAM = ("ham", "spam")
OF_TEXT = ("drop_duplicates", "vocabulary", "vocabulary_size", "max_tokens", "test_fraction")  # keys of [data]
ENRON1_LINES = {"ham": 3672, "spam": 1500}  # first lines of ham.txt and spam.txt; the rest is enron5


def hashed(word: str, size: int) -> int:
    """Return a word's id in a hashed vocabulary, `2 + crc32(word) mod (size - 2)`; different words may share an id."""
    return 2 + zlib.crc32(word.encode("utf-8", "surrogatepass")) % (size - 2)


def listed(words: Sequence[str]) -> Callable[[str], int]:
    """Return the function from a word to its id in a vocabulary, where id i is `words[i]`; other words are UNKNOWN."""
    table = {word: i for i, word in enumerate(words) if i > UNKNOWN}
    return lambda word: table.get(word, UNKNOWN)


def frequent(words: Sequence[str], counts: np.ndarray, size: int) -> tuple[str, ...]:
    """Return the vocabulary of at most `size` ids with the most frequent words, ties in alphabetical order.

    counts: int64 [len(words)]; words with a count of 0 are left out.
    """
    ranked = sorted((i for i in range(len(words)) if counts[i]), key=lambda i: (-counts[i], words[i]))
    return SPECIAL + tuple(words[i] for i in ranked[: size - 2])


def read_vocabulary(path: Path) -> tuple[str, ...]:
    """Read the vocabulary in a UTF-8 file with one word on each line.

    Raise DataError where the file cannot be read or is empty, or a line is repeated or not exactly one token.
    """
    refused = f"data.vocabulary = '{path}': cannot be read"
    with reading(lambda why: DataError(f"{refused}: {why}; give train, hashed, or a file")):
        lines = path.read_text("utf-8-sig").splitlines()
    if not lines:
        raise DataError(f"data.vocabulary = '{path}': the file is empty; it needs one word a line")
    seen: dict[str, int] = {}
    for number, word in enumerate(lines, 1):
        if tokenise(word) != [word]:
            raise DataError(f"{path}, line {number}: {word!r} is not one token; as tokens it is {tokenise(word)}")
        if word in seen:
            raise DataError(f"{path}, line {number}: '{word}' is already on line {seen[word]}; remove one")
        seen[word] = number
    return SPECIAL + tuple(lines)


def encode(texts: Sequence[str], ids: Callable[[str], int], max_tokens: int) -> np.ndarray:
    """Return the word ids of texts, int32 [n, T] with T = min(max_tokens, the longest), padded at the end with PADDING.

    Longer texts are cut; a text without a token is one UNKNOWN. ids: the function from a word to its id, see `listed`
    and `hashed`.
    """
    numbered, words = _number(texts)
    return _pad(numbered, words, ids, max_tokens)


def text_dataset(
    name: str,
    texts: Sequence[str],
    labels: np.ndarray,
    classes: tuple[str, ...],
    split: splits.Split,
    data: Data,
    *,
    groups: np.ndarray | None = None,
    group_names: tuple[str, ...] = (),
    made_up: bool = False,
) -> DataSet:
    """Make a data set of texts and labels (int64 [n]), with the vocabulary that `data.vocabulary` names.

    `train` takes the `data.vocabulary_size - 2` most frequent words of all training texts. That is a simplification, as
    in books: it shows all parties which words occur, which real clients would not reveal. `hashed` reveals nothing; its
    `data.vocabulary_size - 2` buckets are agreed in advance. The words of a file are public, and all are taken.
    split: indices into `texts` to train on and to test on; groups: int64 [n], the source of each text
    Raise DataError where the vocabulary's file is refused.
    """
    train, test = split
    numbered, words = _number(texts)
    vocabulary: tuple[str, ...] | None
    ids: Callable[[str], int]
    if data.vocabulary == "hashed":
        vocabulary, ids = None, partial(hashed, size=data.vocabulary_size)
    else:
        if data.vocabulary == "train":
            counts = np.bincount(np.concatenate([numbered[i] for i in train]), minlength=len(words))
            vocabulary = frequent(words, counts, data.vocabulary_size)
        else:
            vocabulary = read_vocabulary(Path(data.vocabulary).expanduser())
        ids = listed(vocabulary)
    examples = Examples(_pad(numbered, words, ids, data.max_tokens), labels)
    size = len(vocabulary) if vocabulary else data.vocabulary_size
    task = Task("text", examples.features.shape[1:], classes, size)
    kept = None if groups is None else groups[train]
    return DataSet(name, task, examples.take(train), examples.take(test), kept, group_names, vocabulary, made_up)


def distinct(labels: Sequence[int], texts: Sequence[str]) -> np.ndarray:
    """Return the indices, int64, of the examples whose label and text occur there for the first time."""
    first: dict[tuple[int, str], int] = {}
    for i, example in enumerate(zip(labels, texts, strict=True)):
        first.setdefault(example, i)
    return np.fromiter(first.values(), np.int64, len(first))


@part(tasks=("classification of text",), uses=OF_TEXT)
def sms(data: Data) -> DataSet:
    """Load 5,574 English text messages, ham or spam; 403 are exact repeats.

    Almeida, Gomez Hidalgo and Yamakami, "Contributions to the study of SMS spam filtering: new collection and results",
    DocEng 2011. Raise DataError where the file is missing or damaged.
    """
    labels, texts = read_sms(sources.find("sms")["SMSSpamCollection"])
    return _ham_or_spam("sms", labels, texts, data)


def read_sms(path: Path) -> tuple[list[int], list[str]]:
    """Read lines `label<TAB>text` into labels (indices into HAM_SPAM) and texts; quotes have no special meaning.

    Raise DataError, with the line's number, where a line does not have exactly one tab, or has another label.
    """
    labels, texts = [], []
    for number, line in enumerate(_lines(path, "strict"), 1):
        label, *rest = line.split("\t")
        if len(rest) != 1 or label not in HAM_SPAM:
            raise DataError(
                f"{path}, line {number}: must be 'ham' or 'spam', one tab, and the text; it is {line[:60]!r}"
            )
        labels.append(HAM_SPAM.index(label))
        texts.append(rest[0])
    return labels, texts


@part(tasks=("classification of text",), uses=OF_TEXT)
def enron(data: Data) -> DataSet:
    """Load 10,347 e-mails, ham or spam, from two mailboxes: the groups are enron1 and enron5.

    Metsis, Androutsopoulos and Paliouras, "Spam Filtering with Naive Bayes - Which Naive Bayes?", CEAS 2006. Bytes that
    are not UTF-8 are left out. Raise DataError where the files are missing or damaged.
    """
    files = sources.find("enron")
    mails = {label: _lines(files[f"{label}.txt"], "ignore") for label in HAM_SPAM}
    labels = [i for i, label in enumerate(HAM_SPAM) for _ in mails[label]]
    groups = np.concatenate([np.arange(len(mails[label])) >= ENRON1_LINES[label] for label in HAM_SPAM])
    texts = mails["ham"] + mails["spam"]
    return _ham_or_spam("enron", labels, texts, data, groups.astype(np.int64), ("enron1", "enron5"))


def _ham_or_spam(
    name: str,
    labels: list[int],
    texts: list[str],
    data: Data,
    groups: np.ndarray | None = None,
    group_names: tuple[str, ...] = (),
) -> DataSet:
    """Make a data set of real messages: drop exact repeats if `data.drop_duplicates`, then split off the test part."""
    kept = distinct(labels, texts) if data.drop_duplicates else np.arange(len(texts))
    repeats = len(texts) - len(kept)
    made = text_dataset(
        name,
        [texts[i] for i in kept],
        np.array(labels, np.int64)[kept],
        HAM_SPAM,
        splits.shuffled(len(kept), data.test_fraction),
        data,
        groups=None if groups is None else groups[kept],
        group_names=group_names,
    )
    return replace(made, files=(f"{repeats:,} exact repeats left out",) if repeats else ())


def _lines(path: Path, errors: str) -> list[str]:
    """Read the lines of a UTF-8 file, gzipped or not; only LF ends a line, since messages contain other line breaks."""
    with reading(lambda why: DataError(f"{path}: cannot be read: {why}")):
        content = gzip.decompress(path.read_bytes()) if path.name.endswith(".gz") else path.read_bytes()
        return content.decode("utf-8", errors).removesuffix("\n").split("\n")


def _number(texts: Sequence[str]) -> tuple[list[np.ndarray], list[str]]:
    """Return each text as indices, int32 [tokens], into the list of all distinct tokens, and that list."""
    numbers: defaultdict[str, int] = defaultdict()
    numbers.default_factory = numbers.__len__
    numbered = [np.fromiter(map(numbers.__getitem__, tokenise(text)), np.int32) for text in texts]
    return numbered, list(numbers)


def _pad(numbered: list[np.ndarray], words: list[str], ids: Callable[[str], int], max_tokens: int) -> np.ndarray:
    """Turn indices of tokens into word ids, int32 [n, T], as `encode` describes."""
    final = np.array([ids(word) for word in words], np.int32)
    lengths = np.array([max(1, min(len(tokens), max_tokens)) for tokens in numbered], np.int64)
    rows = np.full((len(numbered), lengths.max(initial=1)), PADDING, np.int32)
    for row, tokens in zip(rows, numbered, strict=True):
        if len(tokens):
            row[: len(tokens)] = final[tokens[:max_tokens]]
        else:
            row[0] = UNKNOWN
    return rows
