"""Settings that would have no effect are refused.

A user who sets `training.schedule_rounds` and trains at a constant rate would report a schedule that never ran.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from operator import attrgetter
from typing import Any

from pydantic.fields import FieldInfo

from fedveil.core.errors import SettingsError
from fedveil.core.settings.choice import Choice
from fedveil.core.settings.marks import Needs, UsedBy
from fedveil.core.settings.sections import Settings


def check_effect(experiment: Settings, settings: Mapping[str, Any]) -> None:
    """Raise SettingsError where a setting that was given has no effect on this experiment.

    settings: the given settings, by dotted key
    """
    for key, value in _single(settings):
        section, field = _field(experiment, key)
        for mark in [] if field is None or value is None else field.metadata:
            if isinstance(mark, Needs):
                _check_needs(experiment, mark, section, key, value)
            if isinstance(mark, UsedBy):
                _check_used(attrgetter(f"{section}.{mark.key}")(experiment), key, value)


def _check_needs(experiment: Settings, needs: Needs, section: str, key: str, value: Any) -> None:
    other = needs.key if "." in needs.key else f"{section}.{needs.key}"
    found = attrgetter(other)(experiment)
    found = found.name if isinstance(found, Choice) else found
    if needs.met(found):
        return
    if needs.values == (None,):
        raise SettingsError(
            f"{key} = {value!r}: has no effect with {other} = {found!r}, which takes its place; give one of them"
        )
    if needs.to_say:
        raise SettingsError(f"{key} = {value!r}: has no effect without {needs.to_say}")
    wanted = f"{other} = {' or '.join(f'{word!r}' for word in needs.values)}"
    raise SettingsError(f"{key} = {value!r}: has no effect with {other} = {found!r}; it needs {wanted}")


def _check_used(choice: Choice, key: str, value: Any) -> None:
    name = key.rpartition(".")[2]
    if choice.is_own or name in choice.declaration.uses:
        return
    able = [part for part in choice.table if name in choice.table.declared(part, choice.key).uses]
    wanted = " or ".join(f"'{part}'" for part in able)
    raise SettingsError(
        f"{key} = {value!r}: has no effect with {choice.key} = '{choice.name}'; it needs {choice.key} = {wanted}"
    )


def _single(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield each setting with its full dotted key, those in a part's table too."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}.{name}", each) for name, each in value.items())
        else:
            yield key, value


def _field(experiment: Settings, key: str) -> tuple[str, FieldInfo | None]:
    """Return the section of a setting, and the setting's field; None for the name of a part."""
    section, _, name = key.rpartition(".")
    place = attrgetter(section)(experiment) if section else experiment
    if isinstance(place, Choice):
        return section, type(place.settings).model_fields.get(name)
    return section, type(place).model_fields.get(name)
