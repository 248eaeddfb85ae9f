"""The walls of the house (docs/architecture.md): who may import whom, where Flower appears, and how large a room may be."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
MOST_FILES, MOST_LINES = 12, 400
LONG: dict[str, str] = {}  # files over MOST_LINES, each with the reason why it is still one idea
FLOWER = (
    "client",
    "server",
    "simulations",
    "core/wire/flower.py",
    "core/wire/messages.py",
)  # where Flower may be imported


def load_house() -> ModuleType:
    spec = importlib.util.spec_from_file_location("house", ROOT / "docs" / "house.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


house = load_house()


def circles(graph: Mapping[str, set[str]]) -> Iterator[list[str]]:
    """The strongly connected components of more than one node (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []

    def visit(node: str) -> Iterator[list[str]]:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph.get(node, ())):
            if other not in index:
                yield from visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            found = []
            while not found or found[-1] != node:
                found.append(stack.pop())
            if len(found) > 1:
                yield sorted(found)

    sys.setrecursionlimit(10_000)
    for node in sorted(graph):
        if node not in index:
            yield from visit(node)


def test_no_import_runs_up_a_floor_or_across_one() -> None:
    floor = {folder: number for number, folders in enumerate(house.FLOORS) for folder in folders}
    wrong = []
    for module, others in house.imports().items():
        own = house.room_of(module).split("/")[0]
        for other in others:
            its = house.room_of(other).split("/")[0]
            if its != own and floor[its] >= floor[own]:
                wrong.append(f"{module} imports {other}")
    assert wrong == []


def test_no_modules_import_each_other_in_a_circle_types_included() -> None:
    assert list(circles(house.imports())) == []


def test_a_circle_would_be_found() -> None:
    assert list(circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})) == [["a", "b", "c"]]


def test_flower_appears_where_the_design_says() -> None:
    wrong = []
    for folder in house.FOLDERS:
        for path in house.files(folder):
            name = str(path.relative_to(ROOT))
            if not name.startswith(FLOWER) and any(i.split(".")[0] == "flwr" for i in house.imported(path)):
                wrong.append(name)
    assert wrong == []


@pytest.mark.parametrize("folder", house.FOLDERS)
def test_a_folder_holds_at_most_twelve_files(folder: str) -> None:
    rooms: dict[Path, int] = {}
    for path in house.files(folder):
        if path.name != "__init__.py":
            rooms[path.parent] = rooms.get(path.parent, 0) + 1
    assert {str(room.relative_to(ROOT)): number for room, number in rooms.items() if number > MOST_FILES} == {}


def test_no_file_is_too_long_but_for_a_reason() -> None:
    lines = {
        str(path.relative_to(ROOT)): len(path.read_text("utf-8").splitlines())
        for folder in house.FOLDERS
        for path in house.files(folder)
    }
    assert {name for name, number in lines.items() if number > MOST_LINES} == set(LONG)


def test_no_folder_is_over_a_third_of_the_house() -> None:
    sizes = {
        folder: sum(len(path.read_text("utf-8").splitlines()) for path in house.files(folder))
        for folder in house.FOLDERS
    }
    assert max(sizes.values()) <= sum(sizes.values()) / 3, sizes


def test_every_file_says_what_it_is_for() -> None:
    import ast

    silent = [
        str(path.relative_to(ROOT))
        for folder in house.FOLDERS
        for path in house.files(folder)
        if not ast.get_docstring(ast.parse(path.read_text("utf-8")))
    ]
    assert silent == []
