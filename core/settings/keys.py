"""Dotted keys of settings: those of the sections, of the parts chosen in them, and of an experiment's values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic.fields import FieldInfo

from fedveil.core.catalog import Table
from fedveil.core.settings.choice import Choice
from fedveil.core.settings.section import Section


def fields(section: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield dotted key and field of every setting in a section and its subsections; a part is one setting."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from fields(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def choices(section: type[Section]) -> dict[str, type[Choice]]:
    """Return the kinds of part that a section chooses, by the prefix of their settings' keys."""
    found = (field.annotation for _, field in fields(section))
    return {kind.prefix: kind for kind in found if isinstance(kind, type) and issubclass(kind, Choice)}


def plain_keys(section: type[Section]) -> dict[str, str]:
    """Return the description of every setting by dotted key, without the settings of parts; this imports no part."""
    kinds = choices(section)
    return {kinds[key].key if key in kinds else key: field.description or "" for key, field in fields(section)}


def all_keys(section: type[Section]) -> dict[str, str]:
    """Return `plain_keys` with the settings of FedVeil's parts, each with the names of the parts that have it."""
    kinds = {kind.key: kind for kind in choices(section).values()}
    keys: dict[str, str] = {}
    for key, description in plain_keys(section).items():
        keys[key] = description
        if key in kinds:
            keys |= {f"{kinds[key].prefix}.{name}": said for name, said in _of_parts(kinds[key]).items()}
    return keys


def _of_parts(kind: type[Choice]) -> dict[str, str]:
    """Return the settings of all parts of a kind with their descriptions: `alpha: "dirichlet: concentration"`."""
    having: dict[str, dict[str, list[str]]] = {}
    for part in kind.table:
        for name, field in kind.table.declared(part, kind.key).settings.model_fields.items():
            having.setdefault(name, {}).setdefault(field.description or "", []).append(part)
    return {
        name: "; ".join(f"{', '.join(parts)}: {said}" for said, parts in told.items() if said)
        for name, told in having.items()
    }


def values(section: Section, prefix: str = "") -> dict[str, Any]:
    """Return each setting's value by dotted key, those of chosen parts too: `{"partition": "iid", "clients": 10}`."""
    found: dict[str, Any] = {}
    for name, value in section:
        key = f"{prefix}{name}"
        if isinstance(value, Section):
            found |= values(value, f"{key}.")
        elif isinstance(value, Choice):
            root = value.key.rpartition(".")[2] if value.key != value.prefix else ""
            found[f"{key}.{root}" if root else key] = value.name
            found |= {f"{key}.{setting}": each for setting, each in value.settings}
        else:
            found[key] = value
    return found


def describe(table: Table, name: str, key: str) -> str:
    """Describe a part, FedVeil's or a user's: its purpose, and a line for each of its settings with the default."""
    declared = table.declared(name, key)
    words = [table[name] if name in table else (table.load(name, key).__doc__ or "").strip().split("\n")[0]]
    for setting, field in declared.settings.model_fields.items():
        default = "" if field.is_required() else f" = {field.get_default(call_default_factory=True)!r}"
        words.append(f"  {setting}{default}  {field.description or ''}".rstrip())
    return "\n".join([f"{name}  {words[0]}".rstrip(), *words[1:]])
