"""A CSV file as people have them is read to the value that pandas reads, or refused with its line and real cause."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedveil.core.errors import DataError, SettingsError
from fedveil.core.settings.sections import Data
from fedveil.datasets.own import csv_file
from fedveil.datasets.own.files import read_table
from fedveil.datasets.own.own import own

MAIL = "label,text\nspam,win now\nham,see you\nham,\u00e9t\u00e9 \u2744\n"


def read(path, content, **settings):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_table(path, Data(**settings))


def refused(path, content, **settings) -> str:
    with pytest.raises(DataError) as error:
        read(path, content, **settings)
    assert str(error.value).startswith(str(path))
    return str(error.value)


def pandas_has(table, path, label="label", **how):
    """Assert that pandas reads the same labels, and the same texts or numbers."""
    frame = pd.read_csv(path, keep_default_na=False, **how)
    frame = frame[[name for name in frame.columns if not name.startswith("Unnamed")]]
    assert table.labels == frame[label].astype(str).str.strip().tolist()
    if table.texts is not None:
        assert table.texts == frame["text"].astype(str).tolist()
        return
    features = frame.drop(columns=label)
    assert table.columns == tuple(features.columns)
    assert np.array_equal(table.features, features.astype(np.float64).to_numpy())


# what the cases in the issue on first faults are


def test_true_and_false_are_1_and_0_as_get_dummies_writes_them(tmp_path):
    frame = pd.DataFrame({"x": [0.5, -1.25, 3.0], "label": ["yes", "no", "yes"], "city": ["Oslo", "Rome", "Oslo"]})
    pd.get_dummies(frame, columns=["city"]).to_csv(tmp_path / "a.csv", index=False)
    table = read_table(tmp_path / "a.csv", Data())
    assert table.columns == ("x", "city_Oslo", "city_Rome")
    assert table.features.tolist() == [[0.5, 1, 0], [-1.25, 0, 1], [3, 1, 0]]
    pandas_has(table, tmp_path / "a.csv")


def test_truth_is_read_as_excel_and_r_write_it_and_no_other_word_is(tmp_path):
    table = read(tmp_path / "a.csv", "label,a,b\nx,TRUE,0.5\ny, false ,True\n")
    assert table.features.tolist() == [[1, 0.5], [0, 1]]
    assert "line 3, column a: must be a finite number, it is 'yes'" in refused(
        tmp_path / "a.csv", "label,a\nx,1\ny,yes\n"
    )


def test_a_quote_that_is_never_closed_is_named_by_its_line(tmp_path):
    rows = [f"ham,note {i}" for i in range(300)]
    rows[5] = 'ham,"note 5'
    said = refused(tmp_path / "q.csv", "label,text\n" + "\n".join(rows) + "\n")
    assert "q.csv, line 7: a quote is opened here and never closed" in said


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('ham,"two\nlines",x\nham,"open', "line 5: a quote is opened here and never closed"),
        ('"ham,a', "line 3: a quote is opened here and never closed"),
        ('ham,"a\nspam,"b"', "line 3: a quote is opened here, and the next one, on line 4, does not end a value"),
        ('ham,"win" now', "line 3: text follows a closing quote"),
        ('ham,"two\nlines" and\nspam,a', "line 3: a quote is opened here, and the next one, on line 4,"),
    ],
)
def test_quotes_that_go_wrong_are_named_by_the_line_where_they_begin(tmp_path, row, said):
    width = ",more" if row.count(",x") else ""
    first = ",1" if width else ""
    assert said in refused(tmp_path / "q.csv", f"label,text{width}\nspam,a{first}\n{row}")


def test_a_tail_of_empty_columns_is_left_out_and_said(tmp_path):
    table = read(tmp_path / "a.csv", "label,text,,,\nspam,win now,,,\nham,see you,,,\nham,short\n")
    assert table.texts == ["win now", "see you", "short"]
    assert table.notes == ("3 empty columns without a name left out",)
    table = read(tmp_path / "a.csv", "label,v,\nx,1,\ny,2,\n")
    assert (table.features.tolist(), table.columns) == ([[1], [2]], ("v",))


def test_a_tail_that_holds_something_is_a_text_without_quotes(tmp_path):
    said = refused(tmp_path / "a.csv", "label,text,,\nspam,win now,,\nham,well, yes,\n")
    assert "line 3: column 3 has no name in the header and is not empty here ('yes')" in said


def test_a_long_cell_is_read_and_the_limit_of_others_is_left(tmp_path):
    long = "word " * 100_000
    assert read(tmp_path / "a.csv", f'label,text\nx,"{long}"\ny,b\n').texts == [long, "b"]
    assert csv_file.csv.field_size_limit() == 131_072


# how a file is written


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le with its mark", "utf-16-be"])
def test_a_file_with_the_mark_of_its_encoding_is_read(tmp_path, encoding):
    content = MAIL.encode(encoding.split()[0])
    content = b"\xff\xfe" + content if "mark" in encoding else content
    content = b"\xfe\xff" + content if encoding == "utf-16-be" else content
    assert read(tmp_path / "a.csv", content).texts == ["win now", "see you", "\u00e9t\u00e9 \u2744"]


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "utf-16-le", "mac-roman", "cp037"])
def test_a_file_without_a_mark_is_read_by_the_encoding_of_the_settings(tmp_path, encoding):
    text = "label,text\nspam,gagn\u00e9\nham,\u00e0 bient\u00f4t\n"
    table = read(tmp_path / "a.csv", text.encode(encoding), encoding=encoding)
    assert table.texts == ["gagn\u00e9", "\u00e0 bient\u00f4t"]
    pandas_has(table, tmp_path / "a.csv", encoding=encoding)


def test_another_encoding_than_utf_8_is_named_with_its_line_and_byte(tmp_path):
    said = refused(tmp_path / "a.csv", MAIL.replace(" \u2744", "").encode("cp1252"))
    assert "a.csv, line 4: not UTF-8 text: byte 0xe9" in said
    assert "data.encoding = 'cp1252'" in said
    far = "label,text\n" + "ham,a\n" * 50_000 + "ham,\u00e9\n" + "ham,a\n" * 50_000
    assert "line 50002: not UTF-8" in refused(tmp_path / "a.csv", far.encode("latin-1"))
    numbers = "label,v\n" + "ham,1\n" * 1000 + "\u00e9,1\n" * 2
    assert "line 1002: not UTF-8" in refused(tmp_path / "a.csv", numbers.encode("latin-1"))


@pytest.mark.parametrize(("encoding", "named"), [("utf-16-le", "utf-16-le"), ("utf-16-be", "utf-16-be")])
def test_utf_16_without_its_mark_is_named(tmp_path, encoding, named):
    assert f"set data.encoding = '{named}'" in refused(tmp_path / "a.csv", MAIL.encode(encoding)).lower()


def test_what_is_no_encoding_or_not_the_files_is_refused(tmp_path):
    for name in ("utf-7000", "hex", "rot13", "a\0b", ""):
        with pytest.raises(SettingsError, match=r"data\.encoding = .*no encoding has this name"):
            read(tmp_path / "a.csv", MAIL, encoding=name)
    assert "leave data.encoding out" in refused(tmp_path / "a.csv", MAIL.encode("utf-16"), encoding="cp1252")
    assert "not ASCII text" in refused(tmp_path / "a.csv", MAIL, encoding="ascii")


@pytest.mark.parametrize("name", ["a.csv.gz", "a.CSV.GZ", "a.bz2", "a.csv.xz", "a.csv"])
def test_a_packed_file_is_read_whatever_it_is_called(tmp_path, name):
    for pack in (gzip.compress, bz2.compress, lzma.compress):
        assert read(tmp_path / name, pack(MAIL.encode("utf-16"))).labels == ["spam", "ham", "ham"]
        numbers = read(tmp_path / name, pack(b"label,v\nx,1\ny,2.5\n"))
        assert numbers.features.tolist() == [[1], [2.5]]


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_a_packed_file_that_is_cut_or_damaged_is_refused(tmp_path, pack):
    whole = pack(os.urandom(3000).hex().encode())
    assert "cannot be unpacked" in refused(tmp_path / "a.csv.gz", whole[: len(whole) // 2])
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 255
    refused(tmp_path / "a.csv.gz", bytes(damaged))


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_the_separator_is_the_one_by_which_the_header_has_a_label(tmp_path, separator):
    table = read(tmp_path / "a.csv", f'label{separator}text\nspam{separator}"a,b;c|d"\nham{separator}see\n')
    assert table.texts == ["a,b;c|d", "see"]
    pandas_has(
        read(tmp_path / "b.csv", f"v{separator}label\n1{separator}x\n2{separator}y\n"),
        tmp_path / "b.csv",
        sep=separator,
    )


def test_a_separator_of_the_settings_is_used(tmp_path):
    assert read(tmp_path / "a.csv", "label^text\nx^a,b\n", separator="^").texts == ["a,b"]
    assert read(tmp_path / "a.csv", "label\ttext\nx\ta,b\n", separator="tab").texts == ["a,b"]
    assert "no column is called 'label'" in refused(tmp_path / "a.csv", "label;text\nx;a\n", separator=",")
    for wrong in ("::", "a", "1", '"', "\n", "", "."):
        with pytest.raises(ValueError, match="must be one character"):
            Data(separator=wrong)


def test_excels_line_of_the_separator_is_read(tmp_path):
    table = read(tmp_path / "a.csv", "\ufeffsep=;\r\nlabel;v\r\nx;1\r\ny;2.5\r\n")
    assert table.features.tolist() == [[1], [2.5]]
    assert table.place(1) == f"{tmp_path / 'a.csv'}, line 4"
    assert read(tmp_path / "a.csv", "sep=,\nlabel,text\nx,a\n", separator=",").texts == ["a"]


def test_a_decimal_comma_is_named(tmp_path):
    said = refused(tmp_path / "a.csv", "label;v\nx;1\ny;2,5\n")
    assert "line 3, column v: must be a finite number, it is '2,5'; write numbers with a decimal point" in said


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_every_line_end_is_read_and_blank_lines_and_rows_are_not(tmp_path, end):
    lines = ["", "label,v,w", "x,1,2", "", "y,3,4", ",,", "  ", " , ,", "x,5,6", ""]
    table = read(tmp_path / "a.csv", end.join(lines) + end)
    assert table.labels == ["x", "y", "x"]
    assert table.features.tolist() == [[1, 2], [3, 4], [5, 6]]
    assert table.notes == ("3 empty rows left out",)
    assert [table.place(i).rpartition(" ")[2] for i in range(3)] == ["3", "5", "9"]


def test_an_example_of_several_lines_is_named_by_its_first(tmp_path):
    said = refused(tmp_path / "a.csv", 'label,text\nx,a\n"","two\nlines"\n')
    assert "line 3, column label: empty" in said


# names of columns


def test_names_are_found_in_another_case_where_only_one_is_like_that(tmp_path):
    assert read(tmp_path / "a.csv", "Label , TEXT\nx,a\ny,b\n").texts == ["a", "b"]
    assert read(tmp_path / "a.csv", "Label,label,v\nx,y,1\n".replace("x,", "2,")).columns == ("Label", "v")
    assert "no column is called 'label'" in refused(tmp_path / "a.csv", "Label,LABEL,v\nx,y,1\n")


def test_the_column_of_labels_is_named_by_the_settings(tmp_path):
    content = "species,width\nsetosa,0.2\nvirginica,1.5\n"
    said = refused(tmp_path / "a.csv", content)
    assert (
        "line 1: no column is called 'label' (species, width); name the column of labels with data.label_column" in said
    )
    table = read(tmp_path / "a.csv", content, label_column="species")
    assert (table.labels, table.columns) == (["setosa", "virginica"], ("width",))
    pandas_has(table, tmp_path / "a.csv", "species")
    assert read(tmp_path / "a.csv", "text,v\nx,1\n", label_column="text").columns == ("v",)


@pytest.mark.parametrize(
    "content",
    ["ham,see you\nspam,win\nham,bye\n", "5,0,0,13\n0,0,1,2\n", "setosa,5.1,3.5\nsetosa,4.9,3.0\n", "5.1,3.5,setosa\n"],
)
def test_a_file_without_a_header_is_named_as_that(tmp_path, content):
    assert "line 1: no column is called 'label', and this line seems to be an example" in refused(
        tmp_path / "a.csv", content
    )


def test_names_that_are_numbers_are_names(tmp_path):
    said = refused(tmp_path / "a.csv", "target,0,1,2\nx,5,6,7\n")
    assert "(target, 0, 1, 2); name the column of labels with data.label_column" in said


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (",label,v", "column 1 has no name (an index that pandas or R wrote?)"),
        ("label,,v", "column 2 has no name; name it"),
        ("label,v,v", "more than one column is called 'v'"),
        ("label,,", "beside its label an example needs"),
    ],
)
def test_a_header_that_leaves_a_column_unclear_is_refused(tmp_path, header, said):
    assert f"a.csv, line 1: {said}" in refused(tmp_path / "a.csv", f"{header}\n0,1,2\n")


def test_columns_beside_the_text_are_counted(tmp_path):
    table = read(tmp_path / "a.csv", "id,label,text,date\n1,x,a,monday\n2,y,b,friday\n")
    assert table.notes == ("2 columns beside the text not read: id, date",)


def test_a_text_that_swallowed_examples_is_counted(tmp_path):
    swallowed = 'label,text\nham,a\nspam,"open\nham,b\nspam,c"\nham,"two\nlines, of which none\nis an example"\n'
    table = read(tmp_path / "a.csv", swallowed)
    assert table.notes == (
        "1 text with lines like examples in it, the first on line 3: a quote that is closed too late?",
    )


def test_a_header_below_other_lines_is_named_by_its_line(tmp_path):
    said = refused(tmp_path / "a.csv", "# exported on Monday\nby,somebody\nlabel,text\nx,a\n")
    assert "the names seem to stand on line 3: leave out the lines above it" in said


def test_excels_unicode_text_is_read(tmp_path):
    assert read(tmp_path / "a.txt", "label\ttext\r\nx\tcaf\u00e9, now\r\n".encode("utf-16")).texts == ["caf\u00e9, now"]


def test_a_table_that_r_wrote_is_read(tmp_path):
    table = read(tmp_path / "a.csv", '"label","v","w"\n"x",1,TRUE\n"y",2.5,FALSE\n')
    assert (table.labels, table.features.tolist()) == (["x", "y"], [[1, 1], [2.5, 0]])


def test_a_long_value_is_cut_in_the_message(tmp_path):
    assert len(refused(tmp_path / "a.csv", f"label,v2\nham,{'go ' * 5000}\n")) < 400
    assert len(refused(tmp_path / "a.csv", f"{'go ' * 5000}\nham\n")) < 700


def test_a_mark_for_thousands_is_named(tmp_path):
    assert "and without a mark for thousands" in refused(tmp_path / "a.csv", 'label,v\nx,"1,234"\n')


def test_columns_of_test_data_that_training_data_lacks_are_counted(tmp_path):
    (tmp_path / "train.csv").write_text("label,v\nx,1\ny,2\n")
    (tmp_path / "test.csv").write_text("w,label,v\n7,x,3\n")
    made = own(Data(dataset="own", path=str(tmp_path / "train.csv"), test_path=str(tmp_path / "test.csv")))
    assert made.test.features.tolist() == [[3]]
    assert made.files == ("test data: 1 column that training data lacks left out: w",)


def test_labels_that_are_numbers_to_be_predicted_are_named(tmp_path):
    (tmp_path / "a.csv").write_text("label,v\n" + "".join(f"{i / 7},{i}\n" for i in range(30)))
    with pytest.raises(DataError, match="labels that are numbers to be predicted are no classes"):
        own(Data(dataset="own", path=str(tmp_path / "a.csv")))


def test_a_value_with_the_separator_and_without_quotes_is_named(tmp_path):
    said = refused(tmp_path / "a.csv", "label,text\nham,well, yes\n")
    assert "line 2: 3 value(s), where the header names 2 columns; a value that holds ',' must stand in quotes" in said


def test_a_zero_byte_is_named_with_its_line(tmp_path):
    assert "line 3: a zero byte" in refused(tmp_path / "a.csv", b"label,text\nx,a\ny,b\0c\n")
    assert "line 3: a zero byte" in refused(tmp_path / "a.csv", b"label,v\nx,1\ny,1\0 2\n")


# the fast way and the slow way

CELLS = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False, width=32).map(repr),
    st.integers(-(10**20), 10**20).map(str),
    st.sampled_from(["", " 1", "1 ", "True", "nan", "1e400", "1e39", "-inf", "1_0", "0x1", "+.5e-3", "\u0661", "x", '"2"', "1,2", "\u00a01"]),
)  # fmt: skip
NUMBERS = st.floats(allow_nan=False, allow_infinity=False, width=32).map(repr)
ROWS = st.one_of(
    st.lists(st.tuples(st.sampled_from(["a", "b ", "1"]), NUMBERS, NUMBERS), min_size=1, max_size=8),
    st.lists(st.tuples(st.sampled_from(["a", " b", "c", "", "\u00e9"]), CELLS, CELLS), min_size=1, max_size=4),
    st.lists(st.lists(st.sampled_from(["a", "1", "2.5", ""]), max_size=5), min_size=1, max_size=4),
)


def outcome(path, monkeypatch, fast: bool, **settings):
    with monkeypatch.context() as patch:
        if not fast:
            patch.setattr(csv_file, "read_fast", lambda *_: None)
        try:
            table = read_table(path, Data(**settings))
        except DataError as error:
            return str(error)
    places = [table.place(i) for i in range(len(table.labels))]
    assert table.features.dtype == np.float64
    return table.labels, table.features.tobytes(), table.sources, table.columns, table.notes, places


@given(ROWS, st.sampled_from(["\n", "\r\n", "\r"]), st.booleans())
def test_the_fast_way_gives_what_the_slow_way_does(tmp_path_factory, rows, end, grouped):
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    header = "label,v,site" if grouped else "label,v,w"
    path.write_bytes((header + end + "".join(",".join(row) + end for row in rows)).encode())
    settings = {"group_column": "site"} if grouped else {}
    patch = pytest.MonkeyPatch()
    assert outcome(path, patch, True, **settings) == outcome(path, patch, False, **settings)


def test_plain_numbers_take_the_fast_way_and_are_floats_of_python_to_the_bit(tmp_path):
    values = np.random.default_rng(0).standard_normal((5000, 3)) * 10.0 ** np.random.default_rng(1).integers(
        -30, 30, (5000, 3)
    )
    lines = [f"{'ab'[i % 2]},{','.join(map(repr, row))}" for i, row in enumerate(values.tolist())]
    (tmp_path / "a.csv").write_text("label,x,y,z\n" + "\n".join(lines))
    data = Data()
    fast = csv_file.read_fast(tmp_path / "a.csv", None, csv_file._header(tmp_path / "a.csv", data, False))
    assert np.array_equal(fast.features, values)
    assert fast.labels == ["a", "b"] * 2500
    slow = outcome(tmp_path / "a.csv", pytest.MonkeyPatch(), False)
    assert slow == outcome(tmp_path / "a.csv", pytest.MonkeyPatch(), True)
