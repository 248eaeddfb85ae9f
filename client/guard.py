"""A client's leak guard: before an update leaves in the clear, say what it reveals, or keep it back."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np

from fedveil.client.work import Workplace
from fedveil.core.errors import ProtectionError
from fedveil.privacy.leakage.guard import reveals

log = logging.getLogger("fedveil.guard")  # not Flower's, which simulations keep quiet


STEPS = ("off", "warn", "refuse")


def guard(
    place: Workplace,
    client: int,
    given: Mapping[str, np.ndarray],
    weights: Mapping[str, np.ndarray],
    least: str = "off",
) -> None:
    """Look at what would be sent, as `privacy.leak_guard` says, with the attacks that take milliseconds.

    given: the model that the client was sent; weights: those that it would send, after whatever covers them
    least: what the client's owner asks for, which goes where the settings ask for less
    Raise ProtectionError where it must not be sent; what it reveals is told to the client's operator alone.
    """
    how = max(place.experiment.privacy.leak_guard, least, key=STEPS.index)
    if how == "off":
        return
    found = reveals(given, weights, place.federated.client(client)[0], place.federated.dataset.task)
    if not found.anything:
        return
    log.warning("client %d: %s%s", client, found, "; it is not sent" if how == "refuse" else "")
    if how == "refuse":
        raise ProtectionError(
            "leak_guard = 'refuse': the client's own guard kept its update back, as it reveals examples"
        )
