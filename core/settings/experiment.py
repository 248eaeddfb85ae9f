"""The settings of an experiment: one frozen, validated object, written as TOML."""

from __future__ import annotations

import codecs
import tomllib
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any

import tomli_w
from pydantic import ValidationError

from fedveil.core.catalog import PRESETS
from fedveil.core.errors import SettingsError, nearest
from fedveil.core.foreign import reading
from fedveil.core.settings import legacy
from fedveil.core.settings.changes import changed
from fedveil.core.settings.checks import check_combinations
from fedveil.core.settings.choice import FOREIGN, Choice
from fedveil.core.settings.effects import check_effect
from fedveil.core.settings.explanations import explain
from fedveil.core.settings.keys import all_keys, choices, plain_keys
from fedveil.core.settings.section import Section
from fedveil.core.settings.sections import Settings

LONGEST = 1 << 20  # characters of settings from another machine


class Experiment(Settings):
    """All settings of an experiment, made by `Experiment.preset`, `.load`, `.parse`, or keyword arguments.

    >>> Experiment.preset("digits").override({"federation.rounds": 3}).federation.rounds
    3
    """

    def __init__(self, /, **settings: Any) -> None:
        """Validate the settings; raise SettingsError, which names every setting that cannot be used."""
        self._fill(legacy.read(settings), foreign=False)

    def _fill(self, settings: Mapping[str, Any], foreign: bool) -> None:
        try:
            self.__pydantic_validator__.validate_python(
                settings, self_instance=self, context=FOREIGN if foreign else None
            )
        except ValidationError as error:
            raise SettingsError(
                explain(error, plain_keys(Experiment), choices(Experiment), offered=known_keys)
            ) from None
        check_combinations(self)

    @classmethod
    def preset(cls, name: str) -> Experiment:
        """Return the preset called `name` (see `fedveil list presets`); raise SettingsError where there is none."""
        return cls.parse(_preset(name), f"preset {name}", name=name)

    @classmethod
    def load(cls, path: str | Path) -> Experiment:
        """Read the experiment in a UTF-8 file of TOML, named as the file where it sets no name.

        Raise SettingsError where the file cannot be read, or the text or a setting is refused.
        """
        path = Path(path)
        name = "".join(c if c.isalpha() or c.isdecimal() or c in "._-" else "-" for c in path.stem)[:80]
        return cls.parse(_text(path), str(path), name=name)

    @classmethod
    def parse(cls, text: str, source: str = "settings", *, name: str = "experiment") -> Experiment:
        """Read the experiment in TOML text; raise SettingsError where the text or a setting is refused.

        source: the origin of the text, for errors; name: the experiment's name where the text sets none
        """
        settings = _read(text, source)
        try:
            return cls(**{"name": name, **settings})
        except SettingsError as error:
            raise SettingsError(f"{source}: {error}") from None

    @classmethod
    def received(cls, text: str) -> Experiment:
        """Read an experiment from another machine: TOML text or a preset's name.

        No code that it names (`package.module:part`) is imported: the receiver decides about that first. The settings
        of such a part are checked when it is used. Raise SettingsError where the text or a setting is refused.
        """
        if len(text) > LONGEST:
            raise SettingsError(f"settings of {len(text):,} characters, where {LONGEST:,} are read")
        preset = "\n" not in text and "=" not in text
        settings = _read(_preset(text), text) | {"name": text} if preset else _read(text, "settings")
        experiment = cls.__new__(cls)
        experiment._fill({"name": "experiment", **settings}, foreign=True)
        return experiment

    @classmethod
    def find(cls, name: str) -> Experiment:
        """Return the experiment that a user names by a preset, a file that ends in .toml, or TOML text."""
        if "\n" in name or "=" in name:
            return cls.parse(name)
        return cls.load(name) if name.lower().endswith(".toml") else cls.preset(name)

    def override(self, settings: Mapping[str, Any]) -> Experiment:
        """Return a copy with other values by dotted key, `{"training.epochs": 5}`; None restores the default.

        A part is chosen by its name, and its settings have keys below it, in any order:
        `{"data.partition": "dirichlet", "data.partition.alpha": 0.3}`. A new part keeps the old part's settings that
        differ from their defaults, where it has them too.
        Raise SettingsError where a value cannot be used or has no effect.
        """
        settings = legacy.renamed(settings)
        experiment = Experiment(**changed(self.model_dump(exclude_none=True), settings, choices(Experiment)))
        check_effect(experiment, settings)
        return experiment

    def toml(self) -> str:
        """Return the resolved settings as TOML, which `Experiment.parse` reads back as an equal experiment."""
        tree = {name: _plain(value) for name, value in self if value is not None}
        return tomli_w.dumps(tree | {"model": self.model.dump()})


def _plain(value: Any) -> Any:
    """Return a value as TOML holds it: a part without settings becomes its name."""
    if isinstance(value, Section):
        return {name: _plain(each) for name, each in value if each is not None}
    if isinstance(value, Choice):
        table = value.dump()
        return table if len(table) > 1 else value.name
    return value


def _preset(name: str) -> str:
    if name not in PRESETS:
        known = ", ".join(PRESETS)
        raise SettingsError(
            f"no preset is called '{name}'{nearest(name, PRESETS)}\n  known: {known}; or a file FILE.toml"
        )
    return resources.files("fedveil.simulations.presets").joinpath(f"{name}.toml").read_text("utf-8")


def _text(path: Path) -> str:
    """Return the text of a settings file, without the byte order mark that Windows writes before UTF-8."""
    start = f"cannot read the settings file {path}"
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        raise SettingsError(f"{start}: {_reason(error)}") from None
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in content[:2]:
        raise SettingsError(
            f"{start}: it is UTF-16, as PowerShell 5 writes with >; save it as UTF-8, there with "
            "| Set-Content -Encoding utf8"
        )
    if b"\0" in content:
        line = content[: content.index(b"\0")].count(b"\n") + 1
        raise SettingsError(f"{start}: line {line} has a zero byte, which no text has; is it a file of another kind?")
    if not content.strip():
        raise SettingsError(f"{start}: it is empty; `fedveil show presets NAME` shows what such a file may hold")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise SettingsError(
            f"{start}: line {line}: byte 0x{content[error.start]:02x} is not UTF-8; save the file as UTF-8"
        ) from None


def _read(text: str, source: str) -> dict[str, Any]:
    with reading(lambda why: SettingsError(f"{source} is not valid TOML: {why}")):
        try:
            return tomllib.loads(text)
        except tomllib.TOMLDecodeError:
            raise
        except (ValueError, RecursionError):  # limits of Python
            raise SettingsError(
                f"{source}: a number has too many digits, or lists stand in one another too deeply"
            ) from None


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """Read `KEY=VALUE` words as `--set` takes them, by key; raise SettingsError for a word without KEY or `=`.

    VALUE is read as TOML, or else taken as text; an empty VALUE gives None, the default.
    """
    settings: dict[str, Any] = {}
    for word in assignments:
        key, equals, value = word.partition("=")
        if not equals or not key.strip():
            raise SettingsError(f"--set {word}: must be KEY=VALUE, as in --set training.epochs=5")
        try:
            settings[key.strip()] = tomllib.loads(f"value = {value}")["value"] if value.strip() else None
        except (ValueError, RecursionError):
            settings[key.strip()] = value.strip()
    return settings


def resumable(folder: Path, option: str = "fedveil resume") -> Experiment:
    """Return the experiment of the run in `folder`; raise SettingsError, naming `option`, where it cannot be read."""
    path = folder / "experiment.toml"
    if not path.is_file():
        raise SettingsError(f"{option} {folder}: is not the folder of a run (it has no experiment.toml)")
    try:
        return Experiment.load(path)
    except SettingsError as error:
        raise SettingsError(
            f"{option} {folder}: its settings were edited, or written by another version of FedVeil, and this one cannot "
            f"read them\n  {error}"
        ) from None


@cache
def known_keys() -> Mapping[str, str]:
    """Return the description of every setting by dotted key, those of FedVeil's parts too; this imports all parts."""
    return MappingProxyType(all_keys(Experiment))


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
