"""What is not public of Flower is touched in one file of each folder that speaks with it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
PUBLIC = {"flwr.app", "flwr.clientapp", "flwr.serverapp", "flwr.serverapp.strategy", "flwr.simulation"}
KNOW_FLOWER = ("core", "client", "server", "simulations")
ADAPTERS = {"core/wire/flower.py", "client/flower.py", "server/flower.py", "simulations/flower.py"}


def flower_imports(code: str) -> Iterator[str]:
    """The modules of Flower that code imports, by whatever form of import."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
            found = [node.module]
            # `from flwr import app` imports the module `flwr.app`
            found += [f"flwr.{alias.name}" for alias in node.names] if node.module == "flwr" else []
        else:
            continue
        yield from (name for name in found if name.split(".")[0] == "flwr")


def private_attributes(code: str) -> Iterator[str]:
    """Attributes with a leading underscore that code reads or writes in the `__dict__` of another object than self."""
    for node in ast.walk(ast.parse(code)):
        if (
            isinstance(node, ast.Subscript)
            and isinstance(node.value, ast.Attribute)
            and node.value.attr == "__dict__"
            and not (isinstance(node.value.value, ast.Name) and node.value.value.id == "self")
            and isinstance(node.slice, ast.Constant)
            and str(node.slice.value).startswith("_")
        ):
            yield str(node.slice.value)


def files(*folders: str) -> list[str]:
    return [str(path.relative_to(CHECKOUT)) for folder in folders for path in sorted((CHECKOUT / folder).rglob("*.py"))]


@pytest.mark.parametrize("file", [file for file in files(*KNOW_FLOWER) if file not in ADAPTERS])
def test_what_is_not_public_of_flower_is_imported_by_adapters_alone(file) -> None:
    code = (CHECKOUT / file).read_text()
    assert set(flower_imports(code)) <= PUBLIC
    assert list(private_attributes(code)) == []


def test_each_adapter_is_needed() -> None:
    for file in ADAPTERS:
        assert set(flower_imports((CHECKOUT / file).read_text())) - PUBLIC


@pytest.mark.parametrize(
    ("code", "imported"),
    [
        ("import flwr", {"flwr"}),
        ("import flwr.common.constant as c", {"flwr.common.constant"}),
        ("from flwr import common", {"flwr", "flwr.common"}),
        ("def f():\n    from flwr.supercore.run import Run", {"flwr.supercore.run"}),
        ("from flwr.app.message import remove_content_from_message", {"flwr.app.message"}),
        ("from fedveil.core.wire.flower import ErrorCode", set()),
        ("from . import flwr", set()),
        ("import flwrs", set()),
    ],
)
def test_every_form_of_import_is_found(code, imported) -> None:
    assert set(flower_imports(code)) == imported


def test_a_private_attribute_of_another_object_is_found() -> None:
    assert list(private_attributes('message.metadata.__dict__["_message_id"] = "1"')) == ["_message_id"]
    assert list(private_attributes('self.__dict__["_data"]')) == []
