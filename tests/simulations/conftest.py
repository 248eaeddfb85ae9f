"""Runs for the tests of protected ones: watched, and honest ones to hold others against, made once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from helpers.protected import Observed, Watched, ended, observe

from fedveil import Experiment


@pytest.fixture
def watched(monkeypatch, tmp_path) -> Watched:
    """Run an experiment in a folder of this test, and look into it."""

    def observed(experiment: Experiment, name: str = "run", **hands: Any) -> Observed:
        return observe(monkeypatch, experiment, tmp_path / name, **hands)

    return observed


@pytest.fixture(scope="session")
def honest(tmp_path_factory) -> Callable[[Experiment], Observed]:
    """The run of an experiment in which nobody lies, drops out, or is killed."""

    @cache
    def play(experiment: Experiment) -> Observed:
        with pytest.MonkeyPatch.context() as patch:
            return ended(observe(patch, experiment, tmp_path_factory.mktemp("honest") / "run"))

    return play
