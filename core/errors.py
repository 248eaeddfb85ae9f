"""The exceptions of FedVeil, in one tree.

FedveilError            exit code 1: a failure while running; what was done is kept
├── SettingsError       exit code 2: a setting is unknown, of a wrong type, out of range, or cannot work
├── DataError           exit code 2: data is missing, damaged, or does not fit the experiment
├── ProtectionError     a protection cannot be applied or its result not trusted
├── DeploymentError     a server or client on another machine cannot be reached or started
├── TrainingError       training failed: it diverged, or a client raised an exception
└── Interrupted         exit code 130: the user stopped the run; the record can be resumed
"""

from __future__ import annotations

import difflib
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


class DeploymentError(FedveilError):
    """A server or client on another machine cannot be reached or started."""


class TrainingError(FedveilError):
    """Training failed: it diverged, or a client raised an exception."""


class Interrupted(FedveilError):
    """The user stopped the run; the record holds every whole round and can be resumed."""

    exit_code = 130


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Return `"; did you mean 'x'?"` for the known name x closest to `name`; an empty string where none is close.

    prefix: written before x
    """
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{prefix}{close[0]}'?" if close else ""
