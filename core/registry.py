"""Tables of names: what FedVeil has of a kind, listed and checked without importing any of it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Any

from fedveil.core.errors import SettingsError, nearest


class Table(Mapping[str, str]):
    """Parts of one kind by name: `name -> description`, each loaded only when it is used.

    A user's own part is named `package.module:object` and needs no entry, for the kinds that allow it.
    """

    def __init__(self, kind: str, entries: dict[str, tuple[str, str]], *, own: bool = True) -> None:
        """`entries`: name to (`module:object`, one line of description); `own`: users may name their own."""
        self.kind = kind
        self.own = own
        self._entries = entries

    def __getitem__(self, name: str) -> str:
        return self._entries[name][1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def check(self, name: str, key: str) -> str:
        """Return `name` if it may be used for the setting `key`; raise SettingsError with the nearest name otherwise."""
        if name in self._entries or (self.own and ":" in name):
            return name
        known = ", ".join(self._entries) + ("; or your own as package.module:object" if self.own else "")
        raise SettingsError(f"{key}: no {self.kind} is called '{name}'{nearest(name, self)}\n  known: {known}")

    def load(self, name: str, key: str) -> Any:
        """Import and return the part called `name`."""
        self.check(name, key)
        own = name not in self._entries
        module, _, attribute = (name if own else self._entries[name][0]).partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except Exception as error:  # importing a user's module runs it: anything can be wrong with it
            if not own:
                raise
            raise SettingsError(
                f"{key}: '{name}' cannot be loaded ({type(error).__name__}: {error}); it must be package.module:object, "
                "importable from here"
            ) from error
