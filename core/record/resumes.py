"""How a run goes on: what its record says of each resumption, and a new number of rounds.

environment.json lists the resumptions. One that changes the number of rounds names the SHA-256 of experiment.toml before
and after: the checkpoint, which names the settings it was made with, is then known to belong to both. The list is written
first, so that a kill between the three files leaves a run that goes on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import sha256
from typing import Any

from fedveil.core.errors import SettingsError
from fedveil.core.record.record import Record, environment
from fedveil.core.settings.experiment import Experiment

FILE = "environment.json"


def note_resume(record: Record, experiment: Experiment, after: int, command: Sequence[str] = ()) -> None:
    """Write down that a run goes on after so many rounds, to the number of rounds that `experiment` has.

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
    """SHA-256 of every experiment.toml that a checkpoint of this run may have been made with, today's included."""
    found = {record.settings}
    for entry in reversed(_read(record).get("resumes", [])):
        before, after = entry.get("experiment", ("", ""))
        if after in found:
            found.add(before)
    return found


def _read(record: Record) -> dict[str, Any]:
    """What environment.json holds; nothing where there is none."""
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
