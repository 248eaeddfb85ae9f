"""Whatever a library raises over foreign bytes is one error of ours, and the reason is a short line."""

from __future__ import annotations

import struct
import zlib

import pytest
from google.protobuf.message import DecodeError
from safetensors import SafetensorError

from fedveil.core.errors import DataError, ProtectionError
from fedveil.core.foreign import LONGEST, printable, reading


class PanicException(BaseException):
    """As what a library in Rust raises where it panics."""


RAISED = [
    ValueError("no"), TypeError("no"), KeyError("no"), IndexError("no"), AttributeError("no"), AssertionError("no"),
    OverflowError("no"), RecursionError("no"), MemoryError("no"), EOFError("no"), NotImplementedError("no"),
    RuntimeError("no"), OSError(5, "no"), UnicodeDecodeError("utf-8", b"", 0, 1, "no"), struct.error("no"),
    zlib.error("no"), DecodeError("no"), SafetensorError("no"), PanicException("no"),
]  # fmt: skip


@pytest.mark.parametrize("raised", RAISED, ids=lambda error: type(error).__name__)
def test_whatever_a_library_raises_is_one_error_with_its_reason(raised) -> None:
    with pytest.raises(DataError, match=r"^a\.bin: .*no") as refused, reading(lambda why: DataError(f"a.bin: {why}")):
        raise raised
    assert refused.value.__suppress_context__


@pytest.mark.parametrize("raised", [EOFError(), MemoryError(), AssertionError()])
def test_an_error_that_says_nothing_is_named(raised) -> None:
    with pytest.raises(ProtectionError, match=f"^{type(raised).__name__}$"), reading(ProtectionError):
        raise raised


@pytest.mark.parametrize("raised", [ProtectionError("ours"), KeyboardInterrupt(), SystemExit(3), GeneratorExit()])
def test_errors_of_ours_and_what_stops_the_program_pass(raised) -> None:
    with pytest.raises(type(raised)) as passed, reading(DataError):
        raise raised
    assert passed.value is raised


def test_a_reason_is_one_short_line_without_control_characters() -> None:
    assert printable("two\nlines \x1b[31mred\x07", 40) == "two lines \ufffd[31mred\ufffd"
    assert printable("x" * 10**6, 40) == "x" * 39 + "…"
    with pytest.raises(DataError) as refused, reading(DataError):
        raise ValueError("\x1b" * 10**6)
    assert len(str(refused.value)) == LONGEST
