"""What a part says of itself: its own settings, and what it needs from the experiment that uses it."""

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
    """A part's own words.

    settings: the model of its own settings
    needs: of an aggregation, what it must see: `sum` (a sum that nobody opens), `mean` (the opened mean of the cohort),
        or `each` (every client's update); of a protection, the most that it shows
    tasks: the kinds of task it fits; empty: any
    state: whether it keeps something for each client between rounds
    uses: keys of the section it is chosen in that have an effect on it, beside its own settings
    why: a clause that says why it needs the mean or each update; empty where a sum is enough
    check: is given its settings and the experiment, and raises SettingsError where they cannot work together
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
    """Declare a function or class as a part, with its own settings beside it.

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
    """Whether a part says something of itself."""
    return hasattr(found, ATTRIBUTE)


def declaration(found: Any) -> Declaration:
    """What a part declares; a user's own that declares nothing has no settings and may need anything."""
    declared = getattr(found, ATTRIBUTE, None)
    return declared if isinstance(declared, Declaration) else Declaration()
