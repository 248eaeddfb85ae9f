"""A user's own files are read as they are, and whatever is wrong with them is said with its place."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fedveil.core.errors import DataError, FedveilError, SettingsError
from fedveil.core.settings.sections import Data
from fedveil.datasets.own.own import own


def settings(path, **more) -> Data:
    return Data(dataset="own", path=str(path), **more)


def written(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def rows(*parts):
    """Every example of the parts as (label, features), in no order."""
    return sorted(
        (int(label), *row.ravel().tolist()) for p in parts for label, row in zip(p.labels, p.features, strict=True)
    )


TEXT = 'label,text\n"spam","Win, ""now"""\nham,see you\nham,"two\nlines"\nspam,\nham,see you\n'


def test_a_csv_of_texts_becomes_a_text_task(tmp_path):
    made = own(settings(written(tmp_path / "mail.csv", TEXT), test_fraction=0.5))
    assert made.task.kind == "text"
    assert made.task.classes == ("ham", "spam")
    assert len(made.train) + len(made.test) == 4  # one exact repeat
    assert len(own(settings(tmp_path / "mail.csv", drop_duplicates=False)).train) == 4
    assert not made.made_up


def test_a_separate_test_file_is_used_whole_and_repeats_in_it_are_kept(tmp_path):
    train = written(tmp_path / "train.csv", TEXT)
    test = written(tmp_path / "test.csv", "text,label\nsee you,ham\nsee you,ham\n")
    made = own(settings(train, test_path=str(test)))
    assert (len(made.train), len(made.test)) == (4, 2)
    assert made.test.labels.tolist() == [0, 0]
    see_you = [made.words.index(word) for word in ("see", "you")]
    assert made.test.features[:, :2].tolist() == [see_you, see_you]


def test_a_csv_of_numbers_becomes_features(tmp_path):
    path = written(tmp_path / "n.csv", b"\xef\xbb\xbf" + b"a,label,b\r\n1,x,2.5\r\n\r\n-3,y,1e3\r\n5,x,6\r\n")
    made = own(settings(path, scale="none"))
    assert made.task.kind == "features"
    assert made.task.shape == (2,)
    assert made.train.features.dtype == np.float32
    assert rows(made.train, made.test) == [(0, 1, 2.5), (0, 5, 6), (1, -3, 1000)]


def test_columns_of_a_test_file_are_matched_by_name(tmp_path):
    train = written(tmp_path / "train.csv", "a,b,label\n1,2,x\n3,4,y\n")
    test = written(tmp_path / "test.csv", "label,b,a\ny,20,10\n")
    assert rows(own(settings(train, test_path=str(test))).test) == [(1, 10, 20)]


def test_a_column_of_sources_becomes_groups_of_the_training_examples(tmp_path):
    lines = [f"{i},{'xy'[i % 2]},{('rome', 'oslo', 'rome')[i % 3]}" for i in range(30)]
    made = own(
        settings(written(tmp_path / "n.csv", "\n".join(["v,label,city", *lines])), group_column="city", scale="none")
    )
    assert made.task.shape == (1,)
    assert made.group_names == ("oslo", "rome")
    for value, group in zip(made.train.features[:, 0], made.groups, strict=True):
        assert made.group_names[group] == ("rome", "oslo", "rome")[int(value) % 3]


@pytest.mark.parametrize("test_file", ["v,label\n1,x\n", "v,city,label\n1,bonn,x\n"])
def test_test_data_may_have_sources_or_not_and_they_are_no_feature(tmp_path, test_file):
    train = written(tmp_path / "train.csv", "v,label,city\n1,x,rome\n2,y,oslo\n")
    made = own(settings(train, test_path=str(written(tmp_path / "test.csv", test_file)), group_column="city"))
    assert rows(made.test) == [(0, 1)]
    assert made.group_names == ("oslo", "rome")


def test_sources_stay_with_their_texts_when_repeats_are_dropped(tmp_path):
    lines = ["ham,a,0", "ham,a,1", "spam,b,1", "spam,b,0", "ham,c,2", "spam,d,2"]
    path = written(tmp_path / "mail.csv", "\n".join(["label,text,who", *lines]))
    test = written(tmp_path / "test.csv", "label,text\nham,a\n")
    made = own(settings(path, test_path=str(test), group_column="who"))
    words = [made.words[row[0]] for row in made.train.features]
    assert list(zip(words, made.groups.tolist(), strict=True)) == [("a", 0), ("b", 1), ("c", 2), ("d", 2)]


def test_labels_fix_the_classes_and_their_order(tmp_path):
    path = written(tmp_path / "n.csv", "v,label\n1,good\n2,bad\n3,good\n4,bad\n")
    assert own(settings(path)).task.classes == ("bad", "good")
    made = own(settings(path, labels=("good", "bad")))
    assert made.task.classes == ("good", "bad")
    assert rows(made.train, made.test) == [(0, 1), (0, 3), (1, 2), (1, 4)]


def test_labels_that_are_numbers_are_sorted_as_numbers(tmp_path):
    path = written(tmp_path / "n.csv", "v,label\n" + "1,10\n1,9\n1,-2\n1,--2\n" * 2)
    assert own(settings(path)).task.classes == ("-2", "9", "10", "--2")


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.floats(width=32, allow_nan=False, allow_infinity=False)), min_size=2)
)
def test_any_numbers_written_to_a_csv_come_back(tmp_path_factory, examples):
    examples = [("a", 0.0), ("b", 0.0), *examples]
    text = "".join(f"{value!r},{label}\n" for label, value in examples)
    made = own(settings(written(tmp_path_factory.mktemp("csv") / "n.csv", "v,label\n" + text), scale="none"))
    assert rows(made.train, made.test) == sorted(("ab".index(label), value) for label, value in examples)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("", "empty"),
        ("label,text\n", "no examples"),
        ("labels,text\nham,a\n", "no column is called 'label'; did you mean 'labels'"),
        ("label,label,text\n", "more than one column is called 'label'"),
        ("label\nham\n", "column 'text'"),
        ("label,v\nx,1\ny,abc\n", r"line 3, column v: .* 'abc'"),
        ("label,v,w\nx,1,1\n\ny,1,\n", r"line 4, column w: .* missing"),
        ("label,v\nx,1\ny,nan\n", r"line 3, column v: .* 'nan'"),
        ("label,v\nx,1\ny,-inf\n", r"line 3, column v: .* '-inf'"),
        ("label,v\nx,1\ny,1e39\n", r"line 3, column v: .* '1e39'"),
        ("label,v\nx,1\n ,2\n", "line 3, column label: empty"),
        ("label,v\nx,1\ny\n", r"line 3: 1 value\(s\), where the header names 2"),
        ("label,v\nx,1\ny,2,3\n", r"line 3: 3 value\(s\)"),
        ("label,v\nx,1\nx,2\n", "at least 2 classes"),
        ('label,text\nx,"never closed\n', "line 2: a quote is opened here and never closed"),
        (b"label,text\nx,\xff\ny,b\n", "not UTF-8"),
        ("label,text\nx," + "a" * 200_000, "at least 2 classes"),
    ],
)
def test_a_csv_that_cannot_be_used_is_refused_with_the_place(tmp_path, content, found):
    path = written(tmp_path / "n.csv", content)
    with pytest.raises(DataError, match=found) as refused:
        own(settings(path))
    assert str(path) in str(refused.value)


@pytest.mark.parametrize(
    ("more", "error", "found"),
    [
        ({"group_column": "citty"}, DataError, "no column is called 'citty'; did you mean 'city'"),
        ({"labels": ("x", "z")}, DataError, r"line 3: label 'y' is not one of data.labels \(x, z\)"),
        ({"labels": ("x", "y", "x")}, SettingsError, "each once"),
        ({"labels": ("x",)}, SettingsError, "at least 2"),
        ({"test_path": "nothing.csv"}, DataError, "nothing.csv"),
    ],
)
def test_settings_that_do_not_fit_the_file_are_refused(tmp_path, more, error, found):
    path = written(tmp_path / "n.csv", "v,label,city\n1,x,rome\n2,y,oslo\n3,x,oslo\n")
    with pytest.raises(error, match=found):
        own(settings(path, **{"group_column": "city", **more}))


def test_an_example_without_a_source_is_refused(tmp_path):
    path = written(tmp_path / "n.csv", "v,label,city\n1,x,rome\n2,y,\n")
    with pytest.raises(DataError, match="line 3, column city"):
        own(settings(path, group_column="city"))


@pytest.mark.parametrize(
    ("test_file", "found"),
    [
        ("v,w,label\n1,1,z\n", "line 2: label 'z' does not occur in the training data"),
        ("v,label\n1,x\n", "no column is called 'w'"),
        ("text,label\nhello,x\n", "test data is text"),
    ],
)
def test_test_data_that_does_not_fit_is_refused(tmp_path, test_file, found):
    train = written(tmp_path / "train.csv", "v,w,label\n1,2,x\n2,3,y\n")
    with pytest.raises(DataError, match=found):
        own(settings(train, test_path=str(written(tmp_path / "test.csv", test_file))))


def test_data_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        own(settings(tmp_path / "nothing.csv"))
    with pytest.raises(SettingsError, match=r"data\.path"):
        own(Data(dataset="own"))


def saved(path, **arrays):
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize(("shape", "kind"), [((3,), "features"), ((2, 2), "images"), ((3, 2, 2), "images")])
def test_arrays_come_back_with_their_labels(tmp_path, shape, kind):
    features = np.random.default_rng(0).random((20, *shape))
    path = saved(tmp_path / "a.npz", features=features, labels=np.arange(20) % 4, site=np.array(["s", "t"] * 10))
    made = own(settings(path, group_column="site"))
    assert made.task.kind == kind
    assert made.task.shape == ((1, 2, 2) if shape == (2, 2) else shape)
    assert made.task.classes == ("0", "1", "2", "3")
    flat = features.astype(np.float32).reshape(20, -1)
    assert rows(made.train, made.test) == sorted((i % 4, *row.tolist()) for i, row in enumerate(flat))
    assert made.groups.tolist() == (made.train.labels % 2).tolist()


def test_images_of_bytes_are_scaled_to_0_1(tmp_path):
    images = np.array([0, 51, 255, 102], np.uint8).reshape(4, 1, 1)
    made = own(settings(saved(tmp_path / "a.npz", features=images, labels=np.array(["a", "b", "a", "b"]))))
    assert rows(made.train, made.test) == [(0, 0.0), (0, 1.0), (1, np.float32(0.2)), (1, np.float32(0.4))]


def test_test_arrays_of_another_shape_are_refused(tmp_path):
    train = saved(tmp_path / "a.npz", features=np.ones((4, 3)), labels=np.array([0, 1, 0, 1]))
    test = saved(tmp_path / "b.npz", features=np.ones((4, 2)), labels=np.array([0, 1, 0, 1]))
    with pytest.raises(
        DataError, match=r"b\.npz: an example has shape \(2,\), where in the training data it has \(3,\)"
    ):
        own(settings(train, test_path=str(test)))


TWO = np.array([0, 1, 0, 1])


@pytest.mark.parametrize(
    ("arrays", "found"),
    [
        ({"features": np.ones((4, 2))}, "no array is called 'labels'"),
        ({"labels": TWO}, "no array is called 'features'"),
        ({"features": np.ones((3, 2)), "labels": TWO}, r"features \(3, 2\)"),
        ({"features": np.ones((4, 2)), "labels": np.array(0)}, "one entry an example"),
        ({"features": np.ones((4, 2)), "labels": TWO[:, None]}, r"labels must be whole numbers or words \[n\]"),
        ({"features": np.ones((4, 2)), "labels": TWO / 2}, "labels must be whole numbers"),
        ({"features": np.ones((4,)), "labels": TWO}, r"features must be numbers \[n, d\]"),
        ({"features": np.array([["a"]] * 4), "labels": TWO}, "features must be numbers"),
        ({"features": np.array([[object()]] * 4), "labels": TWO}, "no array of objects"),
        ({"features": np.array([[1.0, 2], [3, np.nan], [1, 1], [1, 1]]), "labels": TWO}, r"features\[1, 1\] is nan"),
        ({"features": np.full((4, 1), 1e300), "labels": TWO}, r"features\[0, 0\] is 1e\+300"),
        ({"features": np.full((4, 2, 2), 7.0), "labels": TWO}, r"must lie in \[0, 1\]"),
        ({"features": np.ones((4, 2)), "labels": TWO * 0}, "at least 2 classes"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow")
def test_arrays_that_cannot_be_used_are_refused(tmp_path, arrays, found):
    path = saved(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=found) as refused:
        own(settings(path))
    assert str(path) in str(refused.value)


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x03\x04"])
def test_a_file_that_is_no_npz_is_refused(tmp_path, content):
    with pytest.raises(DataError, match="cannot be read"):
        own(settings(written(tmp_path / "a.npz", content)))


def picture(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_folder_of_images_becomes_images(tmp_path, channels):
    pixels = np.random.default_rng(0).integers(256, size=(6, 4, 5, 3), dtype=np.uint8)
    pixels = pixels if channels == 3 else pixels[..., 0]
    for i, image in enumerate(pixels):
        picture(tmp_path / ("cat" if i % 2 else "ant") / f"{i}.{'PNG' if i else 'png'}", image)
    written(tmp_path / "cat" / "notes.txt", "not an image")
    (tmp_path / ".hidden").mkdir()
    made = own(settings(tmp_path))
    assert made.task.kind == "images"
    assert made.task.shape == (channels, 4, 5)
    assert made.task.classes == ("ant", "cat")
    expected = []
    for i, image in enumerate(pixels):
        planes = [image[:, :, c] for c in range(3)] if channels == 3 else [image]
        expected.append((i % 2, *(np.float32(value) / np.float32(255) for plane in planes for value in plane.ravel())))
    assert rows(made.train, made.test) == sorted(expected)


def test_folders_called_train_and_test_are_used_as_such(tmp_path):
    for part, count in (("train", 3), ("test", 2)):
        for label in "ab":
            for i in range(count):
                picture(tmp_path / part / label / f"{i}.png", np.full((2, 2), i, np.uint8))
    made = own(settings(tmp_path))
    assert (len(made.train), len(made.test)) == (6, 4)


def test_images_of_different_sizes_are_refused(tmp_path):
    picture(tmp_path / "a" / "1.png", np.zeros((2, 3), np.uint8))
    picture(tmp_path / "b" / "2.png", np.zeros((2, 4), np.uint8))
    with pytest.raises(DataError, match=r"2\.png: 4 x 2 pixels, grey, where .*1\.png is 3 x 2 pixels, grey"):
        own(settings(tmp_path))


def test_an_image_with_transparency_is_refused(tmp_path):
    picture(tmp_path / "a" / "1.png", np.zeros((2, 3, 4), np.uint8))
    with pytest.raises(DataError, match=r"1\.png: its mode is RGBA"):
        own(settings(tmp_path))


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n"])
def test_an_unreadable_image_is_refused(tmp_path, content):
    (tmp_path / "a").mkdir()
    written(tmp_path / "a" / "1.png", content)
    with pytest.raises(DataError, match=r"1\.png: not a readable image"):
        own(settings(tmp_path))


def test_a_truncated_image_is_refused(tmp_path):
    picture(tmp_path / "a" / "1.png", np.random.default_rng(0).integers(256, size=(50, 50), dtype=np.uint8))
    whole = (tmp_path / "a" / "1.png").read_bytes()
    written(tmp_path / "a" / "1.png", whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"1\.png: not a readable image"):
        own(settings(tmp_path))


@pytest.mark.parametrize("folders", [(), ("a",)])
def test_a_folder_without_images_is_refused(tmp_path, folders):
    for name in folders:
        (tmp_path / name).mkdir()
    with pytest.raises(DataError, match="images"):
        own(settings(tmp_path))


def test_a_folder_of_images_has_no_columns(tmp_path):
    with pytest.raises(SettingsError, match=r"data\.group_column = 'site'"):
        own(settings(tmp_path, group_column="site"))


@given(st.binary(max_size=200))
def test_random_bytes_are_refused_and_the_file_is_named(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("any")
    for name in ("x.csv", "x.npz"):
        refused = ""
        try:
            own(settings(written(folder / name, content)))
        except FedveilError as error:
            refused = str(error)
        assert name in refused
