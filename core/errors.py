"""The exceptions of FedVeil, in one tree.

FedveilError            exit code 1: a failure while running; what was done is kept
├── SettingsError       exit code 2: a setting is unknown, of a wrong type, out of range, or cannot work
├── DataError           exit code 2: data is missing, damaged, or does not fit the experiment
├── ProtectionError     a protection cannot be applied or its result not trusted
│   ├── Disallowed      a client's owner does not allow what a run asks for
│   └── ForgeryError    an aggregate is not a sum of what its clients sent: the server lies
├── DeploymentError     a server or client on another machine cannot be reached or started
├── TrainingError       training failed: it diverged, or a client raised an exception
└── Interrupted         exit code 130: the user stopped the run; the record can be resumed
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class FedveilError(Exception):
    """The base of all of FedVeil's errors: the message says what happened, with which value, and what to do."""

    exit_code = 1


class SettingsError(FedveilError):
    """A setting is unknown, of a wrong type, out of range, or cannot work with another."""

    exit_code = 2


class DataError(FedveilError):
    """Data is missing, damaged, or does not fit the experiment."""

    exit_code = 2


class ProtectionError(FedveilError):
    """A protection cannot be applied, or its result cannot be trusted."""


class Disallowed(ProtectionError):
    """A client's owner does not allow what a run's settings ask for.

    keys: the settings, by which the server that sent them is told; the message, with the owner's limits, is the owner's
    """

    def __init__(self, message: str, keys: Iterable[str] = ()) -> None:
        super().__init__(message, tuple(keys))

    @property
    def keys(self) -> tuple[str, ...]:
        """The settings that are not allowed."""
        keys: tuple[str, ...] = self.args[1]
        return keys

    def __str__(self) -> str:
        return str(self.args[0])


class ForgeryError(ProtectionError):
    """An aggregate is not the sum of what its clients sent: the server, or a client, did what the protocol does not."""


class DeploymentError(FedveilError):
    """A server or client on another machine cannot be reached or started."""


class TrainingError(FedveilError):
    """Training failed: it diverged, or a client raised an exception."""


class Interrupted(FedveilError):
    """The user stopped the run; the record holds every whole round and can be resumed."""

    exit_code = 130


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Return `"; did you mean 'x'?"` for the known name x closest to `name`; an empty string where none is close.

    Case, and '-' for '_', make no difference. prefix: written before x
    """
    close = closest(name, known)
    return f"; did you mean '{prefix}{close}'?" if close else ""


def closest(name: str, known: Iterable[str], cutoff: float = 0.5) -> str | None:
    """Return the known name closest to `name`, whatever their case; None where none is close."""
    plain: dict[str, str] = {}
    for each in known:
        plain.setdefault(plainly(each), each)
    found = difflib.get_close_matches(plainly(name), list(plain), n=1, cutoff=cutoff)
    return plain[found[0]] if found else None


def plainly(name: str) -> str:
    """Return a name in small letters, with '_' between its words: `localEpochs`, `local-epochs` -> `local_epochs`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().replace("-", "_").replace(" ", "_")
