"""Changes of settings by their keys, as `--set` makes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedveil.core.errors import SettingsError
from fedveil.core.settings.choice import Choice


def changed(tree: dict[str, Any], settings: Mapping[str, Any], choices: Mapping[str, type[Choice]]) -> dict[str, Any]:
    """Return `tree`, changed in place by `settings`; the value None restores the default.

    tree: all settings, nested as in TOML; settings: new values by dotted key
    choices: kinds of part, by the key of the table that holds the part's name and settings
    """
    names = {key: prefix for prefix, kind in choices.items() for key in (prefix, f"{prefix}.name", kind.key)}
    for key in sorted(settings, key=lambda key: key not in names):  # a part first, then its settings
        value = settings[key]
        prefix = names.get(key, "")
        if prefix:
            branch, last = _branch(tree, prefix)
            branch[last] = _chosen(choices[prefix], branch.get(last, {}), value)
            continue
        branch, last = _branch(tree, key)
        if value is None:
            branch.pop(last, None)
        else:
            branch[last] = value
    return tree


def _branch(tree: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    """Return the table that holds a key, and the key's name in it; raise SettingsError where there is no such table."""
    *sections, last = key.split(".")
    branch: Any = tree
    for section in sections:
        branch = branch.setdefault(section, {})
        if not isinstance(branch, dict):
            raise SettingsError(f"{key}: unknown setting; '{section}' is a value, not a section")
    return branch, last


def _chosen(kind: type[Choice], before: dict[str, Any], value: Any) -> Any:
    """Return the table of a newly chosen part.

    It keeps the old part's settings that differ from their defaults, where the new part has them too.
    before: the table of the old part; value: the new part's name, its table, or None for the default part
    """
    if not isinstance(value, str) and value is not None:
        return value  # a whole table replaces the old one
    name, old = value or kind.default, before["name"]
    if name == old:
        return before
    if name not in kind.table and not kind.table.is_own(name):
        return {"name": name}  # validation refuses it, together with all other errors
    has = kind.table.declared(name, kind.key).settings.model_fields
    had = kind.table.declared(old, kind.key).settings.model_fields
    kept = {
        key: each
        for key, each in before.items()
        if key in has and key in had and each != had[key].get_default(call_default_factory=True)
    }
    return {"name": name, **kept}
