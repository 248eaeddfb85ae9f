"""The choice of a part by name, with its own settings: `dirichlet`, or `{name = "dirichlet", alpha = 0.3}`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationError
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from fedveil.core.catalog import ATTACKS, DATASETS, DEFENCES, MODELS, PARTITIONS, PROTECTIONS, STRATEGIES, Table
from fedveil.core.declaration import Declaration
from fedveil.core.errors import SettingsError, closest, nearest, plainly
from fedveil.core.settings.explanations import MEANING, SAID, explain
from fedveil.core.settings.section import Section

LONGEST_NAME = 1000  # characters of a part's name
FOREIGN = {"foreign": True}  # validation context of settings from another machine: users' parts are not imported


class Choice:
    """The choice of one part of a kind, by name, and the part's own settings; frozen, compared and hashed by value.

    All other attributes are the part's settings: `data.partition.alpha`.
    table: the parts of this kind; key: the setting that names the part
    prefix: the start of the keys of the part's settings; default: the part that is chosen without a name
    """

    table: ClassVar[Table]
    key: ClassVar[str]
    prefix: ClassVar[str]
    default: ClassVar[str]
    name: str
    _settings: Section | None
    _table: dict[str, Any]  # the value that is compared and hashed; importing a part later does not change it

    def __init__(self, name: str | None = None, **settings: Any) -> None:
        """Choose a part, without a name the default one; raise SettingsError where the name or a setting is refused."""
        try:
            self._fill(self.default if name is None else name, settings, foreign=False)
        except ValidationError as error:
            raise SettingsError(explain(error, (), (self.prefix,), self.prefix)) from None
        except PydanticCustomError as error:
            raise SettingsError(str(error)) from None

    def _fill(self, name: str, given: Mapping[str, Any], foreign: bool) -> None:
        later = foreign and self.table.is_own(name)
        try:
            settings = None if later else self._validated(name, given)
        except SettingsError as error:
            raise _said(str(error)) from None
        told = given if settings is None else settings.model_dump(exclude_none=True)
        table = {"name": name, **told}
        self.__dict__.update(name=name, _settings=settings, _table=table)

    @classmethod
    def _validated(cls, name: str, given: Mapping[str, Any]) -> Section:
        declared = cls.table.declared(name, cls.key).settings
        unknown = [cls.unknown(name, key, declared) for key in given if key not in declared.model_fields]
        if unknown:
            raise SettingsError("\n".join(unknown))
        return declared.model_validate(dict(given))

    @classmethod
    def unknown(cls, name: str, key: str, declared: type[Section]) -> str:
        """Return the message for an unknown setting of a part: its nearest setting, who has it, and what the part has."""
        full = f"{cls.prefix}.{key}: unknown setting of {cls.key} = '{name}'"
        others = [
            other
            for other in cls.table
            if other != name and key in cls.table.declared(other, cls.key).settings.model_fields
        ]
        close = nearest(key, declared.model_fields, f"{cls.prefix}.")
        if others:
            wanted = " or ".join(f"'{other}'" for other in others)
            return f"{full}; {key} is a setting of {cls.key} = {wanted}{close}"
        if close:
            return full + close
        called = MEANING.get(plainly(key), "")
        if called and not called.startswith(f"{cls.prefix}."):
            return f"{full}; did you mean '{called}'?"
        having: dict[str, list[str]] = {}
        for other in cls.table:
            for setting in cls.table.declared(other, cls.key).settings.model_fields:
                having.setdefault(setting, []).append(f"'{other}'")
        word = called.removeprefix(f"{cls.prefix}.") if called else closest(key, having, cutoff=0.7)
        has = ", ".join(declared.model_fields) or "no settings of its own"
        near = (
            f"; {cls.prefix}.{word} is a setting of {cls.key} = {' or '.join(having[word])}" if word in having else ""
        )
        return f"{full}, which has {has}{near}"

    @property
    def settings(self) -> Any:
        """The part's own settings, of the class that it declares; raises SettingsError where they cannot be used."""
        if self._settings is None:
            self.__dict__["_settings"] = type(self)(**self._table)._settings
        return self._settings

    @property
    def declaration(self) -> Declaration:
        """The part's declaration."""
        return self.table.declared(self.name, self.key)

    @property
    def is_own(self) -> bool:
        """Whether it is a user's own part, `package.module:object`."""
        return self.table.is_own(self.name)

    @property
    def resolved(self) -> bool:
        """Whether the part was imported; a user's part in settings from another machine is imported only when used."""
        return self._settings is not None

    def load(self) -> Any:
        """Import and return the part."""
        return self.table.load(self.name, self.key)

    def dump(self) -> dict[str, Any]:
        """Return the name and every setting that has a value, as a table of TOML."""
        return dict(self._table)

    def __getattr__(self, key: str) -> Any:
        """Return the part's setting called `key`."""
        if key.startswith("_"):
            raise AttributeError(key)
        try:
            return getattr(self.settings, key)
        except AttributeError:
            raise AttributeError(f"{self.prefix}.{key}: {self.key} = '{self.name}' has no such setting") from None

    def __setattr__(self, key: str, value: Any) -> None:
        raise AttributeError(f"{self.prefix}.{key}: settings are frozen; Experiment.override makes a copy with others")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Choice) and type(other) is type(self) and self._table == other._table

    def __hash__(self) -> int:
        if "_hash" not in self.__dict__:
            self.__dict__["_hash"] = hash((type(self).__name__, repr(self._table)))
        return int(self.__dict__["_hash"])

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the hash, which differs between processes."""
        return {key: value for key, value in self.__dict__.items() if key != "_hash"}

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        settings = "".join(f", {key}={value!r}" for key, value in self.dump().items() if key != "name")
        return f"{type(self).__name__}({self.name!r}{settings})"

    @classmethod
    def _read(cls, given: Any, info: core_schema.ValidationInfo) -> Self:
        """Read a choice from a name, or from a table of a name and settings."""
        if isinstance(given, cls):
            return given
        table = {"name": given} if isinstance(given, str) else given
        if not isinstance(table, Mapping) or not isinstance(table.get("name", ""), str):
            raise PydanticCustomError("choice", "a name, or a table of a name and the part's settings")
        if len(table.get("name", "")) > LONGEST_NAME:
            raise PydanticCustomError("choice", f"a name of at most {LONGEST_NAME} characters")
        choice = cls.__new__(cls)
        settings = {key: value for key, value in table.items() if key != "name"}
        choice._fill(table.get("name", cls.default), settings, foreign=bool(info.context))
        return choice

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Return the schema by which pydantic reads and writes a choice."""
        return core_schema.with_info_plain_validator_function(
            cls._read, serialization=core_schema.plain_serializer_function_ser_schema(cls.dump)
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Describe what a choice is read from: a name, or a table of a part's name and its settings."""
        tables = []
        for name, description in cls.table.items():
            own = cls.table.declared(name, cls.key).settings.model_json_schema()
            properties = {"name": {"const": name}, **own.get("properties", {})}
            tables.append(
                {"title": name, "description": description, "type": "object", "properties": properties,
                 "required": ["name", *own.get("required", [])], "additionalProperties": False}
            )  # fmt: skip
        named: list[dict[str, Any]] = [{"enum": list(cls.table)}]
        if cls.table.own:
            about = {"maxLength": LONGEST_NAME, "description": "a part of your own"}
            named.append({"type": "string", "pattern": "^[\\w.]+:[\\w.]+$", **about})
        return {"title": cls.key, "default": cls.default, "anyOf": [*named, *tables]}


def _said(message: str) -> PydanticCustomError:
    return PydanticCustomError(SAID, "{said}", {"said": message})


class DatasetChoice(Choice):
    """`data.dataset`: a data set, and its own settings."""

    table, key, prefix, default = DATASETS, "data.dataset", "data.dataset", "digits"


class PartitionChoice(Choice):
    """`data.partition`: how the data is divided among the clients."""

    table, key, prefix, default = PARTITIONS, "data.partition", "data.partition", "iid"


class Model(Choice):
    """`[model]`: the network, and its own settings."""

    table, key, prefix, default = MODELS, "model.name", "model", "mlp"


class ProtectionChoice(Choice):
    """`privacy.protection`: how updates are protected."""

    table, key, prefix, default = PROTECTIONS, "privacy.protection", "privacy.protection", "none"


class StrategyChoice(Choice):
    """`federation.strategy`: how updates become the next model."""

    table, key, prefix, default = STRATEGIES, "federation.strategy", "federation.strategy", "fedavg"


class DefenceChoice(Choice):
    """`privacy.defence`: what a client does to its own update."""

    table, key, prefix, default = DEFENCES, "privacy.defence", "privacy.defence", "none"


class AttackChoice(Choice):
    """`attack`: what an observer recovers; an experiment has none, `fedveil attack` names it."""

    table, key, prefix, default = ATTACKS, "attack", "attack", "words"
