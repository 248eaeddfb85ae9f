"""Marks at a setting that say when it has an effect; `effects.check_effect` refuses what would change nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Needs:
    """Say at a setting which values of another one it needs to have an effect.

    key: the other setting, of the same section, or dotted; values: those with which this one has an effect, where None
    stands for no value; above: or any larger number; to_say: words for what is needed, instead of the values
    """

    key: str
    values: tuple[str | None, ...] = ()
    above: float | None = None
    to_say: str = ""

    def met(self, found: Any) -> bool:
        """Whether the other setting has a value that is needed; any user's own part may be one."""
        if isinstance(found, str) and ":" in found:
            return True
        return found in self.values if self.above is None else found is not None and found > self.above


@dataclass(frozen=True)
class UsedBy:
    """Say at a setting that it has an effect where the part chosen at `key` of its section declares that it uses it."""

    key: str
