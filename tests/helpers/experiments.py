"""Little experiments: the preset `digits` with a few changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedveil import Experiment


def digits(changes: Mapping[str, Any], **more: Any) -> Experiment:
    """The digits with changes, and with more of them: `training__epochs=2` is `training.epochs`."""
    return Experiment.preset("digits").override(
        {**changes, **{key.replace("__", "."): value for key, value in more.items()}}
    )
