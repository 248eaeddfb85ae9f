"""The collector for an experiment's protection."""

from __future__ import annotations

from fedveil.core.settings.experiment import Experiment
from fedveil.server.protection.collector import Opening, UpdateCollector
from fedveil.server.protection.homomorphic import HomomorphicCollector
from fedveil.server.protection.masked import MaskedCollector
from fedveil.server.protection.noise import NoisySum
from fedveil.server.protection.plain import PlainCollector
from fedveil.server.protection.server_protection import Converse, ServerProtection


def new_collector(
    experiment: Experiment,
    protection: ServerProtection | None,
    number: int,
    attempt: int,
    converse: Converse,
    noisy: NoisySum | None,
    opening: Opening,
) -> UpdateCollector:
    """Return the collector for an attempt at a round; noisy: what becomes of the sum, where noise is in it."""
    if protection is None:
        return PlainCollector(experiment.communication.encoding, experiment.privacy.noisy, noisy, opening)
    if protection.context is not None:
        return HomomorphicCollector(protection, number, opening)
    return MaskedCollector(protection, number, attempt, converse, noisy, opening)
