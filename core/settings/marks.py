"""Marks on settings that say when they have an effect; `effects.check_effect` refuses a setting that has none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Needs:
    """The mark that a setting has an effect only with certain values of another setting.

    key: the other setting, of the same section, or dotted
    values: the values with which this setting has an effect; None stands for no value
    above: instead of `values`, any number larger than this
    to_say: the words for what is needed, instead of the values
    """

    key: str
    values: tuple[str | bool | None, ...] = ()
    above: float | None = None
    to_say: str = ""

    def met(self, found: Any) -> bool:
        """Say whether `found`, the other setting's value, is one that is needed; a user's own part always is."""
        if isinstance(found, str) and ":" in found:
            return True
        return found in self.values if self.above is None else found is not None and found > self.above


@dataclass(frozen=True)
class UsedBy:
    """The mark that a setting has an effect only where the part chosen at `key` of its section declares to use it."""

    key: str
