"""Encodings of weights on the wire (`communication.encoding`): the client writes them, the server reads them.

float32 is the format of `np.save`. float16 halves the bytes of each weight. int8 sends a client's update, quantised to
255 levels for each tensor. The rounding error is added to the client's next update, so that no part of an update is
lost for good: error feedback (Seide et al. 2014, "1-Bit Stochastic Gradient Descent"; Karimireddy et al. 2019, "Error
Feedback Fixes SignSGD and other Gradient Compression Schemes", EF-SGD). Equal input gives equal bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping

import numpy as np

from fedveil.core.errors import ProtectionError

FLOAT32, FLOAT16, INT8 = "float32", "float16", "int8"
BYTES = {FLOAT32: 4, FLOAT16: 2, INT8: 1}  # of a weight
LARGEST = float(np.finfo(np.float16).max)  # 65504
EXPONENT = 0x7C00  # exponent bits of a float16, all set where it is not finite
LEVELS = 127  # of each sign
NPY = b"\x93NUMPY\x01\x00"  # how a file of `np.save` begins

Arrays = Mapping[str, np.ndarray]


def to_float16(weights: Arrays) -> dict[str, bytes]:
    """Round each tensor to float16, little-endian, 2 bytes a weight.

    Raise ProtectionError, naming the tensor, where a weight is not finite or too large for float16.
    """
    written: dict[str, bytes] = {}
    for name, value in weights.items():
        with np.errstate(over="ignore"):  # an overflow raises an error below
            half = np.asarray(value, "<f2")
        bad = half.view("<u2") & EXPONENT == EXPONENT  # infinite or NaN; ten times as fast as np.isfinite
        if bad.any():
            wrong = value[bad].flat[0]
            _check_finite(name, wrong)
            raise ProtectionError(
                f"'{name}' holds {wrong:g}, and float16 ends at {LARGEST:g}; use communication.encoding = 'float32' or 'int8'"
            )
        written[name] = half.tobytes()
    return written


def from_float16(name: str, data: bytes, given: np.ndarray) -> np.ndarray:
    """Read one tensor, float32, of the shape of `given`; raise ProtectionError where `data` does not encode one."""
    _check_size(name, data, 2 * given.size)
    weights = np.frombuffer(data, "<f2").astype(np.float32).reshape(given.shape)
    if not np.isfinite(weights).all():
        raise ProtectionError(f"its '{name}' holds a number that is not finite")
    return weights


def to_int8(weights: Arrays, given: Arrays, residual: np.ndarray | None) -> tuple[dict[str, bytes], np.ndarray]:
    """Quantise each tensor of an update to int8, and return it with the client's next residual.

    q = round(x / s) for x = weights - given + residual and s = max |x| / 127. The next residual is x - s q. A tensor is
    written as s, a little-endian float32, and one byte for each weight.
    given: the model that the client received
    residual: float32 [P], of all tensors one after another; None for a client's first update
    Raise ProtectionError, naming the tensor, where x is not finite.
    """
    written: dict[str, bytes] = {}
    lost: list[np.ndarray] = []
    end = 0
    for name, value in weights.items():
        start, end = end, end + value.size
        with np.errstate(over="ignore", invalid="ignore"):  # a number that is not finite raises an error below
            difference = np.subtract(value, given[name], dtype=np.float32).reshape(-1)
            if residual is not None:
                difference += residual[start:end]
        largest = np.abs(difference).max(initial=0.0)
        _check_finite(name, largest)
        scale = np.float32(largest / np.float32(LEVELS))
        levels = np.zeros(difference.shape, np.int8)
        if scale > 0:
            # a subnormal scale has lost digits, so the quotient may exceed 127
            levels = np.clip(np.rint(difference / scale), -LEVELS, LEVELS).astype(np.int8)
        lost.append(difference - levels * scale)
        written[name] = struct.pack("<f", scale) + levels.tobytes()
    return written, np.concatenate(lost)


def from_int8(name: str, data: bytes, given: np.ndarray) -> np.ndarray:
    """Read one tensor, given + s q, float32; raise ProtectionError where `data` does not encode such an s and q."""
    _check_size(name, data, 4 + given.size)
    (scale,) = struct.unpack_from("<f", data)
    if not 0 <= scale < np.inf:  # NaN fails as well
        raise ProtectionError(f"the scale of its '{name}' is {scale:g}")
    levels = np.frombuffer(data, np.int8, offset=4).reshape(given.shape)
    with np.errstate(over="ignore"):  # an overflow raises an error below
        weights = np.asarray(given, np.float32) + levels * np.float32(scale)
    if not np.isfinite(weights).all():
        raise ProtectionError(f"the scale of its '{name}', {scale:g}, makes weights of it that are not finite")
    return weights


def from_npy(name: str, data: bytes, given: np.ndarray) -> np.ndarray:
    """Read one float32 tensor as `np.save` wrote it, without a copy; raise ProtectionError where `data` holds none.

    The client's header is not parsed but compared with the only one that fits: a forged header may ask for any memory.
    """
    start = 10 + int.from_bytes(data[8:10], "little")
    for order, fortran in (("C", False), ("F", True)):
        header = f"{{'descr': '<f4', 'fortran_order': {fortran}, 'shape': {given.shape}, }}"
        if data.startswith(NPY) and data[10:start].rstrip() == header.encode():
            _check_size(name, data, start + 4 * given.size)
            return np.frombuffer(data, "<f4", offset=start).reshape(given.shape, order=order)  # type: ignore[call-overload, no-any-return]
    raise ProtectionError(f"its '{name}' is no float32 array of shape {given.shape} as NumPy saves it")


# readers of one tensor: (name, bytes, the tensor of the model that the client was sent) -> float32 weights
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
