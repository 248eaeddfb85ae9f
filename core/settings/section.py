"""The base class of sections of settings, those of parts included: frozen values, validated when they are read.

Settings come from other machines too, so every number has an upper bound, and every text and list a length. Bounds are
generous: what a server may ask of a client on another machine, that client's policy bounds.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

LARGEST = 1e100  # of numbers that are no counts: rates that a user tries may be absurd, and no size follows from them
LARGEST_FEATURE = 1e38  # float32 holds a little more

Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0, le=LARGEST, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, le=LARGEST, allow_inf_nan=False)]
End = Annotated[float, Field(ge=-LARGEST_FEATURE, le=LARGEST_FEATURE, allow_inf_nan=False)]


def _rising(ends: tuple[float, float]) -> tuple[float, float]:
    if not ends[0] < ends[1]:
        raise ValueError(f"a range must rise, from its lowest value to its highest; it is {list(ends)}")
    return ends


Range = Annotated[
    tuple[End, End],
    Field(strict=False),
    AfterValidator(_rising),
]
Count = Annotated[int, Field(ge=1, le=10**9)]
Width = Annotated[int, Field(ge=1, le=10**6)]  # of a layer, or of what a network reads
Depth = Annotated[int, Field(ge=1, le=100)]  # layers of a network
Word = Annotated[str, Field(max_length=1000)]  # a name: of a column, a class, a user's own part
PathName = Annotated[str, Field(max_length=4096)]


class Section(BaseModel):
    """A section of settings, frozen; it refuses unknown keys and wrong types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class NoSettings(Section):
    """The empty settings of a part that has none."""
