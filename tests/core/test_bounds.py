"""Bounds: settings come from other machines too, so no number is without an upper end, no text or list without a length."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from fedveil.core import catalog
from fedveil.core.catalog import Table
from fedveil.core.errors import SettingsError
from fedveil.core.settings import experiment as settings
from fedveil.core.settings.choice import LONGEST_NAME
from fedveil.core.settings.experiment import Experiment

TABLES = {name: table for name, table in vars(catalog).items() if isinstance(table, Table)}
PARTS = [(table, part) for table in TABLES for part in TABLES[table] if table != "PRESETS"]


def unbounded(schema: Any, path: str = "") -> Iterator[str]:
    """The paths of a JSON schema under which a number, text or list has no end."""
    if isinstance(schema, list):
        for number, each in enumerate(schema):
            yield from unbounded(each, f"{path}/{number}")
    if not isinstance(schema, Mapping) or "enum" in schema or "const" in schema:
        return
    kind = schema.get("type")
    ends = {
        "integer": ("maximum", "exclusiveMaximum"),
        "number": ("maximum", "exclusiveMaximum"),
        "string": ("maxLength",),
        "array": ("maxItems",),
    }.get(kind, ())
    if ends and not any(end in schema for end in ends) and not str(schema.get("pattern", "")).endswith("}$"):
        yield path
    for key, each in schema.items():
        if key not in ("default", "description", "title", "required", "examples"):
            yield from unbounded(each, f"{path}/{key}")


def test_every_setting_of_every_section_and_part_has_an_end() -> None:
    assert not list(unbounded(Experiment.model_json_schema()))


@pytest.mark.parametrize(("table", "part"), PARTS)
def test_every_part_of_every_kind_bounds_its_settings(table: str, part: str) -> None:
    declared = TABLES[table].declared(part, table.lower()).settings
    assert not list(unbounded(declared.model_json_schema()))


def test_the_walk_sees_what_has_no_end() -> None:
    open_ended = {
        "properties": {
            "number": {"type": "integer", "minimum": 1},
            "bounded": {"type": "integer", "maximum": 3},
            "texts": {"type": "array", "maxItems": 3, "items": {"type": "string"}},
            "list": {"anyOf": [{"type": "array", "items": {"type": "null"}}, {"type": "null"}]},
        }
    }
    assert list(unbounded(open_ended)) == [
        "/properties/number", "/properties/texts/items", "/properties/list/anyOf/0"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("training.epochs = 1000000001", "must be less than or equal to 1000000000"),
        ("training.learning_rate = 1e101", "must be less than or equal to 1e+100"),
        ("data.vocabulary_size = 20_000_000", "must be less than or equal to 10000000"),
        ("data.max_tokens = 1000000000", "must be less than or equal to 1000000"),
        ("data.clients = 1000000000", "must be less than or equal to 100000000"),
        ("model.hidden = [1000000000]", "must be less than or equal to 1000000"),
        (f"model.hidden = {[1] * 101}", "must be a list of at most 100"),
        (f"data.label_column = '{'a' * 1001}'", "must be text of at most 1000 characters"),
        (f"data.labels = {[str(i) for i in range(10**5 + 1)]}", "must be a list of at most 100000"),
        (f"model.name = '{'m' * (LONGEST_NAME + 1)}'", "a name of at most 1000 characters"),
    ],
)
def test_what_is_beyond_its_end_is_refused_with_that_end_and_not_repeated_at_length(text: str, said: str) -> None:
    with pytest.raises(SettingsError) as refused:
        Experiment.received(text)
    assert said in str(refused.value)
    assert len(str(refused.value)) < 1000


def test_settings_of_another_machine_are_read_only_up_to_a_length() -> None:
    with pytest.raises(SettingsError, match="settings of 1,048,577 characters"):
        Experiment.received("#" * (settings.LONGEST + 1))
