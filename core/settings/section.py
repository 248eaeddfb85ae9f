"""The base class of sections of settings, those of parts included: frozen values, validated when they are read."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def _rising(ends: tuple[float, float]) -> tuple[float, float]:
    if not ends[0] < ends[1]:
        raise ValueError(f"a range must rise, from its lowest value to its highest; it is {list(ends)}")
    return ends


Range = Annotated[
    tuple[Annotated[float, Field(allow_inf_nan=False)], Annotated[float, Field(allow_inf_nan=False)]],
    Field(strict=False),
    AfterValidator(_rising),
]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A section of settings, frozen; it refuses unknown keys and wrong types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class NoSettings(Section):
    """The empty settings of a part that has none."""
