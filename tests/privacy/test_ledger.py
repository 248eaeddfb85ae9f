"""The file of a client's ledger: what it remembers, that it is on the disk first, and that nothing but itself is believed."""

from __future__ import annotations

import math
import os
import sqlite3
import stat
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest
from helpers.fuzzing import parses
from hypothesis import given
from hypothesis import strategies as st

from fedveil.core.errors import ProtectionError
from fedveil.privacy.dp.accounting.accountants import gaussian_epsilon
from fedveil.privacy.trust.ledger import KEPT, Ledger, Question
from fedveil.privacy.trust.totals import EVALUATE, EXACT, FREE, HELLO, TRAIN, Limits

SOURCE = "digits:2/3"
RUN, OTHER = b"R" * 16, b"S" * 16
FREELY = Limits()


def question(number: int = 1, run: bytes = RUN, kind: str = TRAIN, what: bytes = b"model") -> Question:
    return Question(run, number, kind, sha256(what).digest())


def write_all(ledger: Ledger) -> None:
    """Every kind of entry."""
    ledger.sign(RUN, b'{"manifest": 1}')
    ledger.agree(RUN, b'{"manifest": 1}', {0: b"zero", 2: b"two"})
    ledger.tell(RUN, HELLO, sha256(b"479").digest(), FREE, FREELY)
    ledger.answer(question(), b"update 1" * 50, 1 / 4, FREELY, loss=True)
    ledger.opened(RUN, 1, sha256(b"aggregate").digest())
    ledger.answer(question(1, kind=EVALUATE), b"scores", EXACT, FREELY)
    ledger.confirm(RUN, 1, frozenset("abc"), FREELY)
    ledger.reveal(RUN, 1, sha256(b"abc").digest(), frozenset("abc"), FREELY)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "a.ledger"


@pytest.fixture
def ledger(path: Path) -> Ledger:
    return Ledger.open(path, SOURCE)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ledger with every kind of entry."""
    path = tmp_path_factory.mktemp("whole") / "a.ledger"
    ledger = Ledger.open(path, SOURCE)
    write_all(ledger)
    ledger.close()
    return path


def test_a_new_ledger_is_its_owners_alone_and_another_process_sees_what_is_written(path, ledger) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    write_all(ledger)
    assert {stat.S_IMODE(found.stat().st_mode) for found in path.parent.iterdir()} == {
        0o600
    }  # its rollback journal too
    other = Ledger.open(path, SOURCE)
    assert other.totals() == ledger.totals()
    other.answer(question(2), b"update 2", 1 / 4, FREELY)
    assert ledger.recall(question(2)) == b"update 2"  # without opening it again


def test_what_is_remembered_of_a_manifest_is_what_was_signed(ledger) -> None:
    write_all(ledger)
    ledger.sign(RUN, b'{"manifest": 1}')
    with pytest.raises(ProtectionError, match="signed another manifest of this run"):
        ledger.sign(RUN, b'{"manifest": 2}')
    ledger.agree(RUN, b'{"manifest": 1}', {0: b"zero", 2: b"two"})  # the same again
    ledger.agree(RUN, b'{"manifest": 1}', {0: b"zero", 1: b"one", 2: b"two"})
    ledger.agree(OTHER, b"another", {})
    first, second = ledger.manifests()
    assert (first.run, first.manifest, first.signatures) == (
        RUN,
        b'{"manifest": 1}',
        {0: b"zero", 1: b"one", 2: b"two"},
    )
    assert second.run == OTHER
    assert ledger.totals().answers["agree"] == 3


def test_the_same_question_gets_the_first_bytes_and_counts_once(ledger) -> None:
    assert ledger.recall(question()) is None
    assert ledger.answer(question(), b"first", 1.0, FREELY) == b"first"
    assert ledger.answer(question(), b"second", 1.0, FREELY) == b"first"
    assert ledger.recall(question()) == b"first"
    assert ledger.totals().answers[TRAIN] == 1
    for again in (question(what=b"another"), question(0)):
        with pytest.raises(ProtectionError, match="is asked again"):
            ledger.recall(again)
        with pytest.raises(ProtectionError, match="is asked again"):
            ledger.answer(again, b"third", 1.0, FREELY)
    assert ledger.recall(question(what=b"another", run=OTHER)) is None
    assert ledger.recall(question(what=b"another", kind=EVALUATE)) is None


def test_only_the_newest_rounds_answers_are_kept_and_those_of_few_runs(ledger) -> None:
    for number in range(1, 4):
        ledger.answer(question(number), b"update", 1.0, FREELY)
    for run in range(KEPT):
        ledger.answer(question(1, bytes([run]) * 16), b"update", 1.0, FREELY)
    kept = ledger._journal.connection.execute("SELECT count(*) FROM answers").fetchone()
    assert kept == (KEPT,)
    with pytest.raises(ProtectionError, match="its answer is kept no longer"):
        ledger.recall(question(3))


@given(multipliers=st.lists(st.floats(0.3, 20), min_size=1, max_size=6))
def test_epsilon_is_that_of_all_gaussian_mechanisms_together(tmp_path_factory, multipliers) -> None:
    ledger = Ledger.open(tmp_path_factory.mktemp("epsilon") / "a.ledger", SOURCE)
    for number, z in enumerate(multipliers):
        ledger.answer(question(number, run=bytes([number]) * 16), b"", 1 / z**2, FREELY)
    mu = math.sqrt(sum(1 / z**2 for z in multipliers))
    assert ledger.totals().epsilon(1e-5) == pytest.approx(gaussian_epsilon(1 / mu, 1, 1e-5), rel=1e-6)
    if len(set(multipliers)) == 1:
        assert ledger.totals().epsilon(1e-5) == pytest.approx(
            gaussian_epsilon(multipliers[0], len(multipliers), 1e-5), rel=1e-6
        )
    ledger.answer(question(99), b"", EXACT, FREELY)
    assert ledger.totals().epsilon(1e-5) == math.inf


def test_a_refused_answer_leaves_nothing_in_the_file_and_is_not_counted(path, ledger) -> None:
    ledger.answer(question(), b"update", 1.0, FREELY)
    content, totals = path.read_bytes(), Ledger.open(path, SOURCE).totals()
    for limits, said in (
        (Limits(answers=1), "it has given 1 answers, and max_answers = 1"),
        (Limits(answers=2), "max_answers = 2"),  # the answer fits, and the loss that it also tells does not
        (Limits(epsilon=1.0), "would spend epsilon"),
    ):
        with pytest.raises(ProtectionError, match=said):
            ledger.answer(question(2), b"update 2", 1.0, limits, loss=True)
        assert path.read_bytes() == content
        assert ledger.totals() == totals
    with pytest.raises(ProtectionError, match="would show 2 clients or fewer"):
        ledger.reveal(RUN, 1, b"s" * 32, frozenset("ab"), Limits(difference=3))
    assert ledger.totals() == totals


def test_what_leaves_a_process_that_is_killed_at_once_is_in_the_ledger(path, ledger) -> None:
    """SIGKILL right after the call returned, and right before it would have written."""
    script = (
        "import os, signal, sys; from pathlib import Path; from fedveil.privacy.trust.ledger import Ledger, Limits, Question\n"
        f"ledger = Ledger.open(Path(sys.argv[1]), {SOURCE!r})\n"
        "if sys.argv[2] == 'before':\n"
        "    ledger._journal.enter = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"ledger.answer(Question({RUN!r}, int(sys.argv[3]), 'train', b'q' * 32), b'update', 0.25, Limits())\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    for number, (when, answers) in enumerate([("after", 1), ("before", 1), ("after", 2)], start=1):
        done = subprocess.run([sys.executable, "-c", script, path, when, str(number)], check=False)
        assert done.returncode == -9
        assert ledger.totals().answers[TRAIN] == answers
        assert Ledger.open(path, SOURCE).totals() == ledger.totals()


def test_processes_that_write_at_once_count_every_answer(path, ledger) -> None:
    script = (
        "import sys; from pathlib import Path; from fedveil.privacy.trust.ledger import Ledger, Limits, Question\n"
        f"ledger = Ledger.open(Path(sys.argv[1]), {SOURCE!r})\n"
        "for n in range(20): ledger.answer(Question(sys.argv[2].encode() * 16, n, 'train', b'q' * 32), b'x', 0.25, Limits())\n"
    )
    parties = [subprocess.Popen([sys.executable, "-c", script, path, name]) for name in "abc"]
    assert [party.wait(60) for party in parties] == [0, 0, 0]
    assert ledger.totals().answers[TRAIN] == 60
    assert ledger.totals().mu2 == 15.0


def test_a_ledger_of_other_data_is_refused(path, ledger) -> None:
    ledger.close()
    with pytest.raises(ProtectionError, match="is of the data digits:2/3, and not of /home/own; name another"):
        Ledger.open(path, "/home/own")


@pytest.mark.parametrize("mode", [0o604, 0o640, 0o622])
def test_a_ledger_that_others_can_read_or_write_is_refused(path, ledger, mode) -> None:
    path.chmod(mode)
    with pytest.raises(
        ProtectionError, match=f"others than its owner can read this privacy ledger .* chmod 600 {path}"
    ):
        Ledger.open(path, SOURCE)


def test_an_empty_file_and_what_is_no_file_are_refused_and_stay_as_they_are(tmp_path) -> None:
    path = tmp_path / "empty.ledger"
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
    with pytest.raises(ProtectionError, match="the privacy ledger is damaged"):
        Ledger.open(path, SOURCE)
    assert path.read_bytes() == b""
    with pytest.raises(ProtectionError, match="is no file"):
        Ledger.open(tmp_path, SOURCE)
    (tmp_path / "file").touch()
    with pytest.raises(ProtectionError, match="cannot be read or made"):
        Ledger.open(tmp_path / "file" / "a.ledger", SOURCE)


def test_a_file_put_in_the_place_of_an_open_ledger_is_not_written_past(path, ledger) -> None:
    path.rename(path.with_suffix(".old"))
    for _ in range(2):
        with pytest.raises(ProtectionError, match="the privacy ledger is damaged"):
            ledger.answer(question(), b"update", 1.0, FREELY)
        if not path.exists():
            Ledger.open(path, SOURCE)  # another one, new and valid


@pytest.mark.parametrize(
    "edit",
    [
        "DELETE FROM entries WHERE number = 4",
        "DELETE FROM entries WHERE number = (SELECT max(number) FROM entries)",
        "DELETE FROM entries",
        "DELETE FROM ledger",
        "UPDATE ledger SET number = number - 1",
        "UPDATE ledger SET source = 'digits:1/3'",
        "UPDATE ledger SET format = 2",
        "UPDATE entries SET at = at - 1 WHERE number = 5",
        "UPDATE entries SET kind = 'agree' WHERE kind = 'train'",
        "UPDATE entries SET run = x'00' WHERE number = 4",
        "UPDATE entries SET round = 7 WHERE number = 4",
        """UPDATE entries SET body = replace(body, '0.25', '0.00') WHERE kind = 'train'""",
        "UPDATE entries SET number = 100 WHERE number = 4",
        "INSERT INTO entries SELECT number + 1, at, kind, run, round, body, link FROM entries WHERE number = 9",
        "DROP TABLE entries",
        "DROP TABLE ledger",
        "UPDATE entries SET link = 'text' WHERE number = 2",
        "UPDATE entries SET round = 'many' WHERE number = 2",
    ],
)
def test_an_edited_ledger_is_refused(path, ledger, edit) -> None:
    write_all(ledger)
    with sqlite3.connect(path) as connection:
        connection.execute(edit)
    connection.close()
    with pytest.raises(ProtectionError, match=r"a\.ledger: (the privacy ledger is damaged|this privacy ledger is of)"):
        Ledger.open(path, SOURCE)


def test_an_answer_that_was_edited_is_not_sent(path, ledger) -> None:
    write_all(ledger)
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE answers SET content = x'00'")
    with pytest.raises(ProtectionError, match="a kept answer is not the one that was sent"):
        ledger.recall(question())


def opens_alike(path: Path, whole: Path, content: bytes) -> None:
    """A ledger's file with other bytes is refused, or nothing that counts was changed."""
    true = Ledger.open(whole, SOURCE)
    expected, manifests = true.totals(), true.manifests()
    true.close()
    write(path, content)
    try:
        found = Ledger.open(path, SOURCE)
    except ProtectionError:
        return
    try:
        assert found.totals() == expected
        assert found.manifests() == manifests
        assert found.recall(question()) == b"update 1" * 50
    except ProtectionError:
        return
    finally:
        found.close()


def write(path: Path, content: bytes) -> None:
    """Put a file in the place of a ledger."""
    for old in path.parent.iterdir():
        old.unlink()
    path.write_bytes(content)
    path.chmod(0o600)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "a.ledger"


@parses("privacy ledger", usual=400)
@given(st.binary(max_size=600), st.booleans())
def test_random_bytes_are_no_ledger(place, whole, data, headed):
    write(place, whole.read_bytes()[:100] + data if headed else data)
    with pytest.raises(ProtectionError):
        Ledger.open(place, SOURCE)


@parses("privacy ledger, damaged", usual=400)
@given(st.data())
def test_a_damaged_ledger_is_refused_or_says_the_same(place, whole, data):
    content = bytearray(whole.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    opens_alike(place, whole, bytes(content))


@parses("privacy ledger, cut", usual=100)
@given(st.data())
def test_a_cut_ledger_is_refused(place, whole, data):
    content = whole.read_bytes()
    write(place, content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(ProtectionError):
        Ledger.open(place, SOURCE)


@parses("privacy ledger, forged entries", usual=200)
@given(
    st.sampled_from(["number", "at", "kind", "run", "round", "body", "link"]),
    st.integers(1, 9),
    st.one_of(
        st.integers(-(2**63), 2**63 - 1),
        st.floats(allow_nan=False),
        st.text(max_size=30),
        st.binary(max_size=60),
        st.none(),
    ),
)
def test_an_entry_with_any_other_value_is_refused(place, whole, column, number, value):
    write(place, whole.read_bytes())
    connection = sqlite3.connect(place)
    before = connection.execute("SELECT * FROM entries ORDER BY number").fetchall()
    try:
        connection.execute(f"UPDATE entries SET {column} = ? WHERE number = ?", (value, number))
    except sqlite3.Error:  # a number that is no whole one, or is there already
        connection.rollback()
    connection.commit()
    after = connection.execute("SELECT * FROM entries ORDER BY number").fetchall()
    connection.close()
    if after == before:
        Ledger.open(place, SOURCE).close()
        return
    with pytest.raises(ProtectionError):
        Ledger.open(place, SOURCE)
