"""Tests that mutate files name their parsers in a report."""

from __future__ import annotations

from helpers.fuzzing import name_parsers


def pytest_collection_modifyitems(items):
    name_parsers(items)
