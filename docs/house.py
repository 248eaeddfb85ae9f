"""The picture of the house in docs/architecture.md, made from the imports: python docs/house.py docs/images/house.svg

Rooms are folders of the checkout; an arrow is an import, as thick as there are files that make it. Imports for types count;
those from core, which every folder has, are not drawn.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FLOORS: tuple[tuple[str, ...], ...] = (  # from the ground up: a folder imports from floors below its own
    ("core",),
    ("models", "datasets", "privacy"),
    ("algorithms",),
    ("client", "server"),
    ("simulations",),
    ("front",),
)
FOLDERS = tuple(folder for floor in FLOORS for folder in floor)


def files(folder: str) -> list[Path]:
    """The Python files of a folder at the top, with those of its rooms."""
    return sorted(path for path in (ROOT / folder).rglob("*.py") if "__pycache__" not in path.parts)


def module_of(path: Path) -> str:
    """The dotted name of a file of the checkout, `fedveil.core.errors`."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    parts = parts[1:] if parts[0] == "front" else parts
    if parts and parts[-1] == "__init__":
        parts.pop()
    return ".".join(["fedveil", *parts])


def imported(path: Path) -> set[str]:
    """The dotted names that a file imports anywhere in it: modules, and what may be modules."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def imports() -> dict[str, set[str]]:
    """Every module of the package, and the modules of the package that it imports."""
    paths = {module_of(path): path for folder in FOLDERS for path in files(folder)}
    graph = {}
    for module, path in paths.items():
        names = imported(path) & paths.keys()
        # `from fedveil.core import parts` names the package too, which is where the module lies and no import of its own
        graph[module] = {name for name in names if not any(other.startswith(f"{name}.") for other in names)} - {module}
    return graph


def room_of(module: str) -> str:
    """The folder that a module lies in, `client/learning`; `front` for the package itself."""
    path = ROOT.joinpath(*module.split(".")[1:])
    if not (path.is_dir() or path.with_suffix(".py").exists()) or module == "fedveil":
        return "front"
    return str((path if path.is_dir() else path.parent).relative_to(ROOT))


def arrows() -> Counter[tuple[str, str]]:
    """How many files of one room import from another."""
    found: Counter[tuple[str, str]] = Counter()
    for module, others in imports().items():
        for room in {room_of(other) for other in others} - {room_of(module)}:
            found[room_of(module), room] += 1
    return found


def draw(path: Path) -> None:
    """Draw the rooms on their floors, with the lines of each, and the imports between folders."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "house"
    from matplotlib import pyplot as plt
    from matplotlib.patches import FancyArrowPatch, Rectangle

    counts = {room: 0 for folder in FOLDERS for room in {room_of(module_of(file)) for file in files(folder)}}
    for folder in FOLDERS:
        for file in files(folder):
            counts[room_of(module_of(file))] += len(file.read_text("utf-8").splitlines())
    figure, axes = plt.subplots(figsize=(12, 9))
    places = {}
    for height, floor in enumerate(FLOORS):
        width = 12 / len(floor)
        for i, folder in enumerate(floor):
            rooms = sorted(room for room in counts if room == folder or room.startswith(f"{folder}/"))
            lines = sum(counts[room] for room in rooms)
            axes.add_patch(Rectangle((i * width + 0.1, height * 1.5), width - 0.2, 1.05, fc="#eef3f8", ec="#40566b"))
            inner = ", ".join(room.split("/", 1)[1] for room in rooms if "/" in room)
            axes.text(
                i * width + width / 2, height * 1.5 + 0.75, f"{folder}/  ({lines:,} lines)", ha="center", weight="bold"
            )
            axes.text(
                i * width + width / 2, height * 1.5 + 0.25, inner, ha="center", va="center", fontsize=8, wrap=True
            )
            places[folder] = (i * width + width / 2, height * 1.5)
    between: Counter[tuple[str, str]] = Counter()
    for (start, end), number in arrows().items():
        if start.split("/")[0] != end.split("/")[0]:
            between[start.split("/")[0], end.split("/")[0]] += number
    for (start, end), number in between.items():
        if end == "core":
            continue  # everybody does
        (x0, y0), (x1, y1) = places[start], places[end]
        axes.add_patch(
            FancyArrowPatch(
                (x0, y0),
                (x1, y1 + 1.05),
                arrowstyle="-|>",
                mutation_scale=10,
                color="#40566b",
                alpha=0.5,
                linewidth=0.4 + number / 12,
                connectionstyle="arc3,rad=0.08",
            )
        )
    axes.set_xlim(0, 12)
    axes.set_ylim(-0.2, 1.5 * len(FLOORS))
    axes.axis("off")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=110)


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
