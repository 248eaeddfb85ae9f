"""Types and descriptions of settings that several networks share."""

from __future__ import annotations

from typing import Literal

Initialization = Literal["he", "xavier", "lecun", "zeros"]
INITIALIZATION = "of dense layers; zeros sets every weight to zero (an mlp then does not learn)"
EMBEDDING = "text: numbers a word is turned into"
POOLING = "text: how the words of an example become one vector"
