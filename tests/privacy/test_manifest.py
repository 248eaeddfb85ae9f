"""The manifest of a run: what its bytes hold, and what is none."""

from __future__ import annotations

import json
from datetime import timedelta

import pytest
from helpers.fuzzing import parses
from hypothesis import given
from hypothesis import strategies as st

from fedveil.core.errors import ProtectionError
from fedveil.core.settings.experiment import Experiment
from fedveil.privacy.trust.identity import load_signer, new_identity
from fedveil.privacy.trust.manifest import (
    LARGEST,
    Manifest,
    check_signatures,
    differences,
    majority,
    now,
    read_signatures,
    sign,
    write_signatures,
)

PAIRS = [new_identity() for _ in range(4)]
REGISTRY = {client: public for client, (_, public) in enumerate(PAIRS)}
TOML = Experiment.preset("digits").toml()
MADE = Manifest.of("ab" * 16, TOML, "viagra\nlottery", REGISTRY, reproducible=False, created=now())


def refused(content: bytes) -> bool:
    """Whether bytes are no manifest."""
    try:
        Manifest.read(content)
    except ProtectionError:
        return True
    return False


def test_a_manifest_is_read_as_it_was_written() -> None:
    found = Manifest.read(MADE.content)
    assert found == MADE
    assert found.digest == MADE.digest
    assert json.loads(MADE.content)["experiment"] == TOML
    assert b"lottery" not in MADE.content  # the words go by their hash


def test_every_field_changes_the_digest() -> None:
    told = json.loads(MADE.content)
    others = {
        "run": "cd" * 16, "created": "2026-01-01T00:00:00Z", "expires": "2027-01-01T00:00:00Z", "fedveil": "9", "code": "0" * 64,
        "clients": "0" * 64, "cohort": 99, "least": 99, "protection": "x", "budget": "x", "reproducible": True,
        "vocabulary": "0" * 64, "experiment": "name = 'x'",
    }  # fmt: skip
    assert others.keys() | {"format"} == told.keys()
    digests = {Manifest(**{**told, name: value}).digest for name, value in others.items()}
    assert len(digests | {MADE.digest}) == len(others) + 1


def test_settings_that_differ_are_named_by_their_keys() -> None:
    other = Experiment.preset("digits").override({"training.learning_rate": 0.5}).toml()
    found = Manifest.of("ab" * 16, other, "viagra\nlottery", REGISTRY, reproducible=False, created=MADE.created)
    assert differences(found, MADE) == ["training.learning_rate is 0.5 in the manifest and 0.3 here"]
    assert differences(MADE, MADE) == []


def test_dates_are_judged_by_the_clock_here() -> None:
    MADE.check_dates(MADE.created - timedelta(minutes=4))
    MADE.check_dates(MADE.expires)
    with pytest.raises(ProtectionError, match="set the clocks"):
        MADE.check_dates(MADE.created - timedelta(minutes=6))
    with pytest.raises(ProtectionError, match="expired"):
        MADE.check_dates(MADE.expires + timedelta(seconds=1))


def test_more_than_half_is_more_than_half(tmp_path) -> None:
    assert [majority(dict.fromkeys(range(n), b"")) for n in (1, 2, 3, 4, 5, 10)] == [1, 2, 2, 3, 3, 6]
    signed = {}
    for client, (private, _) in enumerate(PAIRS):
        (tmp_path / "key").unlink(missing_ok=True)
        (tmp_path / "key").write_bytes(private)
        (tmp_path / "key").chmod(0o600)
        signed[client] = sign(MADE, load_signer(tmp_path / "key"))
    check_signatures(MADE, {client: signed[client] for client in (0, 2, 3)}, REGISTRY)
    with pytest.raises(ProtectionError, match="2 of 4 registered clients"):
        check_signatures(MADE, {client: signed[client] for client in (0, 2)}, REGISTRY)
    with pytest.raises(ProtectionError, match="client-2's signature"):
        check_signatures(MADE, signed | {1: signed[0]}, REGISTRY)
    assert read_signatures(write_signatures(signed)) == signed


@pytest.mark.parametrize("content", [b"", b"null", b"[]", b"{}", b"\xff", b"[" * 10_000, b" " * (LARGEST + 1)])
def test_what_is_no_manifest_or_no_signatures_is_refused(content) -> None:
    with pytest.raises(ProtectionError):
        Manifest.read(content)
    if content != b"{}":
        with pytest.raises(ProtectionError):
            read_signatures(content)


@parses("the manifest of a run, random and damaged", usual=300)
@given(junk=st.binary(max_size=200), place=st.integers(0, len(MADE.content) - 1), byte=st.integers(0, 255))
def test_random_bytes_are_no_manifest_and_a_damaged_one_is_another(junk: bytes, place: int, byte: int) -> None:
    assert refused(junk)
    damaged = MADE.content[:place] + bytes([byte]) + MADE.content[place + 1 :]
    assert damaged == MADE.content or refused(damaged) or Manifest.read(damaged).digest != MADE.digest
    assert refused(MADE.content[:place])


@parses("signatures of a manifest", usual=300)
@given(junk=st.binary(max_size=200) | st.text(alphabet='{}":,0123456789abcdef ', max_size=60).map(str.encode))
def test_random_bytes_are_no_signatures_or_are_those_that_they_spell(junk: bytes) -> None:
    try:
        found = read_signatures(junk)
    except ProtectionError:
        return
    assert write_signatures(found) == junk
