"""Resumptions of a run, in its record.

environment.json lists the resumptions. A resumption may change the number of rounds; its entry then holds the SHA-256
of experiment.toml before and after. A checkpoint names the settings it was made with, so it is accepted with either.
The list is written first, so that a run can be resumed after a kill between the writes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import sha256
from typing import Any

from fedveil.core.errors import SettingsError
from fedveil.core.record.environment import environment
from fedveil.core.record.record import Record
from fedveil.core.settings.experiment import Experiment

FILE = "environment.json"


def note_resume(record: Record, experiment: Experiment, after: int, command: Sequence[str] = ()) -> None:
    """Add a resumption to environment.json, and change the number of rounds in experiment.toml to that of `experiment`.

    after: the rounds that are done
    Raise SettingsError where environment.json is damaged.
    """
    written = Experiment.load(record.path("experiment.toml"))
    around = environment(experiment.device, command)
    entry: dict[str, Any] = {key: around[key] for key in ("started", "command", "versions", "commit")} | {
        "after": after
    }
    before, rounds = written.federation.rounds, experiment.federation.rounds
    text = written.override({"federation.rounds": rounds}).toml().encode()
    if rounds != before:
        entry["rounds"] = [before, rounds]
        entry["experiment"] = [record.settings, sha256(text).hexdigest()]
    told = _read(record) or around
    told["resumes"] = [*told.get("resumes", []), entry]
    record.write(FILE, json.dumps(told, indent=2).encode() + b"\n")
    if rounds != before:
        record.replace_settings(text)


def earlier_settings(record: Record) -> set[str]:
    """Return the SHA-256 of each experiment.toml that this run has had, the present one included."""
    found = {record.settings}
    for entry in reversed(_read(record).get("resumes", [])):
        before, after = entry.get("experiment", ("", ""))
        if after in found:
            found.add(before)
    return found


def _read(record: Record) -> dict[str, Any]:
    """Return the content of environment.json; an empty dict where there is no such file."""
    try:
        told: dict[str, Any] = json.loads(record.path(FILE).read_bytes())
        told.get("resumes", [])
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError) as error:
        raise SettingsError(
            f"fedveil resume {record.folder}: {FILE} is damaged ({error}); put it back, or remove it"
        ) from None
    return told
