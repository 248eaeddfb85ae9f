"""Settings that several networks have, and what networks for text check."""

from __future__ import annotations

from typing import Literal

from fedveil.core.errors import SettingsError
from fedveil.core.examples import Task

Initialization = Literal["he", "xavier", "lecun", "zeros"]
INITIALIZATION = "of dense layers; zeros sets every weight to zero (an mlp then does not learn)"
EMBEDDING = "text: numbers a word is turned into"
POOLING = "text: how the words of an example become one vector"


def check_text(task: Task, name: str) -> None:
    """Raise SettingsError where a network that reads text is given something else."""
    if task.kind != "text":
        raise SettingsError(f"model.name = '{name}': reads text, and the data are {task.kind}; take 'mlp'")
