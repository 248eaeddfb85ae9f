"""What a client's ledger adds up to: its answers, the epsilon they spent, and the cohorts in which it was revealed.

Noise counts as the client's own: what others add, a server may leave out. Gaussian mechanisms compose exactly: answers
with noise of z_1, z_2, ... sensitivities tell as much as one with mu^2 = sum 1 / z_i^2 (Dong et al. 2022, corollary
3.3), over all runs and servers. An answer without noise has no finite epsilon.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedveil.core.errors import ProtectionError
from fedveil.privacy.dp.accounting.accountants import gaussian_epsilon
from fedveil.privacy.trust.cohorts import Cohort, exposed

TRAIN, LOSS, EVALUATE, HELLO = "train", "loss", "evaluate", "hello"  # answers made of the client's examples
# what else is entered
OPEN, CONFIRM, REVEAL, SIGN, AGREE, FORGED = "open", "confirm", "reveal", "sign", "agree", "forged"
COUNTED = (TRAIN, LOSS, EVALUATE)  # answers that `max_answers` counts
FREE, EXACT = 0.0, math.inf  # the cost, 1 / z^2, of an answer that no example changes, and of one without noise


@dataclass(frozen=True)
class Limits:
    """What the client's owner allows in all; None, or 1, limits nothing.

    epsilon: the most, at delta; answers: the most of COUNTED
    cohort: the fewest clients among whom this one is revealed
    difference: the fewest clients in whom two sums, or what follows from several, may differ
    """

    epsilon: float | None = None
    delta: float = 1e-5
    answers: int | None = None
    cohort: int = 1
    difference: int = 1


@dataclass
class Totals:
    """The sums over a ledger's entries.

    answers: how many, by kind; mu2: of those with noise, sum 1 / z^2; exact: how many had none
    cohorts: in which the client was revealed, or signed that it may be, each once
    trained: by run, how many of its rounds were answered
    newest: by run and kind, the newest round, the digest of its question, and that of the answer's bytes
    revealed: by run, the newest round that was unmasked, and the digest of its survivors
    aggregates: by run, the newest aggregate that was decrypted: its round and SHA-256
    signed: by run, the manifest's SHA-256; forged: runs whose server sent an aggregate that is no sum
    """

    answers: Counter[str] = field(default_factory=Counter)
    mu2: float = 0.0
    exact: int = 0
    cohorts: dict[Cohort, None] = field(default_factory=dict)
    trained: Counter[bytes] = field(default_factory=Counter)
    newest: dict[tuple[bytes, str], tuple[int, bytes, bytes]] = field(default_factory=dict)
    revealed: dict[bytes, tuple[int, bytes]] = field(default_factory=dict)
    aggregates: dict[bytes, tuple[int, bytes]] = field(default_factory=dict)
    signed: dict[bytes, bytes] = field(default_factory=dict)
    forged: set[bytes] = field(default_factory=set)

    @property
    def counted(self) -> int:
        """Answers that `max_answers` counts."""
        return sum(self.answers[kind] for kind in COUNTED)

    def epsilon(self, delta: float, more: float = 0.0) -> float:
        """Return the epsilon of all answers, and of one more of this cost; inf where one of them had no noise."""
        total = self.mu2 + more + (math.inf if self.exact else 0.0)
        if math.isinf(total):
            return math.inf
        return gaussian_epsilon(1 / math.sqrt(total), 1, delta) if total else 0.0

    def add(self, kind: str, run: bytes, number: int, body: Mapping[str, Any]) -> None:
        """Add an entry; raise anything where it is not one that this module can read."""
        self.answers[kind] += 1
        if kind in (HELLO, TRAIN, LOSS, EVALUATE):
            cost = body["cost"]
            self.exact += cost is None
            self.mu2 += 0.0 if cost is None else _positive(cost)
            self.trained[run] += kind == TRAIN
            self.newest[run, kind] = number, bytes.fromhex(body["question"]), bytes.fromhex(body["answer"])
        elif kind in (CONFIRM, REVEAL):
            self.cohorts[frozenset(map(str, body["cohort"]))] = None
            if kind == REVEAL:
                self.revealed[run] = number, bytes.fromhex(body["survivors"])
        elif kind == OPEN:
            self.aggregates[run] = number, bytes.fromhex(body["aggregate"])
        elif kind == SIGN:
            self.signed[run] = bytes.fromhex(body["sha256"])
        elif kind == FORGED:
            self.forged.add(run)
        elif kind != AGREE:
            raise ValueError(f"an entry of the kind {kind!r}")

    def check_answer(self, kind: str, cost: float, limits: Limits) -> None:
        """Raise ProtectionError where one more answer is over a limit."""
        if limits.answers is not None and kind in COUNTED and self.counted >= limits.answers:
            raise ProtectionError(f"it has given {self.counted:,} answers, and max_answers = {limits.answers:,}")
        if limits.epsilon is None:
            return
        if math.isinf(cost):
            raise ProtectionError(
                f"an answer without noise of this client's own has no finite epsilon, and max_epsilon = {limits.epsilon:g}"
            )
        if self.exact:
            raise ProtectionError(
                f"{self.exact:,} answers before had no noise, so that no epsilon holds, and max_epsilon = {limits.epsilon:g}"
            )
        after = self.epsilon(limits.delta, cost)
        if cost and after > limits.epsilon:
            raise ProtectionError(
                f"one more answer would spend epsilon = {after:.3g} in all at delta = {limits.delta:g}, and max_epsilon = "
                f"{limits.epsilon:g}"
            )

    def check_cohort(self, cohort: Cohort, limits: Limits) -> None:
        """Raise ProtectionError where the client must not be revealed in a sum over this cohort."""
        if len(cohort) < limits.cohort:
            raise ProtectionError(
                f"it would be revealed in a sum of {len(cohort)} clients, and least_cohort = {limits.cohort}"
            )
        if limits.difference > 1 and (why := exposed(list(self.cohorts), cohort, limits.difference)):
            raise ProtectionError(f"{why}, and least_difference = {limits.difference}")


def _positive(cost: float) -> float:
    """Return a finite cost, from 0; raise ValueError for anything else."""
    if not 0 <= cost < math.inf:
        raise ValueError(f"a cost of {cost}")
    return float(cost)
