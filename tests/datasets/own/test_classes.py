"""Spellings of one class are refused with their counts, or merged where the settings say so, for every kind of file."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fedveil.core.errors import DataError, SettingsError
from fedveil.core.settings.sections import Data
from fedveil.datasets.own.classes import spelled
from fedveil.datasets.own.local import Source, local
from fedveil.datasets.own.own import own

SPELLINGS = {
    "case": ["ham", "Ham", "HAM"],
    "spaces": ["not spam", "not  spam", "not\u00a0spam"],
    "zero width": ["ham", "ham\u200b", "\ufeffham", "h\u00adam"],
    "composed and decomposed": ["caf\u00e9", "cafe\u0301"],
    "width": ["A", "\uff21"],
    "sharp s": ["STRASSE", "stra\u00dfe"],
    "numbers": ["0", "0.0", "00", "-0", "0e1"],
    "one and a half": ["1.5", "1.50", "15e-1"],
    "truth": ["True", "TRUE", "true"],
    "variation selector": ["\u2764", "\u2764\ufe0f"],
}
APART = ["ham", "hamm", "1", "2", "-1", "1.5", "12345678901234567890", "12345678901234567891", "e", "\u00e9", "\u0939\u093f", "\u0939\u0940"]  # fmt: skip


@pytest.mark.parametrize("kind", SPELLINGS)
def test_spellings_of_one_class_have_one_form(kind):
    assert len({spelled(word) for word in SPELLINGS[kind]}) == 1


def test_different_classes_have_different_forms():
    assert len({spelled(word) for word in APART}) == len(APART)


@given(st.text(max_size=12))
def test_the_form_of_any_label_is_its_own_form(label):
    form = spelled(label)
    assert spelled(str(form)) == form
    assert spelled(f" {label.upper() if label.isascii() else label}\u200b") == form


def csv_of(path, labels):
    path.write_text("label,text\n" + "".join(f'"{label}",text {i}\n' for i, label in enumerate(labels)), "utf-8")
    return path


def npz_of(path, labels):
    path = path.with_suffix(".npz")
    np.savez(path, labels=np.array(labels), features=np.arange(len(labels), dtype=np.float32)[:, None])
    return path


def parquet_of(path, labels):
    pytest.importorskip("pyarrow")
    path = path.with_suffix(".parquet")
    pd.DataFrame({"label": labels, "text": [f"text {i}" for i in range(len(labels))]}).to_parquet(path)
    return path


def folders_of(path, labels):
    for i, label in enumerate(labels):
        (path.with_suffix("") / label).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((2, 2), i, np.uint8)).save(path.with_suffix("") / label / f"{i}.png")
    return path.with_suffix("")


FILES = [csv_of, npz_of, parquet_of, folders_of]
MIXED = ["ham"] * 5 + ["Ham"] * 3 + ["HAM\u200b"] * 2 + ["spam"] * 4 + ["Spam"]


@pytest.mark.parametrize("write", FILES)
def test_a_class_of_several_spellings_is_refused_with_the_number_of_each(tmp_path, write):
    path = write(tmp_path / "a.csv", MIXED)
    with pytest.raises(DataError) as refused:
        own(Data(dataset="own", path=str(path)))
    said = str(refused.value)
    assert said.startswith(str(path))
    assert "label 'Ham' is another spelling of 'ham'" in said
    assert "\n  'ham' (5), 'Ham' (3), 'HAM\\u200b' (2)\n  'spam' (4), 'Spam' (1)\n  data.merge_labels = true" in said


@pytest.mark.parametrize("write", FILES)
def test_merged_spellings_are_the_most_frequent_one_and_are_counted(tmp_path, write):
    path = write(tmp_path / "a.csv", MIXED)
    made = own(Data(dataset="own", path=str(path), merge_labels=True))
    assert made.task.classes == ("ham", "spam")
    assert Counter([*made.train.labels.tolist(), *made.test.labels.tolist()]) == {0: 10, 1: 5}
    assert made.files[-1].startswith(
        "6 labels spelled another way read as one: 'HAM\\u200b' as 'ham', 'Ham' as 'ham', "
    )
    assert "'Spam' as 'spam'" in made.files[-1]


def test_spellings_that_look_alike_are_told_apart_in_the_message(tmp_path):
    path = csv_of(tmp_path / "a.csv", ["caf\u00e9", "caf\u00e9", "cafe\u0301", "bar"])
    with pytest.raises(DataError, match=r"'caf\\xe9' \(2\), 'cafe\\u0301' \(1\)"):
        own(Data(dataset="own", path=str(path)))


def test_two_classes_instead_of_four_is_what_merging_makes_of_mixed_case(tmp_path):
    labels = ["spam", "Ham", "ham ", "HAM"] * 5
    made = own(Data(dataset="own", path=str(csv_of(tmp_path / "a.csv", labels)), merge_labels=True))
    assert made.task.classes == ("ham", "spam")
    assert np.bincount(np.concatenate([made.train.labels, made.test.labels])).tolist() == [15, 5]


def test_numbers_written_in_two_ways_are_one_class(tmp_path):
    path = csv_of(tmp_path / "a.csv", ["0", "1", "0.0", "1.0", "0.0"])
    with pytest.raises(DataError, match=r"'0' \(1\), '0\.0' \(2\)"):
        own(Data(dataset="own", path=str(path)))
    assert own(Data(dataset="own", path=str(path), merge_labels=True)).task.classes == ("0", "1")


def test_spellings_of_training_and_test_data_are_seen_together(tmp_path):
    train = csv_of(tmp_path / "train.csv", ["ham", "spam"] * 3)
    test = csv_of(tmp_path / "test.csv", ["Ham", "SPAM"])
    with pytest.raises(DataError, match=r"test\.csv, line 2: label 'Ham' is another spelling of 'ham'"):
        own(Data(dataset="own", path=str(train), test_path=str(test)))
    made = own(Data(dataset="own", path=str(train), test_path=str(test), merge_labels=True))
    assert made.test.labels.tolist() == [0, 1]


def test_classes_that_are_named_may_be_spelled_alike(tmp_path):
    path = csv_of(tmp_path / "a.csv", ["x2", "x\u00b2", "x2", "x\u00b2"])
    assert own(Data(dataset="own", path=str(path), labels=("x2", "x\u00b2"))).task.classes == ("x2", "x\u00b2")
    with pytest.raises(SettingsError, match="two of these are one class"):
        own(Data(dataset="own", path=str(path), labels=("x2", "x\u00b2"), merge_labels=True))


@pytest.mark.parametrize("label", ["nan", "NaN", "<NA>", "N/A", "null", "NA", "\u200b", "NaT"])
def test_a_label_that_says_that_a_value_is_missing_is_refused(tmp_path, label):
    path = csv_of(tmp_path / "a.csv", ["x", "y", label, label])
    with pytest.raises(DataError, match=r"a\.csv, line 4: label .* \(2 examples\) is how a missing value is written"):
        own(Data(dataset="own", path=str(path)))
    made = own(Data(dataset="own", path=str(path), labels=("x", "y", label)))
    assert made.task.classes == ("x", "y", label)


def test_classes_that_only_look_like_missing_ones_are_read(tmp_path):
    names = ("Na", "None", "Nana", "nil", "no")
    assert own(Data(dataset="own", path=str(csv_of(tmp_path / "a.csv", names * 2)))).task.classes == tuple(
        sorted(names)
    )


# a client's own file on its own machine

RUN = {"dataset": "sms", "clients": 2, "vocabulary": "hashed", "max_tokens": 4}


def test_a_deployed_client_reads_spellings_of_the_classes_of_a_published_data_set_and_says_so(tmp_path):
    path = csv_of(tmp_path / "a.csv", ["Ham", "SPAM", "ham", "spam\u200b"])
    own_classes = {**RUN, "dataset": "own", "path": "x", "labels": ("ham", "spam")}
    with pytest.raises(DataError) as refused:
        local(Data(**own_classes), 0, Source(path), 0)
    assert str(refused.value) == (
        f"{path}, line 2: label 'Ham' is not one of data.labels (ham, spam); data.merge_labels = true reads it as 'ham'"
    )
    for data in (Data(**own_classes, merge_labels=True), Data(**RUN)):
        alone = local(data, 0, Source(path), 0)
        assert alone.client(0)[0].labels.tolist() == [0, 1, 0, 1]
        assert alone.dataset.files == (
            "3 labels spelled another way read as one: 'Ham' as 'ham', 'SPAM' as 'spam', 'spam\\u200b' as 'spam'",
        )


def test_a_deployed_client_with_whole_numbers_as_floats_reads_them_by_value(tmp_path):
    path = csv_of(tmp_path / "a.csv", ["0.0", "1.0"])
    data = Data(dataset="own", path="x", labels=("0", "1"), clients=2, vocabulary="hashed", merge_labels=True)
    assert local(data, 0, Source(path), 1).client(1)[0].labels.tolist() == [0, 1]
    with pytest.raises(DataError, match=r"'0\.0' is not one of data\.labels \(0, 1\); data\.merge_labels = true reads"):
        local(data.model_copy(update={"merge_labels": False}), 0, Source(path), 1)


def test_a_deployed_client_reads_its_file_by_the_columns_of_the_run_and_says_what_it_leaves_out(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("Kind;Text;When\nham;a;1\nham;a;2\n;;\nspam;b;3\n")
    data = Data(dataset="own", path="x", labels=("ham", "spam"), vocabulary="hashed", label_column="kind", clients=1)
    alone = local(data, 0, Source(path), 0)
    assert alone.client(0)[0].labels.tolist() == [0, 1]
    assert alone.dataset.files == (
        "1 empty row left out",
        "1 column beside the text not read: When",
        "labels are those of the column 'kind', which the run names",
        "1 exact repeat left out",
    )
