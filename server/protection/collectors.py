"""The collector for an experiment's protection."""

from __future__ import annotations

from fedveil.core.settings.experiment import Experiment
from fedveil.server.protection.collector import UpdateCollector
from fedveil.server.protection.homomorphic import HomomorphicCollector
from fedveil.server.protection.masked import MaskedCollector
from fedveil.server.protection.noise import ServerNoise
from fedveil.server.protection.plain import PlainCollector
from fedveil.server.protection.server_protection import Converse, ServerProtection


def new_collector(
    experiment: Experiment,
    protection: ServerProtection | None,
    number: int,
    attempt: int,
    converse: Converse,
    noise: ServerNoise | None,
) -> UpdateCollector:
    """Return the collector for an attempt at a round; noise: of the server, added to the sum."""
    if protection is None:
        return PlainCollector(experiment.communication.encoding, experiment.privacy.noisy, noise)
    if protection.context is not None:
        return HomomorphicCollector(protection, number)
    return MaskedCollector(protection, number, attempt, converse, noise)
