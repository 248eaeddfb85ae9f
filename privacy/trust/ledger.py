"""A client's privacy ledger: what its data has answered so far, over all runs, servers and restarts.

One file a data source (`journal.py`). Every entry is on the disk before its answer leaves, so that a client that is killed
in between has answered.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from fedveil.core.errors import ProtectionError
from fedveil.privacy.trust.cohorts import Cohort
from fedveil.privacy.trust.journal import Entry, Journal, damaged
from fedveil.privacy.trust.totals import AGREE, CONFIRM, FORGED, LOSS, OPEN, REVEAL, SIGN, Limits, Totals

KEPT = 8  # runs whose newest answers are kept, to be sent again as they were


class Question(NamedTuple):
    """What a server asks of a client's data.

    run: 16 bytes that name the run; round: its number; kind: of the answer
    digest: SHA-256 of all that the answer depends on: model, settings, config
    """

    run: bytes
    round: int
    kind: str
    digest: bytes


class Archived(NamedTuple):
    """A manifest that this client agreed to; `when`: seconds since the epoch."""

    run: bytes
    manifest: bytes
    signatures: dict[int, bytes]
    when: float


class Ledger:
    """The ledger of one data source, open in this process; several processes may have it open."""

    def __init__(self, path: Path, source: str) -> None:
        """Open the ledger of a data source, as `open`."""
        self._totals = Totals()
        self._journal = Journal(path, source, self._add, self._begin)

    @classmethod
    def open(cls, path: Path, source: str) -> Ledger:
        """Open the ledger of a data source, and check all of it; make it where there is no file.

        source: the name of the data, by which a ledger of other data is noticed
        Raise ProtectionError where it is damaged, another data source's, or others than its owner can read it.
        """
        return cls(path, source)

    @property
    def path(self) -> Path:
        """Its file."""
        return self._journal.path

    @property
    def source(self) -> str:
        """The name of its data."""
        return self._journal.source

    def _begin(self) -> None:
        self._totals = Totals()

    def _add(self, kind: str, run: bytes, number: int, body: Mapping[str, Any]) -> None:
        self._totals.add(kind, run, number, body)

    def close(self) -> None:
        """Close the file."""
        self._journal.connection.close()

    def totals(self) -> Totals:
        """Return the sums over all entries; raise ProtectionError where the ledger is damaged."""
        with self._journal.transaction():
            return self._totals

    def entries(self) -> list[Entry]:
        """Return all entries, oldest first."""
        return self._journal.entries()

    def recall(self, question: Question) -> bytes | None:
        """Return the answer that a question has got already; None where it is a new one.

        Raise ProtectionError where its round, or a later one, has answered another question: the answers to two
        questions of one round, or an old one again, would tell more than one answer may.
        """
        with self._journal.transaction():
            return self._recall(question)

    def check(self, question: Question, cost: float, limits: Limits) -> None:
        """Raise ProtectionError where the answer to a new question would be over a limit, before any work is done."""
        self.totals().check_answer(question.kind, cost, limits)

    def answer(self, question: Question, content: bytes, cost: float, limits: Limits, *, loss: bool = False) -> bytes:
        """Enter an answer that is about to leave, and return the bytes to send.

        content: the answer, kept until a later round of its run is answered
        cost: 1 / z^2 of the client's own noise; 0 where no example changes the answer, inf where it has no noise
        loss: it also tells the loss of the received model
        The same question again gets the bytes of the first answer and counts once.
        Raise ProtectionError as `recall` does, and where a limit would be passed.
        """
        with self._journal.transaction():
            before = self._recall(question)
            if before is not None:
                return before
            self._totals.check_answer(question.kind, cost, limits)
            body = {
                "question": question.digest.hex(),
                "answer": sha256(content).hexdigest(),
                "cost": None if math.isinf(cost) else cost,
            }
            number = self._journal.enter(question.kind, question.run, question.round, body)
            if loss:
                self._totals.check_answer(LOSS, cost, limits)
                self._journal.enter(LOSS, question.run, question.round, body)
            self._journal.connection.execute(
                "REPLACE INTO answers VALUES (?, ?, ?, ?)", (question.run, question.kind, number, content)
            )
            self._journal.connection.execute(
                "DELETE FROM answers WHERE run NOT IN (SELECT run FROM answers GROUP BY run ORDER BY max(number) DESC LIMIT ?)",
                (KEPT,),
            )
            return content

    def tell(self, run: bytes, kind: str, answer: bytes, cost: float, limits: Limits) -> None:
        """Enter an answer that is of no round and is about to leave, unless it is the same as the last in its run.

        answer: its SHA-256; the others: as `answer` takes them
        Raise ProtectionError where a limit would be passed.
        """
        with self._journal.transaction():
            number, before, _ = self._totals.newest.get((run, kind), (-1, b"", b""))
            if before == answer:
                return
            self._totals.check_answer(kind, cost, limits)
            body = {"question": answer.hex(), "answer": answer.hex(), "cost": None if math.isinf(cost) else cost}
            self._journal.enter(kind, run, number + 1, body)

    def confirm(self, run: bytes, number: int, cohort: Cohort, limits: Limits) -> None:
        """Enter that this client signs a round's survivors, by which others may reveal it in the sum over them.

        Raise ProtectionError where a limit forbids it.
        """
        with self._journal.transaction():
            self._totals.check_cohort(cohort, limits)
            if cohort not in self._totals.cohorts:
                self._journal.enter(CONFIRM, run, number, {"cohort": sorted(cohort)})

    def reveal(self, run: bytes, number: int, survivors: bytes, cohort: Cohort, limits: Limits) -> None:
        """Enter that this client's update of a round is revealed in the sum over a cohort, its own name among them.

        survivors: digest of the round's list of survivors
        Raise ProtectionError where the round was revealed in another cohort, a later one was, or a limit forbids it.
        """
        with self._journal.transaction():
            last, before = self._totals.revealed.get(run, (-1, b""))
            if (number, survivors) == (last, before):
                return
            if number <= last:
                raise ProtectionError(
                    f"round {number} was unmasked already (the latest: round {last}); shares for other survivors or another "
                    "attempt would give single vectors away, so none are revealed"
                )
            self._totals.check_cohort(cohort, limits)
            self._journal.enter(REVEAL, run, number, {"survivors": survivors.hex(), "cohort": sorted(cohort)})

    def opened(self, run: bytes, number: int, aggregate: bytes) -> None:
        """Enter the SHA-256 of an aggregate that this client decrypts, the newest of its run."""
        with self._journal.transaction():
            if self._totals.aggregates.get(run) != (number, aggregate):
                self._journal.enter(OPEN, run, number, {"aggregate": aggregate.hex()})

    def leave(self, run: bytes) -> None:
        """Enter that this client leaves a run for good, whose server sent an aggregate that it forged."""
        with self._journal.transaction():
            if run not in self._totals.forged:
                self._journal.enter(FORGED, run, 0, {})

    def sign(self, run: bytes, manifest: bytes) -> None:
        """Enter that this client signs a manifest; raise ProtectionError where it signed another one of that run.

        run: 16 bytes that name the run; manifest: its content
        """
        digest = sha256(manifest).digest()
        with self._journal.transaction():
            before = self._totals.signed.get(run)
            if before is None:
                self._journal.enter(SIGN, run, 0, {"sha256": digest.hex()})
            elif before != digest:
                raise ProtectionError("this client signed another manifest of this run, and signs one alone")

    def agree(self, run: bytes, manifest: bytes, signatures: Mapping[int, bytes]) -> None:
        """Archive a run's manifest that enough clients signed, and who did; the same again is entered once.

        signatures: by the client's number
        """
        signed = {str(client): signatures[client].hex() for client in sorted(signatures)}
        body = {"manifest": manifest.hex(), "signatures": signed}
        with self._journal.transaction():
            last = self._journal.connection.execute(
                "SELECT body FROM entries WHERE kind = ? AND run = ? ORDER BY number DESC LIMIT 1", (AGREE, run)
            ).fetchone()
            if last is None or json.loads(last[0]) != body:
                self._journal.enter(AGREE, run, 0, body)

    def manifests(self) -> list[Archived]:
        """Return the archived manifests, each run's newest, oldest run first."""
        found = {
            entry.run: Archived(
                entry.run,
                bytes.fromhex(entry.body["manifest"]),
                {int(client): bytes.fromhex(one) for client, one in entry.body["signatures"].items()},
                entry.at,
            )
            for entry in self.entries()
            if entry.kind == AGREE
        }
        return list(found.values())

    def _recall(self, question: Question) -> bytes | None:
        newest = self._totals.newest.get((question.run, question.kind))
        if newest is None or question.round > newest[0]:
            return None
        if question.round < newest[0] or question.digest != newest[1]:
            raise ProtectionError(
                f"round {question.round} is asked again, with another model or other settings"
                if question.round == newest[0]
                else f"round {question.round} is asked again, after round {newest[0]}"
            )
        kept = self._journal.connection.execute(
            "SELECT content FROM answers WHERE run = ? AND kind = ?", (question.run, question.kind)
        ).fetchone()
        if kept is None:
            raise ProtectionError(f"round {question.round} is asked again, and its answer is kept no longer")
        content = bytes(kept[0])
        if sha256(content).digest() != newest[2]:
            raise damaged(self._journal.path)("a kept answer is not the one that was sent")
        return content
