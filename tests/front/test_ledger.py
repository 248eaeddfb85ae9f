"""`fedveil ledger`, on ledgers that clients wrote: what it prints, and what it refuses."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedveil.cli import app
from fedveil.client.node.ledger import ledger_path, source_name
from fedveil.core.errors import FedveilError, ProtectionError, SettingsError
from fedveil.privacy.dp.accounting.accountants import gaussian_epsilon
from fedveil.privacy.homomorphic.keys import fingerprint
from fedveil.privacy.trust.ledger import Ledger, Question
from fedveil.privacy.trust.totals import EXACT, TRAIN, Limits

RUN = bytes(range(16))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's data folder."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def written(data: str, *costs: float) -> Ledger:
    """The ledger of some data, with an answer of each cost and a manifest."""
    ledger = Ledger.open(ledger_path(data), source_name(data))
    ledger.agree(RUN, b'{"format": 1}\n', {0: b"zero", 2: b"two"})
    for number, cost in enumerate(costs, start=1):
        ledger.answer(Question(RUN, number, TRAIN, bytes(32)), b"update", cost, Limits())
    ledger.reveal(RUN, 1, bytes(32), frozenset("abcde"), Limits())
    return ledger


def said(*words: str | Path) -> str:
    done = CliRunner().invoke(app, ["ledger", *map(str, words)])
    if isinstance(done.exception, FedveilError):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


def test_it_shows_what_each_data_source_has_answered(home, tmp_path) -> None:
    own = tmp_path / "messages.csv"
    own.touch()
    written("digits:2/3", 1 / 4, 1 / 4)
    ledger = written(str(own), EXACT)
    assert ledger.path.parent == home / "fedveil" / "ledgers"
    shown = said()
    assert "digits:2/3" in shown
    assert str(own) in shown
    told = said("--data", "digits:2/3")
    assert "updates" in told
    epsilon = gaussian_epsilon(2.0, 2, 1e-5)
    assert f"epsilon  {epsilon:.3g} at delta 1e-05, by this client's own noise" in told
    assert "cohorts  1, the smallest of 5 clients" in told
    assert "epsilon  none: 1 answers had no noise of this client's own" in said(ledger.path)
    (found,) = json.loads(said("--data", "digits:2/3", "--json", "--delta", "1e-3"))["ledgers"]
    assert (found["answers"]["train"], found["cohorts"], found["runs"], found["without_noise"]) == (2, [5], 1, 0)
    assert 0 < found["epsilon"] < epsilon


def test_the_same_data_has_one_ledger_whatever_it_is_called(home, tmp_path, monkeypatch) -> None:
    own = tmp_path / "messages.csv"
    own.touch()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.csv").symlink_to(own)
    assert len({ledger_path(name) for name in (str(own), "messages.csv", "./messages.csv", "link.csv")}) == 1
    assert ledger_path("digits:2/3") != ledger_path("digits:1/3")


def test_it_shows_the_manifest_of_a_run_and_who_signed_it(home) -> None:
    written("digits:2/3")
    shown = said("--manifest", RUN.hex()[:8])
    assert shown.startswith('{"format": 1}\nsigned by client-1, client-3; agreed to on ')
    assert said("--manifest", fingerprint(sha256(b'{"format": 1}\n').digest())) == shown  # as client and server show it
    told = json.loads(said("--manifest", RUN.hex(), "--json"))
    assert (told["run"], told["signed"], told["manifest"]) == (RUN.hex(), ["client-1", "client-3"], '{"format": 1}\n')
    with pytest.raises(SettingsError, match=f"--manifest ffff: names no run of this ledger; it has: {RUN.hex()}"):
        said("--manifest", "ffff")


def test_what_cannot_be_shown_is_said(home, tmp_path) -> None:
    with pytest.raises(SettingsError, match="there is no ledger; `fedveil client` makes one"):
        said()
    with pytest.raises(SettingsError, match="there is no ledger"):
        said("--data", "digits:2/3")
    assert not home.exists()  # looking makes none
    with pytest.raises(SettingsError, match="leave out one of the two"):
        said(tmp_path / "a.ledger", "--data", "digits:2/3")
    path = written("digits:2/3").path
    with pytest.raises(SettingsError, match="--delta 2: must be between 0 and 1"):
        said("--delta", "2")
    other = ledger_path("digits:1/3")
    path.rename(other)
    with pytest.raises(ProtectionError, match="this privacy ledger is of the data digits:2/3, and not of digits:1/3"):
        said("--data", "digits:1/3")
    other.write_bytes(b"")
    with pytest.raises(ProtectionError, match="the privacy ledger is damaged"):
        said(other)
