"""Damaged bytes for every parser of files and messages: each ends in one error of ours, or reads what they say."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from helpers.aggregations import session
from helpers.fuzzing import reads_files
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from fedveil import Experiment
from fedveil.client.node.policy import Policy
from fedveil.core.errors import DataError, DeploymentError, FedveilError, ProtectionError, SettingsError
from fedveil.core.record.record import Record
from fedveil.core.record.resumes import FILE as ENVIRONMENT
from fedveil.core.record.resumes import earlier_settings
from fedveil.core.wire.bundle import bundle, check_bundle
from fedveil.datasets.published import downloads, sources
from fedveil.datasets.published.images import read_idx
from fedveil.datasets.text import read_sms, read_vocabulary
from fedveil.privacy.secagg.client import SecAggClient
from fedveil.privacy.secagg.revealed import Revealed
from fedveil.privacy.trust import key_folders
from fedveil.server.rounds import captures
from fedveil.simulations import app_folder
from fedveil.simulations.engine.states import DiskStates

EXPERIMENT = Experiment.preset("digits")
DEEP = 100_000  # brackets within brackets


class Parser(NamedTuple):
    """A parser, and something that it reads.

    read: of the bytes themselves, or of a file that holds them; named: the file's name, None for bytes
    refuses: the error that it ends in
    """

    read: Callable[[Any], object]
    whole: bytes
    refuses: type[FedveilError]
    named: str | None = None


def zipped() -> bytes:
    """A zip file as other programs make it."""
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("SMSSpamCollection", "ham\thello\n" * 20)
    return whole.getvalue()


def tarred() -> bytes:
    """A tar.gz file as Enron-Spam's are."""
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w:gz") as archive:
        entry = tarfile.TarInfo("enron1/ham/0001.1999-12-10.farmer.ham.txt")
        entry.size = 5
        archive.addfile(entry, io.BytesIO(b"hello"))
    return whole.getvalue()


def capture() -> bytes:
    """A captured round of one client."""
    about = {"round": 1, "order": ["before/w", "after/w", "0/w"], "metrics": {"0": {}}, "learning_rate": 0.1}
    arrays = {name: np.ones(2, np.float32) for name in about["order"]}
    return save(arrays, {"fedveil": json.dumps(about)})


def aggregation() -> bytes:
    """The state of a client of secure aggregation, without its checksum."""
    return SecAggClient.begin(session(size=20), 1).save()[:-32]


def index(path: Path) -> object:
    """Open the store of clients' states with an index whose layout is what the file holds."""
    layout = np.frombuffer(path.read_bytes(), np.uint8)
    return DiskStates(path.parent, {"residual/slots": np.array([[0, 0]]), "residual/layout": layout})


def environment(path: Path) -> object:
    """Read a record's history of settings."""
    record = object.__new__(Record)
    record.folder = path.parent
    (path.parent / "experiment.toml").write_text("name = 'x'\n")
    return earlier_settings(record)


PARSERS = {
    "bundle.check_bundle": Parser(check_bundle, bundle(), DeploymentError),
    "Experiment.received": Parser(
        lambda data: Experiment.received(data.decode("utf-8", "replace")), EXPERIMENT.toml().encode(), SettingsError
    ),
    "Experiment.load": Parser(Experiment.load, EXPERIMENT.toml().encode(), SettingsError, "a.toml"),
    "Policy.read": Parser(Policy.read, b"min_clients = 3\n", SettingsError, "policy.toml"),
    "app_folder.find": Parser(app_folder._read, b'[tool.flwr.app]\npublisher = "x"\n', SettingsError, "pyproject.toml"),
    "key_folders.agreed": Parser(key_folders._agreed, b'protection = "secagg"\n', FedveilError, "privacy.toml"),
    "captures.read": Parser(captures._read, capture(), SettingsError, "round-1.safetensors"),
    "resumes.earlier_settings": Parser(
        environment, json.dumps({"resumes": [{"experiment": ["a", "b"]}]}).encode(), SettingsError, ENVIRONMENT
    ),
    "DiskStates": Parser(index, json.dumps([["", "<f4", [4]]]).encode(), SettingsError, "layout"),
    "downloads.from_zip": Parser(
        lambda path: downloads.from_zip(path, "SMSSpamCollection", "u"), zipped(), DataError, "a.zip"
    ),
    "downloads.enron_lines": Parser(lambda path: downloads.enron_lines(path, "u"), tarred(), DataError, "a.tar.gz"),
    "sources.unpacked": Parser(sources._unpacked, gzip.compress(b"hello"), DataError, "a.gz"),
    "images.read_idx": Parser(read_idx, gzip.compress(b"\0\0\x08\x01\0\0\0\x02ab"), DataError, "idx.gz"),
    "text.read_sms": Parser(read_sms, gzip.compress(b"ham\thello\n"), DataError, "sms.gz"),
    "text.read_vocabulary": Parser(read_vocabulary, "one\ntwo\nसुन्दर\n".encode(), DataError, "words.txt"),
    "SecAggClient.load": Parser(
        lambda data: SecAggClient.load(data + sha256(data).digest()), aggregation(), ProtectionError
    ),
    "Revealed.load": Parser(Revealed.load, Revealed().save(), ProtectionError),
}


@pytest.mark.parametrize("name", PARSERS)
def test_what_is_whole_is_read(tmp_path, name) -> None:
    parser = PARSERS[name]
    (tmp_path / "residual").write_bytes(bytes(1000))
    parser.read(given_as(parser, parser.whole, tmp_path))


def given_as(parser: Parser, data: bytes, folder: Path) -> Any:
    """The bytes, or a file with them."""
    if parser.named is None:
        return data
    path = folder / parser.named
    path.write_bytes(data)
    return path


def refused_or_read(parser: Parser, data: bytes, folder: Path) -> None:
    """Any other error fails the test."""
    with contextlib.suppress(parser.refuses):
        parser.read(given_as(parser, data, folder))


@pytest.mark.parametrize("name", PARSERS)
@reads_files(usual=60)
@given(st.data())
def test_damaged_bytes_are_refused_or_read(tmp_path_factory, name, data) -> None:
    whole, folder = PARSERS[name].whole, tmp_path_factory.getbasetemp()
    (folder / "residual").write_bytes(bytes(1000))
    start, cut = data.draw(st.integers(0, len(whole)), "start"), data.draw(st.integers(0, 8), "cut")
    noise = data.draw(st.binary(max_size=12), "noise")
    for changed in (whole[:start] + noise + whole[start + cut :], whole[:start], noise):
        refused_or_read(PARSERS[name], changed, folder)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("bundle.check_bundle", bundle()[:28] + b"\x02\x02" + bundle()[30:]),  # zipfile ends in an EOFError
        ("downloads.from_zip", zipped()[:28] + b"\xff\xff" + zipped()[30:]),
        ("downloads.from_zip", zipped().replace(b"\0\x08\0", b"\0\x63\0")),  # packed in a way that is not known
        ("downloads.from_zip", zipped().replace(b"PK\1\2\x14\3\x14\0\0", b"PK\1\2\x14\3\x14\0\1")),  # with a password
        ("images.read_idx", b"\0\0\x08\xff" + b"\0\0\0\1" * 255 + b"a"),  # 255 dimensions
        ("DiskStates", b'[["w", "O", [4]]]'),  # of Python objects
        ("DiskStates", b'[["w", "no", [4]]]'),
        ("DiskStates", b'[["w", "<f4", [-4]]]'),
        ("captures.read", save({"w": np.ones(1)}, {"fedveil": "[]"})),
        ("resumes.earlier_settings", b'{"resumes": [3]}'),
    ],
)
def test_damage_that_a_library_is_surprised_by_is_refused(tmp_path, name, data) -> None:
    (tmp_path / "residual").write_bytes(bytes(1000))
    with pytest.raises(PARSERS[name].refuses):
        PARSERS[name].read(given_as(PARSERS[name], data, tmp_path))


@pytest.mark.parametrize("name", PARSERS)
@pytest.mark.parametrize(
    "deep", [b"a = " + b"[" * DEEP, b"[" * DEEP, b'{"resumes":' * DEEP], ids=["toml", "json", "tables"]
)
def test_what_is_nested_without_end_is_refused(tmp_path, name, deep) -> None:
    parser = PARSERS[name]
    if parser.read in (sources._unpacked, read_vocabulary, read_sms):
        return  # these nest nothing
    with pytest.raises(parser.refuses):
        parser.read(given_as(parser, deep, tmp_path))


def test_the_memory_of_a_session_that_is_not_one_is_refused() -> None:
    whole = aggregation()
    for data in (whole[:4] + b"\xff" + whole[5:], whole + b"more", whole[:-1]):
        with pytest.raises(ProtectionError):
            SecAggClient.load(data + sha256(data).digest())
