"""The flat keys of FedVeil 0.1.0, which are read with a warning that names the new key."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from copy import deepcopy
from typing import Any, NamedTuple

from fedveil.core.errors import SettingsError
from fedveil.core.settings.choice import (
    Choice,
    DatasetChoice,
    DefenceChoice,
    Model,
    PartitionChoice,
    ProtectionChoice,
    StrategyChoice,
)


class OldKey(FutureWarning):
    """The warning that a setting has a new key."""


class Renamed(NamedTuple):
    """The successor of an old key: the setting `name` of a kind of part; default: the old key's, None without one."""

    kind: type[Choice]
    name: str
    default: Any


MOVED = {
    "federation.malicious": ("federation.byzantine_clients", 0)
}  # to another key of the same section, and the default

RENAMED = {
    "data.partition_alpha": Renamed(PartitionChoice, "alpha", 0.5),
    "data.partition_classes": Renamed(PartitionChoice, "classes", 2),
    "data.partition_shards": Renamed(PartitionChoice, "shards", 2),
    "data.partition_exponent": Renamed(PartitionChoice, "exponent", 1.0),
    "data.examples_per_client": Renamed(DatasetChoice, "examples", 100),
    "data.examples_spread": Renamed(DatasetChoice, "spread", 1.0),
    "data.synthetic_beta": Renamed(DatasetChoice, "beta", 1.0),
    "data.synthetic_rule": Renamed(DatasetChoice, "rule", "own"),
    "federation.server_learning_rate": Renamed(StrategyChoice, "learning_rate", None),
    "federation.server_momentum": Renamed(StrategyChoice, "momentum", 0.9),
    "federation.beta_1": Renamed(StrategyChoice, "beta_1", 0.9),
    "federation.beta_2": Renamed(StrategyChoice, "beta_2", 0.99),
    "federation.tau": Renamed(StrategyChoice, "tau", 1e-3),
    "federation.q": Renamed(StrategyChoice, "q", 0.1),
    "federation.trim_fraction": Renamed(StrategyChoice, "fraction", 0.2),
    "federation.selected": Renamed(StrategyChoice, "selected", None),
    "privacy.profile": Renamed(ProtectionChoice, "profile", None),
    "privacy.range": Renamed(ProtectionChoice, "range", 6.0),
    "privacy.min_clients": Renamed(ProtectionChoice, "min_clients", 3),
    "privacy.degree": Renamed(ProtectionChoice, "degree", 4096),
    "privacy.primes": Renamed(ProtectionChoice, "primes", [40, 60]),
    "privacy.plain_bits": Renamed(ProtectionChoice, "plain_bits", 45),
    "privacy.drop_outs": Renamed(ProtectionChoice, "drop_outs", 0.2),
    "privacy.colluders": Renamed(ProtectionChoice, "colluders", 0.2),
    "privacy.prune_fraction": Renamed(DefenceChoice, "fraction", 0.9),
}


def renamed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by dotted key, old keys replaced; raise SettingsError where old and new key are both given."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        new = RENAMED.get(key)
        if new is None and key not in MOVED:
            found[key] = value
            continue
        today = MOVED[key][0] if new is None else f"{new.kind.prefix}.{new.name}"
        _warn(key, today, today in settings)
        found[today] = value
    return found


def read(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the tree of settings, old keys replaced; raise SettingsError where old and new key are both given.

    A file that 0.1.0 wrote holds every key. Keys that have their default, or that the chosen part lacks, are dropped.
    """
    old, moved = ([key for key in keys if _has(settings, key)] for keys in (RENAMED, MOVED))
    if not old and not moved:
        return settings
    tree: dict[str, Any] = deepcopy(dict(settings))
    for key in moved:
        section, _, name = key.partition(".")
        (today, default), value = MOVED[key], tree[section].pop(name)
        if value != default:
            _warn(key, today, _has(tree, today))
            tree[section][today.partition(".")[2]] = value
    if all(_has(settings, key) for key, new in RENAMED.items() if new.default is not None and key.startswith("data.")):
        _drop_foreign_settings(tree)
    for key in old:
        section, _, name = key.partition(".")
        new, value = RENAMED[key], tree[section].pop(name)
        if value == new.default:
            continue
        field = new.kind.prefix.partition(".")[2]
        chosen = tree[section].setdefault(field, {})
        part = {"name": chosen} if isinstance(chosen, str) else dict(chosen)
        called = part.get("name", new.kind.default)
        has = new.name in new.kind.table.declared(called, new.kind.key).settings.model_fields
        if not has and not new.kind.table.is_own(called):
            continue
        _warn(key, f"{new.kind.prefix}.{new.name}", new.name in part)
        tree[section][field] = {**part, new.name: value}
    return tree


def _has(settings: Mapping[str, Any], key: str) -> bool:
    section, _, name = key.partition(".")
    found = settings.get(section)
    return isinstance(found, Mapping) and name in found


def _drop_foreign_settings(tree: dict[str, Any]) -> None:
    """Drop from [model] the settings that the chosen network does not have."""
    model = tree.get("model", {})
    name = model.get("name", Model.default)
    declared = Model.table.declared(name, Model.key).settings.model_fields
    tree["model"] = {key: value for key, value in model.items() if key == "name" or key in declared}


def _warn(old: str, new: str, both: bool) -> None:
    if both:
        raise SettingsError(f"{old}: is called {new} now, and both are given; leave {old} out")
    warnings.warn(f"{old} is called {new} now; the old key will go", OldKey, stacklevel=2)
