"""A settings file is read as editors and shells write it, or named as what it is, with what to do."""

from __future__ import annotations

import pytest

from fedveil import Experiment, SettingsError
from fedveil.core.settings.experiment import parse_assignments

TEXT = "[federation]\nrounds = 7\n"


def load(path, content) -> Experiment:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return Experiment.load(path)


def refused(path, content) -> str:
    with pytest.raises(SettingsError) as error:
        load(path, content)
    assert str(path) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        TEXT,
        b"\xef\xbb\xbf" + TEXT.encode(),
        TEXT.replace("\n", "\r\n"),
        b"\xef\xbb\xbf" + TEXT.replace("\n", "\r\n").encode(),
        TEXT.rstrip(),
        f"# caf\u00e9 \U0001f600\n{TEXT}",
    ],
)
def test_utf_8_is_read_with_its_mark_and_without_and_with_the_line_ends_of_windows(tmp_path, content):
    assert load(tmp_path / "a.toml", content).federation.rounds == 7


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_named_with_what_to_do(tmp_path, encoding):
    said = refused(tmp_path / "a.toml", TEXT.encode(encoding))
    assert "it is UTF-16" in said
    assert "Set-Content -Encoding utf8" in said


def test_another_encoding_is_named_with_its_line(tmp_path):
    assert "line 3: byte 0xe9 is not UTF-8" in refused(tmp_path / "a.toml", (TEXT + 'x = "\u00e9"').encode("latin-1"))


def test_a_file_of_another_kind_is_named_by_its_zero_byte(tmp_path):
    assert "line 2 has a zero byte" in refused(tmp_path / "a.toml", b"[data]\n\0\0")


@pytest.mark.parametrize("content", ["", "\n \n", "\r\n"])
def test_an_empty_file_is_refused_as_it_would_be_all_defaults(tmp_path, content):
    assert "it is empty" in refused(tmp_path / "a.toml", content)


def test_a_folder_and_an_impossible_path_are_refused(tmp_path):
    (tmp_path / "a.toml").mkdir()
    for path in (tmp_path / "a.toml", tmp_path / "a\0.toml", tmp_path / ("x" * 300 + ".toml")):
        with pytest.raises(SettingsError, match="cannot read the settings file"):
            Experiment.load(path)


@pytest.mark.parametrize("value", ["[" * 3000, "1" * 5000, "{a=" * 2000])
def test_what_exceeds_the_limits_of_python_is_refused(tmp_path, value):
    assert str(tmp_path) in refused(tmp_path / "a.toml", f"seed = {value}")
    assert parse_assignments([f"name={value}"]) == {"name": value}


@pytest.mark.parametrize(
    "content", ["data = 5\n", "[[data]]\nclients = 1\n", "[data]\npartition = [1]\n", "training.epochs = {}\n"]
)
def test_sections_of_another_form_are_refused(tmp_path, content):
    refused(tmp_path / "a.toml", content)


def test_the_ending_is_taken_in_any_case_and_a_name_of_any_length_names_the_experiment(tmp_path):
    load(tmp_path / "A.TOML", TEXT)
    assert Experiment.find(str(tmp_path / "A.TOML")).name == "A"
    assert load(tmp_path / f"{'long' * 40}.toml", TEXT).name == "long" * 20
    assert load(tmp_path / "x\u00b2 caf\u00e9.toml", TEXT).name == "x--caf\u00e9"
