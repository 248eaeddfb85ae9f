"""A deployed client's answers, each entered into its privacy ledger before it leaves.

A round is answered once. The same question again, from a server that was killed and goes on, gets the same bytes and
counts once. Under a protection it gets the same update, noise and all, masked or encrypted anew; any other question about
that round is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from types import MappingProxyType
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from safetensors.numpy import load, save

from fedveil.client.learning.contribution import Contributions
from fedveil.client.learning.pipeline import execute, steps_of
from fedveil.client.learning.protection import FORGED, NEWEST
from fedveil.client.learning.runtime import ClientRuntime
from fedveil.client.learning.states import ClientStates, State, StateKey
from fedveil.client.node.agreement import manifest_in
from fedveil.client.node.ledger import ledger_of
from fedveil.core.errors import ProtectionError
from fedveil.core.settings.experiment import Experiment
from fedveil.core.wire.messages import ATTEMPT, BLOB, PARCEL, REFERENCE, RUN, from_parcel, to_parcel
from fedveil.privacy.dp.accounting.guarantee import planned
from fedveil.privacy.dp.distributed import SMOOTH
from fedveil.privacy.dp.sensitivity import own_noise
from fedveil.privacy.plan import UNITS, plan_for
from fedveil.privacy.secagg.messages import Session
from fedveil.privacy.secagg.revealed import Revealed
from fedveil.privacy.trust.identity import Registry, public_pem
from fedveil.privacy.trust.ledger import Ledger, Question
from fedveil.privacy.trust.manifest import Manifest
from fedveil.privacy.trust.totals import EVALUATE, EXACT, FREE, HELLO, TRAIN, Limits

PROTECT = ("encrypt", "mask")  # the steps that a repeated answer goes through again
REFUSED = b""  # kept in place of an answer that a guard refused
OF_AN_ATTEMPT = (ATTEMPT, REFERENCE)  # settings of a protection, which differ between attempts at one round


@dataclass(frozen=True)
class Answers:
    """The answers of a client to one run's messages; `limits`: of its owner."""

    ledger: Ledger
    limits: Limits
    context: Context

    @classmethod
    def of(cls, context: Context, limits: Limits) -> Answers | None:
        """Return those of a node; None where it has no ledger."""
        ledger = ledger_of(context)
        return None if ledger is None else cls(ledger, limits, context)

    def run(self, config: Mapping[str, Any]) -> bytes:
        """Return 16 bytes that name a message's run: as its manifest says, else the message, else Flower's id of it."""
        if (agreed := manifest_in(self.context.state)) is not None:
            return _run_of(agreed)
        named = config.get(RUN)
        if isinstance(named, bytes) and named:
            return named if len(named) == 16 else sha256(named).digest()[:16]
        return b"flower  " + int(self.context.run_id).to_bytes(8, "big")

    def question(self, kind: str, number: int, config: Mapping[str, Any], model: ArrayRecord) -> Question:
        """Return what a message asks: of which kind, in which round, with which settings and model."""
        asked = sha256()
        run_config = self.context.run_config
        for text in (run_config["experiment"], run_config.get("words", ""), run_config.get("reproducible", "")):
            asked.update(sha256(str(text).encode()).digest())
        kept = sorted((key, value) for key, value in config.items() if key not in OF_AN_ATTEMPT)
        asked.update(sha256(repr(kept).encode()).digest())
        for name, array in model.items():
            asked.update(sha256(repr((name, array.dtype, tuple(array.shape), array.stype)).encode()).digest())
            asked.update(sha256(array.data).digest())
        return Question(self.run(config), number, kind, asked.digest())

    def sign(self, manifest: Manifest) -> None:
        """Enter that this client signs a run's manifest; raise ProtectionError where it signed another one."""
        self.ledger.sign(bytes.fromhex(manifest.run), manifest.content)

    def agree(self, manifest: Manifest, signatures: Mapping[int, bytes]) -> None:
        """Archive a run's manifest, and who signed it."""
        self.ledger.agree(bytes.fromhex(manifest.run), manifest.content, signatures)

    def hello(self, experiment: Experiment, config: Mapping[str, Any], told: bytes) -> None:
        """Enter what a greeting tells of the data, unless the run was told the same before.

        told: without noise, the number of examples is in it
        """
        cost = FREE if experiment.privacy.noisy else EXACT
        self.ledger.tell(self.run(config), HELLO, sha256(told).digest(), cost, self.limits)

    def once(
        self, question: Question, experiment: Experiment, work: Callable[[], Message], message: Message
    ) -> Message:
        """Return the reply to a question, from `work` the first time, and from the ledger afterwards."""
        kept = self.ledger.recall(question)
        if kept is None:
            self._check_turn(question, experiment)
            self.ledger.check(question, _cost(experiment, question.kind), self.limits)
        if kept is None:
            reply = work()
            # a refusal tells too, where a guard looked at the update
            content = REFUSED if reply.has_error() else _freeze(reply.content)
            kept = self._enter(question, experiment, content, loss=_tells_loss(reply))
            if kept == content:
                return reply
        return Message(_thaw(kept), reply_to=message)

    def contribute(
        self, question: Question, runtime: ClientRuntime, contributions: Contributions, states: ClientStates
    ) -> None:
        """Execute the steps of a client under a protection; those before it only once for a question."""
        steps = steps_of(runtime)
        place = next(i for i, step in enumerate(steps) if step.name in PROTECT)
        kept = self.ledger.recall(question)
        if kept is None:
            self._check_turn(question, runtime.experiment)
            self.ledger.check(question, _cost(runtime.experiment, TRAIN), self.limits)
        if kept is None:
            execute(runtime, steps[:place], contributions, states)
            if runtime.experiment.privacy.noisy:
                contributions.shares[0] = contributions.share(0, runtime.experiment, secret=runtime.secret_noise)
            content = save(_arrays(contributions))
            kept = self._enter(question, runtime.experiment, content, loss=contributions.global_loss is not None)
        _put_back(contributions, load(kept))
        execute(runtime, steps[place:], contributions, states)

    def _check_turn(self, question: Question, experiment: Experiment) -> None:
        """Raise ProtectionError where a server asks in more rounds than one client has turns, for which its noise is made."""
        if question.kind != TRAIN or not experiment.privacy.noisy or experiment.federation.sampling != "order":
            return
        turns = planned(experiment, 0).asked
        if self.ledger.totals().trained[question.run] >= turns:
            raise ProtectionError(
                f"the server asks in more than {turns} rounds, which is all that federation.sampling = 'order' gives one client of "
                f"data.clients = {experiment.data.clients:,}, and that its noise is made for"
            )

    def _enter(self, question: Question, experiment: Experiment, content: bytes, *, loss: bool) -> bytes:
        cost = _cost(experiment, question.kind)
        return self.ledger.answer(question, content, cost, self.limits, loss=loss)

    def states(self, states: ClientStates, config: Mapping[str, Any]) -> ClientStates:
        """Return a store whose memory of the newest aggregate is the ledger's."""
        return _LedgerStates(states, self.ledger, self.run(config))

    @property
    def revealed(self) -> Revealed:
        """The record of the rounds that this client helped to unmask."""
        return _LedgerRevealed(self.ledger, self.limits)


@dataclass(frozen=True)
class _LedgerStates:
    """A client's states, of which the newest aggregate, and that one was forged, are kept in the ledger.

    A server may begin a node's context anew.
    """

    states: ClientStates
    ledger: Ledger
    run: bytes

    def get(self, client: int, key: StateKey) -> State | None:
        if key == FORGED:
            return {} if self.run in self.ledger.totals().forged else None
        if key != NEWEST:
            return self.states.get(client, key)
        newest = self.ledger.totals().aggregates.get(self.run)
        return None if newest is None else {"round": np.array(newest[0]), "sha256": np.frombuffer(newest[1], np.uint8)}

    def put(self, client: int, key: StateKey, state: State) -> None:
        if key == FORGED:
            self.ledger.leave(self.run)
        elif key == NEWEST:
            self.ledger.opened(self.run, int(state["round"]), state["sha256"].tobytes())
        else:
            self.states.put(client, key, state)

    def drop(self, client: int, key: StateKey) -> None:
        self.states.drop(client, key)


class _LedgerRevealed(Revealed):
    """The record of unmasked rounds in the ledger, which knows other runs and servers too."""

    def __init__(self, ledger: Ledger, limits: Limits) -> None:
        super().__init__()
        self._ledger, self._limits = ledger, limits

    def plan(self, members: Iterable[int], registry: Registry) -> None:
        self._ledger.totals().check_cohort(_cohort(members, registry), self._limits)

    def confirm(self, survivors: Iterable[int], session: Session, registry: Registry) -> None:
        self._ledger.confirm(session.run, session.round, _cohort(survivors, registry), self._limits)

    def admit(
        self,
        session: Session,
        statement: bytes,
        survivors: Iterable[int] = (),
        registry: Registry = MappingProxyType({}),
    ) -> None:
        cohort = _cohort(survivors, registry)
        self._ledger.reveal(session.run, session.round, sha256(statement).digest(), cohort, self._limits)


def _cohort(members: Iterable[int], registry: Registry) -> frozenset[str]:
    """Name clients by their keys, which are the same on every server; by their numbers where they have none."""
    return frozenset(
        sha256(public_pem(registry[member])).hexdigest()[:32] if member in registry else f"client {member + 1}"
        for member in members
    )


@lru_cache(maxsize=16)
def _run_of(manifest: bytes) -> bytes:
    return bytes.fromhex(Manifest.read(manifest).run)


def _cost(experiment: Experiment, kind: str) -> float:
    """Return 1 / z^2 of the noise that this client adds itself to an answer; inf where it adds none.

    Noise that hides single examples has no finite epsilon of the client's whole data, which the ledger adds up. Of noise
    in shares its own share counts, z / sqrt(honest clients); whole numbers cost a third more at most (`plan.UNITS`, and
    `distributed.effective_multiplier` of one share).
    """
    privacy = experiment.privacy
    if kind == EVALUATE or not own_noise(privacy):
        return EXACT
    if privacy.noise_at == "distributed":
        return plan_for(experiment).honest / (privacy.multiplier**2 * (1 - (SMOOTH / UNITS) ** 2))
    return 1 / privacy.multiplier**2


def _tells_loss(reply: Message) -> bool:
    return reply.has_content() and any("global-loss" in record for record in reply.content.metric_records.values())


def _freeze(content: RecordDict) -> bytes:
    return b"".join(record[BLOB] for record in to_parcel(content).config_records.values())  # type: ignore[misc]


def _thaw(kept: bytes) -> RecordDict:
    """Return the content of a kept reply; raise ProtectionError where the client refused instead."""
    if kept == REFUSED:
        raise ProtectionError("the client refused this round when it was asked before")
    return from_parcel(RecordDict({f"{PARCEL}.0": ConfigRecord({BLOB: kept})}))


def _arrays(contributions: Contributions) -> dict[str, np.ndarray]:
    """Return an update before its protection, and what is told beside it, by name."""
    share, noise = contributions.shares.get(0, (contributions.weights, None))
    told = {name: getattr(contributions, name) for name in _TOLD}
    parts = {WEIGHTS: contributions.weights, SHARE: {} if noise is None else share, NOISE: noise or {}}
    return {
        part + name: np.ascontiguousarray(value) for part, arrays in parts.items() for name, value in arrays.items()
    } | {name: np.ascontiguousarray(value) for name, value in told.items() if value is not None}


def _put_back(contributions: Contributions, arrays: Mapping[str, np.ndarray]) -> None:
    """Put an update that `_arrays` returned into the contributions."""

    def part(before: str) -> dict[str, np.ndarray]:
        return {name.removeprefix(before): value for name, value in arrays.items() if name.startswith(before)}

    contributions.weights = part(WEIGHTS)
    if noise := part(NOISE):
        contributions.shares[0] = part(SHARE), noise
    for name in _TOLD:
        setattr(contributions, name, arrays.get(name))


WEIGHTS, SHARE, NOISE = "weights/", "share/", "noise/"
_TOLD = ("examples", "loss", "steps", "global_loss")
