"""The folder of a Flower app: its `pyproject.toml`, and its modules, which are importable only while it runs."""

from __future__ import annotations

import importlib
import pkgutil
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from fedveil.core.errors import FedveilError, SettingsError, nearest
from fedveil.core.foreign import reading
from fedveil.core.places import where
from fedveil.simulations.flower import flatten_dict, get_flwr_home

KINDS = ("serverapp", "clientapp")
CLIENTS = 10  # the default number
App = TypeVar("App")
Scalar = bool | int | float | str
_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text, in quotes"}


@dataclass(frozen=True)
class AppFolder:
    """The settings in the `pyproject.toml` of a Flower app.

    folder: an absolute path; server, client: module:attribute
    config: the defaults of the run config, nested tables flattened with dots
    flower: the versions of Flower that it asks for, as in its dependencies; empty where it does not say
    federations: the table of that name, in which older apps say how many clients they simulate
    """

    folder: Path
    server: str
    client: str
    config: dict[str, Scalar]
    federations: dict[str, Any]
    flower: str = ""


def read_app(folder: Path) -> AppFolder:
    """Read the folder of a Flower app; raise SettingsError where it is not one."""
    folder = folder.resolve()
    path = folder / "pyproject.toml"
    if not path.is_file():
        raise SettingsError(f"fedveil app {folder}: is not the folder of a Flower app (it has no pyproject.toml)")
    content = _read(path)
    flower = _table(content, "tool", "flwr")
    components = _table(flower, "app", "components")
    server, client = (_reference(components.get(kind), f"{path}: [tool.flwr.app.components] {kind}") for kind in KINDS)
    try:
        config = flatten_dict(_table(flower, "app", "config"))
    except ValueError as error:
        raise SettingsError(f"{path}: [tool.flwr.app.config] {error}") from None
    return AppFolder(folder, server, client, config, _table(flower, "federations"), _written_for(content))


def _written_for(content: dict[str, Any]) -> str:
    """Return the versions of Flower in an app's dependencies, as `>=1.20,<2`; empty where it names none."""
    named = _table(content, "project").get("dependencies")
    for one in named if isinstance(named, list) else []:
        if found := re.match(r"\s*flwr\s*(?:\[[^\]]*\])?\s*([^;]*)", str(one)):
            return found[1].strip(" ()")
    return str(_table(content, "tool", "flwr", "app").get("flwr-version-target", ""))


def find_clients(app: AppFolder, given: int | None) -> int:
    """Return the number of clients: `given`, else that of the app's or the user's Flower configuration, else 10.

    Raise SettingsError where the number is not above 0.
    """
    if given is not None and given < 1:
        raise SettingsError(f"--clients {given}: must be a whole number above 0")
    path = get_flwr_home() / "config.toml"
    return (
        given
        or _supernodes(app.federations, app.folder / "pyproject.toml")
        or (_supernodes(_table(_read(path), "superlink"), path) if path.is_file() else None)
        or CLIENTS
    )


def _reference(value: Any, key: str) -> str:
    """Return the module:attribute under a key; raise SettingsError where `value` is none."""
    if value is None:
        raise SettingsError(f"{key} is missing")
    if not isinstance(value, str) or not all(value.partition(":")):
        raise SettingsError(f"{key} = {value!r}: must be module:attribute, as 'my_app.server:app'")
    return value


def _read(path: Path) -> dict[str, Any]:
    with reading(lambda why: SettingsError(f"cannot read {path}: {why}")):
        return tomllib.loads(path.read_text("utf-8"))


def _table(tree: Any, *keys: str) -> dict[str, Any]:
    """Return the table under these keys, empty where there is none."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree if isinstance(tree, dict) else {}


def _supernodes(connections: dict[str, Any], path: Path) -> int | None:
    """Return how many nodes the default connection simulates, None where it does not say."""
    found = _table(connections, str(connections.get("default")), "options").get("num-supernodes")
    if found is None or (type(found) is int and found > 0):
        return found
    raise SettingsError(f"{path}: num-supernodes = {found!r}: must be a whole number above 0; or name it: --clients N")


def override(app: AppFolder, settings: Mapping[str, Any]) -> dict[str, Scalar]:
    """Return the app's run config with other values, where None keeps the default.

    Raise SettingsError for a key that the app does not declare, and for a value of another type.
    """
    config = dict(app.config)
    for key, value in settings.items():
        if key not in config:
            known = ", ".join(config) or "none"
            raise SettingsError(f"{key}: the app has no such key{nearest(key, config)}\n  its run config: {known}")
        default = app.config[key]
        if value is None:
            continue
        if isinstance(default, float) and type(value) is int:
            value = float(value)
        if type(value) is not type(default):
            raise SettingsError(
                f"{key} = {value!r}: must be {_KINDS[type(default)]}, as the app's own {default!r}; "
                f"its run config: {', '.join(config)}"
            )
        config[key] = value
    return config


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Put a folder first on `sys.path` for the block; afterwards `sys.path` and `sys.modules` are as before.

    A loaded module with the name of one in the folder is set aside meanwhile, except the standard library and Flower,
    which Flower's runtime would not replace either.
    """
    keep = sys.stdlib_module_names | {"flwr"}
    names = {module.name for module in pkgutil.iter_modules([str(folder)])} - keep
    aside = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in names}
    path = list(sys.path)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = path
        tops = {name for name, module in list(sys.modules.items()) if "." not in name and _lies_in(module, folder)}
        for name in [name for name in sys.modules if name.partition(".")[0] in tops]:
            del sys.modules[name]
        sys.modules.update(aside)


def _lies_in(module: ModuleType, folder: Path) -> bool:
    """Say whether a top-level module is a file or a package directly in the folder."""
    spec = getattr(module, "__spec__", None)
    places = [*(spec.submodule_search_locations or ()), spec.origin] if spec else []
    own = {folder / module.__name__, folder / f"{module.__name__}.py"}
    return any(Path(place) in own for place in places if place)


def load(app: AppFolder, reference: str, kind: type[App]) -> App:
    """Load the object of type `kind` that the app names by module:attribute; to be called within `importable`.

    Raise SettingsError where there is none, FedveilError where the app's code fails.
    """
    module, _, attributes = reference.partition(":")
    place = app.folder / "pyproject.toml"
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and f"{module}.".startswith(f"{error.name}."):
            raise SettingsError(f"{place}: '{reference}': there is no module '{error.name}' in {app.folder}") from None
        if _of_flower(error):
            raise _other_flower(app, error) from None
        raise SettingsError(
            f"fedveil app {app.folder}: the app needs the module '{error.name}', which is not installed{where(error, app.folder)}; "
            f"install it with {sys.executable} -m pip install"
        ) from None
    except (Exception, SystemExit) as error:
        if isinstance(error, ImportError) and _of_flower(error):
            raise _other_flower(app, error) from None
        raise FedveilError(f"importing '{module}' failed: {reason(error, app.folder)}") from error
    for name in attributes.split("."):
        if not hasattr(found, name):
            raise SettingsError(f"{place}: '{reference}': module '{module}' has no '{attributes}'")
        found = getattr(found, name)
    if not isinstance(found, kind):
        raise SettingsError(f"{place}: '{reference}': is a {type(found).__name__}, and must be a {kind.__name__}")
    return found


def _of_flower(error: ImportError) -> bool:
    return (error.name or "").partition(".")[0] == "flwr"


def _other_flower(app: AppFolder, error: ImportError) -> SettingsError:
    """Return the error for an app that imports what the installed Flower does not have."""
    said = (
        f"its pyproject.toml asks for flwr {app.flower}" if app.flower else "its pyproject.toml does not say for which"
    )
    return SettingsError(
        f"fedveil app {app.folder}: was written for another Flower: {error}{where(error, app.folder)}\n"
        f"  Flower {metadata.version('flwr')} is installed here, and {said}; take the app for this Flower, or change that line"
    )


def reason(error: BaseException, folder: Path) -> str:
    """Describe an error in the app's code, with its line of code, in one line of text."""
    return " ".join(f"{type(error).__name__}: {error}{where(error, folder)}".split())
