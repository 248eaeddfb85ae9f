"""Foreign bytes: whatever a library raises over what another party sent, or over a damaged file, is one error of ours.

And foreign words: what another party says is shown and written so that it cannot pose as words of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fedveil.core.errors import FedveilError

LONGEST = 200  # characters of a library's reason that are told
WORDS = 1000  # characters of another party's reason that are told
_FORMULA = ("=", "+", "-", "@")


@contextmanager
def reading(refusal: Callable[[str], FedveilError]) -> Iterator[None]:
    """Raise `refusal(reason)` in place of whatever is raised within the block, which reads foreign bytes and no more.

    No list of errors is kept: over bytes that nobody wrote for it, a library may raise its own errors, and EOFError,
    OverflowError, RecursionError, MemoryError or NotImplementedError too. FedVeil's errors pass, and so does what
    stops the program.
    refusal: an error's class, or a function from the reason to an error; it leaves out a reason that may quote a secret
    """
    try:
        yield
    except FedveilError:
        raise
    except Exception as error:
        raise refusal(reason(error)) from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of a library in Rust, which has it outside of Exception
            raise
        raise refusal(reason(error)) from None


def reason(error: BaseException) -> str:
    """Return what an error says on one line, or its name where it says nothing."""
    told = getattr(error, "strerror", None) or error
    return printable(str(told), LONGEST) or type(error).__name__


def printable(text: str, longest: int) -> str:
    """Return foreign text on one line, without control characters, of at most so many characters."""
    text = " ".join(text[: 4 * longest].split())
    text = "".join(map(_harmless, text))
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def legible(text: str) -> str:
    """Return text of several lines that may quote another party, without control characters: no terminal obeys it."""
    return "\n".join("".join(map(_harmless, line)) for line in text.expandtabs().split("\n"))


def cell(value: object) -> object:
    """Return the value of a table's cell: a text without control characters, and with ' before it where a spreadsheet
    would take it for a formula.
    """
    if not isinstance(value, str):
        return value
    text = "".join(map(_harmless, value))
    return f"'{text}" if text.lstrip().startswith(_FORMULA) else text


def _harmless(character: str) -> str:
    return character if character.isprintable() else "\ufffd"
