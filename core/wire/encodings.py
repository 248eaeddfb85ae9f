"""How a client writes its new weights in fewer bytes, and how the server reads them: `communication.encoding`.

float32 is what NumPy saves. float16 halves each weight's bytes. int8 sends the difference to the model the client was
given, on 255 levels a tensor, and what those lose is added to the client's next difference: error feedback, by which
nothing is lost for good (Seide et al. 2014, "1-Bit Stochastic Gradient Descent"; Karimireddy et al. 2019, "Error
Feedback Fixes SignSGD and other Gradient Compression Schemes", EF-SGD). Equal input gives equal bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping

import numpy as np

from fedveil.core.errors import ProtectionError

FLOAT32, FLOAT16, INT8 = "float32", "float16", "int8"
LARGEST = float(np.finfo(np.float16).max)  # 65504
EXPONENT = 0x7C00  # bits of a float16, all set where it is no finite number
LEVELS = 127  # of either sign
NPY = b"\x93NUMPY\x01\x00"  # how a file of `np.save` begins

Parameters = dict[str, np.ndarray]
Arrays = Mapping[str, np.ndarray]


def to_float16(weights: Arrays) -> dict[str, bytes]:
    """Each tensor in the nearest float16 numbers, little-endian, 2 bytes a weight.

    Raise ProtectionError, naming the tensor, where a weight has none: it would become infinite.
    """
    written: dict[str, bytes] = {}
    for name, value in weights.items():
        with np.errstate(over="ignore"):  # what is too large is an error, said below
            half = np.asarray(value, "<f2")
        bad = half.view("<u2") & EXPONENT == EXPONENT  # infinite, or not a number; a tenth of the time of NumPy's test
        if bad.any():
            wrong = value[bad].flat[0]
            _check_finite(name, wrong)
            raise ProtectionError(
                f"'{name}' holds {wrong:g}, and float16 ends at {LARGEST:g}; use communication.encoding = 'float32' or 'int8'"
            )
        written[name] = half.tobytes()
    return written


def from_float16(name: str, data: bytes, given: np.ndarray) -> np.ndarray:
    """The weights of one tensor, float32, of the shape of `given`; raise ProtectionError where `data` are none."""
    _check_size(name, data, 2 * given.size)
    weights = np.frombuffer(data, "<f2").astype(np.float32).reshape(given.shape)
    if not np.isfinite(weights).all():
        raise ProtectionError(f"its '{name}' holds a number that is not finite")
    return weights


def to_int8(weights: Arrays, given: Arrays, residual: np.ndarray | None) -> tuple[dict[str, bytes], np.ndarray]:
    """q = round(x / s) for s = max |x| / 127 and x = weights - given + residual, and the next residual, x - s q.

    Each tensor is s as a little-endian float32 and a byte a weight.
    residual: float32 [P], of all tensors one after another; None for a client's first update
    Raise ProtectionError, naming the tensor, where a difference is not finite.
    """
    written: dict[str, bytes] = {}
    lost: list[np.ndarray] = []
    end = 0
    for name, value in weights.items():
        start, end = end, end + value.size
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is an error, said below
            difference = np.subtract(value, given[name], dtype=np.float32).reshape(-1)
            if residual is not None:
                difference += residual[start:end]
        largest = np.abs(difference).max(initial=0.0)
        _check_finite(name, largest)
        scale = np.float32(largest / np.float32(LEVELS))
        levels = np.zeros(difference.shape, np.int8)
        if scale > 0:
            # a scale so small that it lost digits itself gives more than 127
            levels = np.clip(np.rint(difference / scale), -LEVELS, LEVELS).astype(np.int8)
        lost.append(difference - levels * scale)
        written[name] = struct.pack("<f", scale) + levels.tobytes()
    return written, np.concatenate(lost)


def from_int8(name: str, data: bytes, given: np.ndarray) -> np.ndarray:
    """The weights of one tensor, given + s q, float32; raise ProtectionError where `data` are no s and q for it."""
    _check_size(name, data, 4 + given.size)
    (scale,) = struct.unpack_from("<f", data)
    if not 0 <= scale < np.inf:  # not a number fails as well
        raise ProtectionError(f"the scale of its '{name}' is {scale:g}")
    levels = np.frombuffer(data, np.int8, offset=4).reshape(given.shape)
    with np.errstate(over="ignore"):  # what is too large is an error, said below
        weights = np.asarray(given, np.float32) + levels * np.float32(scale)
    if not np.isfinite(weights).all():
        raise ProtectionError(f"the scale of its '{name}', {scale:g}, makes weights of it that are not finite")
    return weights


def from_npy(name: str, data: bytes, given: np.ndarray) -> np.ndarray:
    """The float32 weights of one tensor as `np.save` wrote them, not copied; raise ProtectionError where `data` are none.

    What a client sends is compared with the one header that fits, not parsed: a false one may ask for any memory.
    """
    start = 10 + int.from_bytes(data[8:10], "little")
    for order, fortran in (("C", False), ("F", True)):
        header = f"{{'descr': '<f4', 'fortran_order': {fortran}, 'shape': {given.shape}, }}"
        if data.startswith(NPY) and data[10:start].rstrip() == header.encode():
            _check_size(name, data, start + 4 * given.size)
            return np.frombuffer(data, "<f4", offset=start).reshape(given.shape, order=order)  # type: ignore[call-overload, no-any-return]
    raise ProtectionError(f"its '{name}' is no float32 array of shape {given.shape} as NumPy saves it")


# How the server reads each tensor: its name, its bytes, and the tensor of the model that was sent.
READERS: dict[str, Callable[[str, bytes, np.ndarray], np.ndarray]] = {
    FLOAT32: from_npy,
    FLOAT16: from_float16,
    INT8: from_int8,
}


def _check_finite(name: str, value: float) -> None:
    if not np.isfinite(value):
        raise ProtectionError(
            f"training diverged: the new '{name}' holds a number that is not finite ({value:g}); try a smaller "
            "training.learning_rate, or training.max_grad_norm"
        )


def _check_size(name: str, data: bytes, wanted: int) -> None:
    if len(data) != wanted:
        raise ProtectionError(f"its '{name}' has {len(data):,} bytes, and {wanted:,} make that tensor")
