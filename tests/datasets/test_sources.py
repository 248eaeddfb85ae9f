"""Published files are found, fetched from a real web server on this machine, checked, and never replaced silently."""

from __future__ import annotations

import gzip
import io
import socket
import tarfile
import zipfile
from functools import partial
from pathlib import Path

import pytest

from fedveil.core.errors import DataError, SettingsError
from fedveil.datasets.published import downloads, sources
from fedveil.datasets.published.downloads import digest
from fedveil.datasets.published.sources import KnownFile

PLAIN = b"some published bytes, " * 400
PACKED = gzip.compress(PLAIN, mtime=1)


@pytest.fixture
def one_file(monkeypatch, site):
    """`mnist` is one small made-up file, offered by the local server."""
    file = KnownFile("mnist/numbers.gz", digest(PLAIN), digest(PACKED))
    monkeypatch.setitem(sources.KNOWN, "mnist", (file,))
    monkeypatch.setitem(sources.URLS, "mnist", (site.offer("/numbers.gz", PACKED),))
    return file


def put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_the_table_holds_the_real_files(real_data):
    for dataset, files in sources.KNOWN.items():
        found = sources.find(dataset)
        assert set(found) == {file.name for file in files}
        for file in files:
            raw = found[file.name].read_bytes()
            assert digest(gzip.decompress(raw) if found[file.name].suffix == ".gz" else raw) == file.content
        assert all(result.problem == "" for result in sources.check(dataset))


def test_data_sets_without_files_need_none(empty):
    assert sources.find("digits") == {}
    assert sources.find("spam-demo") == {}
    assert sources.check("digits") == []


def test_an_unknown_name_is_refused_with_the_nearest(empty):
    with pytest.raises(SettingsError, match="did you mean 'mnist'"):
        sources.find("mnits")


def test_the_users_folder_comes_before_the_cache_and_no_network_is_touched(empty, one_file, site):
    put(empty.cache / "data" / "mnist" / "numbers.gz", PACKED)
    mine = put(empty.data / "mnist" / "numbers.gz", PACKED)
    assert sources.find("mnist") == {"numbers": mine}
    mine.unlink()
    assert sources.find("mnist") == {"numbers": empty.cache / "data" / "mnist" / "numbers.gz"}
    assert site.requests == []


def test_the_environment_is_read_at_each_call(empty, one_file, tmp_path, monkeypatch):
    put(tmp_path / "elsewhere" / "mnist" / "numbers.gz", PACKED)
    monkeypatch.setenv("FEDVEIL_DATA", str(tmp_path / "elsewhere"))
    assert sources.find("mnist")["numbers"].parts[-3] == "elsewhere"


def test_without_a_cache_variable_the_users_cache_folder_is_meant(empty, monkeypatch):
    import platformdirs

    monkeypatch.delenv("FEDVEIL_CACHE")
    assert sources.cache_folder() == Path(platformdirs.user_cache_dir("fedveil")) / "data"


@pytest.mark.parametrize(
    ("name", "content"),
    [("numbers", PLAIN), ("numbers.gz", gzip.compress(PLAIN, 1, mtime=7))],
    ids=["unpacked", "packed by another program"],
)
def test_the_same_content_in_another_packing_is_accepted(empty, one_file, site, name, content):
    path = put(empty.data / "mnist" / name, content)
    assert sources.find("mnist") == {"numbers": path}
    assert site.requests == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("numbers.gz", PACKED[:-7]),
        ("numbers.gz", PACKED[:30] + bytes([PACKED[30] ^ 1]) + PACKED[31:]),
        ("numbers.gz", gzip.compress(b"other bytes", mtime=0)),
        ("numbers.gz", b""),
        ("numbers", PLAIN[:-1]),
        ("numbers", PACKED),
    ],
    ids=["truncated", "corrupt", "other", "empty", "unpacked, truncated", "packed under an unpacked name"],
)
def test_a_wrong_file_is_refused_with_both_digests_and_left_alone(empty, one_file, site, name, content):
    path = put(empty.data / "mnist" / name, content)
    expected = one_file.packed if name.endswith(".gz") else one_file.content
    with pytest.raises(DataError) as refused:
        sources.find("mnist")
    for part in (
        str(path),
        expected.sha256,
        f"{expected.size:,} bytes",
        digest(content).sha256,
        f"{len(content):,} bytes",
    ):
        assert part in str(refused.value)
    assert path.read_bytes() == content
    assert site.requests == []
    assert sources.check("mnist")[0].problem.startswith(str(path))


def test_status_lists_every_file_and_says_where_it_is(empty):
    assert len(sources.status()) == 7
    assert {(s.found, s.size) for s in sources.status()} == {(None, None)}
    path = put(empty.data / "sms" / "SMSSpamCollection", b"not checked")
    assert sources.FileStatus("sms", "sms/SMSSpamCollection", path, 11) in sources.status()


def test_check_says_what_is_missing_and_downloads_nothing(empty, one_file, site):
    (result,) = sources.check("mnist")
    assert result.found is None
    assert str(empty.data) in result.problem
    assert site.requests == []


def test_a_missing_file_is_downloaded_once_to_the_cache(empty, one_file, site, capsys):
    path = empty.cache / "data" / "mnist" / "numbers.gz"
    assert sources.find("mnist") == {"numbers": path}
    assert path.read_bytes() == PACKED
    assert leftovers(empty.cache) == [path]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    sources.find("mnist")
    assert site.requests == ["/numbers.gz"]


def test_on_a_terminal_progress_goes_to_standard_error(empty, one_file, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    sources.find("mnist")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "numbers.gz" in captured.err
    assert "100%" in captured.err


@pytest.mark.parametrize(
    ("content", "announced", "reason"),
    [
        (PACKED[:-20], len(PACKED), "the connection broke after"),
        (PACKED[:-20], len(PACKED) - 20, "not the published file"),
        (b"<html>please log in</html>", 26, "not the published file"),
    ],
    ids=["broken connection", "truncated", "wrong content"],
)
def test_a_bad_download_is_refused_and_nothing_of_it_is_kept(empty, one_file, site, content, announced, reason):
    site.offer("/numbers.gz", content, announced)
    with pytest.raises(DataError, match=reason):
        sources.find("mnist")
    assert leftovers(empty.cache) == []


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.mark.parametrize("failure", ["404", "refused", "silence"])
def test_where_a_download_fails_the_error_says_how_to_help_oneself(empty, one_file, site, monkeypatch, failure):
    port = free_port()
    with socket.create_server(("127.0.0.1", port)) as listener:
        if failure == "refused":
            listener.close()
        url = f"{site.address}/nothing.gz" if failure == "404" else f"http://127.0.0.1:{port}/numbers.gz"
        monkeypatch.setitem(sources.URLS, "mnist", (url,))
        monkeypatch.setattr(sources, "download", partial(downloads.download, timeout=0.2))
        with pytest.raises(DataError) as refused:
            sources.find("mnist")
    message = str(refused.value)
    reason = {"404": "404", "refused": "refused", "silence": "0.2 seconds"}[failure]
    places = [folder / "mnist" for folder in sources.folders()]
    for part in (url, reason, "mnist/numbers.gz", f"into {empty.data / 'mnist'}", *map(str, places)):
        assert part in message
    assert refused.value.exit_code == 2


def test_a_cache_that_cannot_be_written_is_an_error_that_names_it(empty, one_file, monkeypatch, tmp_path):
    put(tmp_path / "file", b"")
    monkeypatch.setenv("FEDVEIL_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match="FEDVEIL_CACHE"):
        sources.find("mnist")


def test_storing_over_an_existing_file_replaces_it_whole_or_not_at_all(tmp_path):
    path = put(tmp_path / "file", b"old")
    with pytest.raises(TypeError):
        downloads.store(path, "no bytes")
    assert path.read_bytes() == b"old"
    assert leftovers(tmp_path) == [path]
    downloads.store(path, b"new")
    assert path.read_bytes() == b"new"
    assert leftovers(tmp_path) == [path]


def zipped(name: str, content: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("readme", "read me")
        archive.writestr(name, content)
    return stream.getvalue()


def test_text_messages_are_taken_out_of_the_published_zip(empty, site, monkeypatch):
    monkeypatch.setitem(sources.KNOWN, "sms", (KnownFile("sms/SMSSpamCollection", digest(PLAIN)),))
    monkeypatch.setitem(sources.URLS, "sms", (site.offer("/sms.zip", zipped("SMSSpamCollection", PLAIN)),))
    assert sources.find("sms")["SMSSpamCollection"].read_bytes() == PLAIN
    assert leftovers(empty.cache) == [empty.cache / "data" / "sms" / "SMSSpamCollection"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"no zip", "zip file"),
        (zipped("other", PLAIN), "SMSSpamCollection"),
        (zipped("SMSSpamCollection", PLAIN + b"!"), "not the published file"),
    ],
    ids=["no zip", "another member", "other content"],
)
def test_a_wrong_zip_is_refused(empty, site, monkeypatch, content, reason):
    monkeypatch.setitem(sources.KNOWN, "sms", (KnownFile("sms/SMSSpamCollection", digest(PLAIN)),))
    monkeypatch.setitem(sources.URLS, "sms", (site.offer("/sms.zip", content),))
    with pytest.raises(DataError, match=reason):
        sources.find("sms")
    assert leftovers(empty.cache) == []


def archive(subset: str, messages: dict[str, list[bytes]]) -> bytes:
    """An Enron-Spam archive, its files in an order that is not that of their numbers."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz", compresslevel=1) as tar:
        for label in ("spam", "ham"):
            for number, message in reversed(list(enumerate(messages[label], 1))):
                info = tarfile.TarInfo(f"{subset}/{label}/{number:04d}.1999-12-10.someone.{label}.txt")
                info.size = len(message)
                tar.addfile(info, io.BytesIO(message))
        info = tarfile.TarInfo(f"{subset}/Summary.txt")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"sum"))
    return stream.getvalue()


def test_a_message_becomes_one_line():
    assert downloads.one_line(b"Subject: a\r\nb\nc\x0bd\te\x7f\x94") == b"Subject: a b c d\te \x94 \n"


def test_messages_follow_the_numbers_of_their_files_beyond_four_digits(tmp_path):
    many = {"ham": [b"%d" % i for i in range(10_002)], "spam": []}
    lines = downloads.enron_lines(put(tmp_path / "enron1.tar.gz", archive("enron1", many)), "here")
    assert lines["ham"] == [b"%d \n" % i for i in range(10_002)]


def test_the_real_mails_come_out_of_archives_to_the_byte(real_data, empty, site, monkeypatch):
    """The published archives are not at hand; these are made from the real lines, with line breaks put back."""
    lines = {label: gzip.decompress((real_data / f"enron/{label}.txt.gz").read_bytes()) for label in ("ham", "spam")}
    mails = {label: [line[:-1] for line in text.split(b"\n")[:-1]] for label, text in lines.items()}
    mails = {label: [mail.replace(b" ", b"\r\n", 1) for mail in some] for label, some in mails.items()}
    urls = []
    first = {"ham": 3672, "spam": 1500}  # of enron1
    subsets = {
        "enron1": {label: mails[label][: first[label]] for label in mails},
        "enron5": {label: mails[label][first[label] :] for label in mails},
    }
    for subset, messages in subsets.items():
        content = archive(subset, messages)
        urls.append(site.offer(f"/{subset}.tar.gz", content))
    monkeypatch.setitem(sources.URLS, "enron", tuple(urls))
    paths = sources.find("enron")
    assert {name: gzip.decompress(path.read_bytes()) for name, path in paths.items()} == {
        "ham.txt": lines["ham"],
        "spam.txt": lines["spam"],
    }
    assert sorted(leftovers(empty.cache)) == sorted(paths.values())


@pytest.mark.parametrize(
    "content",
    [b"no archive", archive("enron1", {"ham": [b"x"], "spam": []})[:40]],
    ids=["no archive", "cut short"],
)
def test_a_damaged_archive_is_refused(empty, site, monkeypatch, content):
    monkeypatch.setitem(sources.URLS, "enron", (site.offer("/enron1.tar.gz", content),))
    with pytest.raises(DataError, match="archive cannot be read"):
        sources.find("enron")


def test_archives_with_other_mails_are_refused(empty, site, monkeypatch):
    content = archive("enron1", {"ham": [b"hello"], "spam": [b"buy"]})
    monkeypatch.setitem(sources.URLS, "enron", (site.offer("/enron1.tar.gz", content),))
    with pytest.raises(DataError, match=r"ham\.txt as made from"):
        sources.find("enron")
    assert leftovers(empty.cache) == []


def test_a_download_says_that_it_was_the_proxy_that_failed(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://me:secret@127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with pytest.raises(DataError, match="the proxy of HTTPS_PROXY or HTTP_PROXY failed: Connection refused") as failed:
        downloads.download("https://data.example/file", tmp_path / "file", None)
    assert "secret" not in str(failed.value)
