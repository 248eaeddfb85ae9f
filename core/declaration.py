"""The declaration of a part: its settings, and what it needs from the experiment that uses it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from fedveil.core.settings.section import NoSettings, Section

Needs = Literal["sum", "mean", "each"]
Part = TypeVar("Part")
ATTRIBUTE = "__fedveil_part__"


@dataclass(frozen=True)
class Declaration:
    """What a part declares about itself.

    settings: the class of the part's settings
    needs: of a strategy, what it must see of the updates: `sum` (their encrypted sum), `mean` (the cohort's mean in the
        clear), or `each` (every client's update); of a protection, the most that it shows to the server
    tasks: the tasks that the part fits (`Task.names`); empty: any
    state: whether the part keeps state for each client between rounds
    uses: keys of the section in which the part is chosen that have an effect on it, beside its own settings
    why: a clause that says why the part needs the mean or each update; empty where a sum is enough
    check: takes the part's settings and the experiment; raises SettingsError where they cannot work together
    """

    settings: type[Section] = NoSettings
    needs: Needs = "each"
    tasks: tuple[str, ...] = ()
    state: bool = False
    uses: tuple[str, ...] = ()
    why: str = ""
    check: Callable[[Any, Any], None] | None = None


def part(
    settings: type[Section] = NoSettings,
    *,
    needs: Needs = "each",
    tasks: tuple[str, ...] = (),
    state: bool = False,
    uses: tuple[str, ...] = (),
    why: str = "",
    check: Callable[[Any, Any], None] | None = None,
) -> Callable[[Part], Part]:
    """Declare a function or class as a part; the arguments are the fields of `Declaration`.

    Raise TypeError where `settings` is no Section, or has a setting called `name`.

    >>> class Trim(Section):
    ...     fraction: float = 0.2
    >>> @part(Trim, needs="each")
    ... def trimmed_mean(settings: Trim) -> None: ...
    >>> declaration(trimmed_mean).settings().fraction
    0.2
    """

    if not issubclass(settings, Section):
        raise TypeError(
            f"{settings.__name__}: a part's settings must be a subclass of fedveil.core.settings.section.Section"
        )
    if "name" in settings.model_fields:
        raise TypeError(f"{settings.__name__}.name: a part's setting cannot be called `name`, which chooses the part")

    def declare(found: Part) -> Part:
        setattr(found, ATTRIBUTE, Declaration(settings, needs, tasks, state, uses, why, check))
        return found

    return declare


def declares(found: Any) -> bool:
    """Say whether a part has a declaration."""
    return hasattr(found, ATTRIBUTE)


def declaration(found: Any) -> Declaration:
    """Return a part's declaration; a user's part without one has no settings and counts as needing each update."""
    declared = getattr(found, ATTRIBUTE, None)
    return declared if isinstance(declared, Declaration) else Declaration()
