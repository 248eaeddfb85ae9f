"""Validation errors in a user's words: what was given, what is allowed, and the nearest name."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import ValidationError

from fedveil.core.errors import nearest

SAID = "said"  # the type of an error whose message is shown as it is

# pydantic's error types, and what the user should have given
WORDS = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "string_pattern_mismatch": "1 to 80 letters, digits, '.', '_' or '-'",
    "model_type": "a section, as in [data]",
    "tuple_type": "a list, as in [64, 32]",
}


def explain(
    error: ValidationError, known: Iterable[str], choices: Iterable[str], prefix: str = "", sections: Iterable[str] = ()
) -> str:
    """Return one line for each refused key: what was given, and what is allowed.

    known: all dotted keys but those of parts; sections: the names of the sections
    choices: the prefixes of the keys of parts' settings
    prefix: is put before all keys
    """
    known, choices = list(known), list(choices)
    lines: dict[str, tuple[str, list[str]]] = {}
    for problem in error.errors():
        path = [prefix] * bool(prefix) + [str(part) for part in problem["loc"]]
        key = _key(path, known, choices)
        if problem["type"] == SAID:
            lines[key] = (problem["msg"], [])
        elif problem["type"] == "extra_forbidden":
            lines[key] = (f"{key}: unknown setting{nearest(key, [*known, *sections])}", [])
        elif problem["type"] == "missing":
            lines[key] = (f"{key}: must be given", [])
        elif problem["type"] == "value_error":
            lines[key] = (f"{key} = {problem['input']!r}: {problem['ctx']['error']}", [])
        else:
            allowed = problem["msg"].removeprefix("Input should be ").replace("a valid ", "a ")
            allowed = WORDS.get(problem["type"], allowed)
            lines.setdefault(key, (f"{key} = {problem['input']!r}: must be ", []))[1].append(allowed)
    return "\n".join(start + ", or ".join(dict.fromkeys(allowed)) for start, allowed in lines.values())


def _key(path: list[str], known: list[str], choices: list[str]) -> str:
    """Return the key of the refused setting, without the type names that pydantic may append to its path."""
    for end in range(1, len(path) + 1):
        key = ".".join(path[:end])
        if key in choices:
            return ".".join(path[: end + 1])
        if key in known:
            return key
    return ".".join(path)
