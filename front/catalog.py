"""Commands that describe what FedVeil has: `fedveil list`, `show`, `schema`, `version`."""

from __future__ import annotations

import json
from importlib import metadata
from typing import Annotated, Any

import typer
from rich.console import Console

from fedveil import __version__, attack
from fedveil.core import catalog
from fedveil.core.errors import SettingsError, nearest

TABLES = {
    "presets": catalog.PRESETS,
    "datasets": catalog.DATASETS,
    "partitions": catalog.PARTITIONS,
    "metrics": catalog.METRICS,
    "models": catalog.MODELS,
    "strategies": catalog.STRATEGIES,
    "protections": catalog.PROTECTIONS,
    "mechanisms": catalog.MECHANISMS,
    "defences": catalog.DEFENCES,
    "attacks": catalog.ATTACKS,
}
KINDS = ", ".join(TABLES)


def list_parts(
    kind: Annotated[str | None, typer.Argument(metavar="[KIND]", help=KINDS)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object: a line of each name")] = False,
) -> None:
    """List what FedVeil has: presets, datasets, partitions, metrics, models, strategies, protections, mechanisms, defences, attacks."""
    from rich.table import Table

    if kind is not None:
        _table("list", kind)
    if as_json:
        told = {name: dict(table) for name, table in TABLES.items()}
        typer.echo(json.dumps(told[kind] if kind else told))
        return
    console = Console()
    if kind == "attacks":
        attack.list_attacks(console)
        return
    for name, table in TABLES.items():
        if kind in (None, name):
            grid = Table(
                title=name if kind is None else None, title_justify="left", box=None, show_header=False, pad_edge=False
            )
            grid.add_column(no_wrap=True, style="bold")
            grid.add_column()
            for entry, description in table.items():
                grid.add_row(entry, description)
            console.print(grid)
            if kind is None:
                console.print()


def show(
    kind: Annotated[str, typer.Argument(metavar="KIND", help=KINDS)],
    name: Annotated[str, typer.Argument(metavar="NAME", help="see `fedveil list KIND`; or your package.module:object")],
) -> None:
    """Show a part: what it is, its own settings with their defaults and ranges, and what it needs."""
    from fedveil.core.declaration import ATTRIBUTE, declaration

    table = _table("show", kind)
    table.check(name, f"show {kind}")
    console = Console()

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True, markup=False)

    say(f"{name}  {table.get(name, 'your own')}")
    if kind == "presets":
        from fedveil.core.settings.experiment import Experiment

        say("\n" + Experiment.preset(name).toml().rstrip())
        return
    if kind == "mechanisms":
        return
    found = None if name == "none" else table.load(name, f"show {kind}")
    if kind == "attacks":
        say(attack.attack_words(name))
    declared = declaration(found)
    if hasattr(found, ATTRIBUTE):
        say(
            f"  needs  {declared.needs}" + ("; keeps something of each client between rounds" if declared.state else "")
        )
        if declared.tasks:
            say(f"  tasks  {', '.join(declared.tasks)}")
    rows = settings_rows(declared.settings)
    say("settings of its own" if rows else "no settings of its own")
    from rich.table import Table

    grid = Table(box=None, show_header=False, pad_edge=False)
    for key, default, allowed, description in rows:
        grid.add_row(f"  {key}", default, allowed, description)
    if rows:
        console.print(grid)


def settings_rows(settings: Any) -> list[tuple[str, str, str, str]]:
    """Return for each setting of a pydantic model its key, default, allowed values and description."""
    about = settings.model_json_schema()
    rows = []
    for key, words in about.get("properties", {}).items():
        default = "must be given" if key in about.get("required", []) else json.dumps(words.get("default"))
        rows.append((key, default, _allowed(words, about.get("$defs", {})), words.get("description", "")))
    return rows


def _allowed(words: dict[str, Any], named: dict[str, Any]) -> str:
    """Describe in words the values that a JSON schema allows."""
    if "$ref" in words:
        return _allowed(named[words["$ref"].rpartition("/")[2]], named)
    if "anyOf" in words:
        return " or ".join(_allowed(one, named) for one in words["anyOf"])
    if "enum" in words or "const" in words:
        return ", ".join(json.dumps(value) for value in words.get("enum", [words.get("const")]))
    kinds = {"integer": "a whole number", "number": "a number", "string": "text", "boolean": "true or false",
             "array": "a list", "object": "a table", "null": "nothing"}  # fmt: skip
    ranges = (
        ("minimum", "at least"),
        ("exclusiveMinimum", "above"),
        ("maximum", "at most"),
        ("exclusiveMaximum", "below"),
    )
    said = [f"{word} {words[key]:g}" for key, word in ranges if key in words]
    return " ".join([kinds.get(words.get("type", ""), "anything"), *([", ".join(said)] if said else [])])


def schema() -> None:
    """Print every setting of an experiment, with its type, default and description, as JSON schema."""
    from fedveil.core.settings.experiment import Experiment

    typer.echo(json.dumps(Experiment.model_json_schema(), indent=2))


def version(
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Print the versions of FedVeil and of what it computes with."""
    import platform

    packages = ("flwr", "torch", "tenseal", "numpy")
    versions = {"fedveil": __version__, "python": platform.python_version()}
    versions |= {name: metadata.version(name) for name in packages}
    typer.echo(json.dumps(versions) if as_json else "\n".join(f"{name} {found}" for name, found in versions.items()))


def _table(command: str, kind: str) -> Any:
    if kind not in TABLES:
        raise SettingsError(f"{command}: there is no kind '{kind}'{nearest(kind, TABLES)}\n  known: {KINDS}")
    return TABLES[kind]
