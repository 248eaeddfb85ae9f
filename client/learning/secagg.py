"""Clients under secure aggregation: the stages of `fedveil.privacy.secagg.client` on Flower's messages.

A client keeps its session in its state between stages, because on a node every message may reach a new process.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedveil.client.learning.contribution import Contributions, Sealed, Share
from fedveil.client.learning.homomorphic import rounded
from fedveil.client.learning.states import ClientStates, StateKey, from_state, to_state
from fedveil.core.errors import ProtectionError
from fedveil.core.settings.experiment import Experiment
from fedveil.core.wire.messages import ATTEMPT, BLOB, CLIENT, CONFIRMATIONS, ROUND, RUN
from fedveil.privacy.fixed_point import Layout
from fedveil.privacy.plan import RESERVED, plan_for
from fedveil.privacy.secagg.client import SecAggClient, mask_cohort
from fedveil.privacy.secagg.graph import choose_degree
from fedveil.privacy.secagg.messages import Session
from fedveil.privacy.secagg.revealed import Revealed
from fedveil.privacy.secagg.vectors import shown, to_ring, write_masked
from fedveil.privacy.trust.identity import Registry, Signer
from fedveil.privacy.trust.key_folders import load_identity
from fedveil.privacy.trust.manifest import UNSIGNED

STAGES: dict[str, tuple[str, ...]] = {  # stages beside training, and what the message of each carries
    "advertise": (), "share": (BLOB,), "confirm": (BLOB,), "reveal": (BLOB, CONFIRMATIONS)
}  # fmt: skip
SESSION = StateKey("secagg-session", durable=False)  # holds secrets, which end with the session
REVEALED = StateKey("secagg-revealed", durable=False)


@dataclass(frozen=True)
class SecAggClients:
    """The clients of a process in secure aggregation.

    keys: the folder with their identities, empty where they have none
    manifest: SHA-256 of the run's signed manifest; zeros where it has none
    """

    experiment: Experiment
    layout: Layout
    keys: str = ""
    manifest: bytes = UNSIGNED

    def session(self, config: Mapping[str, Any], active: bool) -> Session:
        """Return the session of a message: its run, round and attempt, and all else from the client's own settings.

        A threshold that the server may choose protects from no server. The server still chooses the cohort, which the
        threshold follows from and whose size privacy.protection.min_clients bounds. active: the server may lie
        """
        privacy, cohort = self.experiment.privacy, self.experiment.federation.cohort
        _, threshold = choose_degree(cohort, privacy.protection.drop_outs, privacy.protection.colluders, active)
        size, least = RESERVED + self.layout.size, plan_for(self.experiment).least
        number, attempt = int(config[ROUND]), int(config[ATTEMPT])
        return Session(config[RUN], number, attempt, size, threshold, least, active, self.manifest)

    def numbers(self, share: Share, examples: int, reference: int) -> tuple[np.ndarray, int]:
        """Return the numbers to be masked, uint32 [2 + size], and how many weights were clipped."""
        plan = plan_for(self.experiment)
        values, clipped = rounded(share, examples, reference, plan, self.layout)
        return to_ring(values, examples), clipped

    def answer(
        self,
        stage: str,
        client: int,
        config: Mapping[str, Any],
        brought: Mapping[str, Any],
        states: ClientStates,
        revealed: Revealed | None = None,
    ) -> bytes:
        """Answer a stage before or after the vector; `brought`: the part of the message for this client alone.

        revealed: the record of what this client revealed, where another place than `states` keeps it
        Raise ProtectionError where the client must not answer.
        """
        if missing := [key for key in STAGES[stage] if key not in brought]:
            raise ProtectionError(f"the server's message of the stage '{stage}' lacks '{missing[0]}'")
        if stage == "advertise":
            signer, registry = self._identity(client)
            masker = SecAggClient.begin(self.session(config, registry is not None), client, signer, registry)
            blob = masker.advertise()
        else:
            masker = self._load(client, config, states.get(client, SESSION))
            if stage == "reveal":
                memory = from_state(states.get(client, REVEALED))
                own = Revealed() if memory is None else Revealed.load(memory)
                blob = masker.reveal(brought[BLOB], revealed or own, brought[CONFIRMATIONS])
                states.put(client, REVEALED, to_state(own.save()))
                states.drop(client, SESSION)  # the session is over, so its secrets go
                return blob
            step = masker.share if stage == "share" else masker.confirm
            blob = step(brought[BLOB], revealed)
        states.put(client, SESSION, to_state(masker.save()))
        return blob

    def mask(self, contributions: Contributions, *, secret: bool) -> None:
        """Mask the updates of many clients of one process; each pair's mask is made once.

        secret: their noise is drawn from the operating system's generator
        """
        started = time.process_time()
        instructions, examples = contributions.instructions, contributions.counts()
        sessions = contributions.states[SESSION.name]
        able: list[tuple[int, SecAggClient, np.ndarray, int]] = []
        for k, client in contributions.standing():
            try:
                masker = self._load(client, instructions.settings, sessions[k])
                masker.receive(contributions.brought[k][BLOB])
                mine = contributions.share(k, self.experiment, secret=secret)
                numbers, clipped = self.numbers(mine, int(examples[k]), instructions.reference)
                able.append((k, masker, numbers, clipped))
            except ProtectionError as error:
                contributions.refusals[k] = error
        rows = np.stack([numbers for _, _, numbers, _ in able]) if able else np.zeros((0, 0), np.uint32)
        settings = {key: value for key, value in instructions.settings.items() if key != CLIENT}
        mask_cohort([masker for _, masker, _, _ in able], rows, shown(contributions.given, self.layout, settings))
        seconds = (time.process_time() - started) / max(len(able), 1)
        for (k, masker, _, clipped), row in zip(able, rows, strict=True):
            sessions[k] = to_state(masker.save())
            contributions.updates[k] = Sealed(write_masked(masker.session, masker.client, row), clipped, seconds)

    def _load(self, client: int, config: Mapping[str, Any], state: Mapping[str, np.ndarray] | None) -> SecAggClient:
        """Restore the client as it was after the last stage.

        Raise ProtectionError where it has not begun this session.
        """
        signer, registry = self._identity(client)
        kept = from_state(state)
        if kept is None:
            raise ProtectionError(
                f"client {client} has not begun a secure aggregation here; it may have been started anew"
            )
        masker = SecAggClient.load(kept, signer, registry)
        if masker.session != self.session(config, registry is not None):
            raise ProtectionError(
                f"client {client} is in round {masker.session.round}, attempt {masker.session.attempt} of secure aggregation, and "
                f"the message is of round {config[ROUND]}, attempt {config[ATTEMPT]}, or of other settings"
            )
        return masker

    def _identity(self, client: int) -> tuple[Signer | None, Registry | None]:
        """Return a client's registered key and all public ones; none where the server is trusted to be honest."""
        return load_identity(Path(self.keys), client) if self.keys else (None, None)
