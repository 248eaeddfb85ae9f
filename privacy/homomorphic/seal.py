"""The bytes of SEAL and TenSEAL, read and written here: contexts, vectors, ciphertexts, and their coefficients.

A TenSEAL object is a protocol buffer around SEAL objects. A SEAL object is a header of 16 bytes (magic, 16, major,
minor, compression, 0, uint64 length) and a body, which is plain or zstd. Neither travels: of a ciphertext only the
coefficients carry information, each in as many whole bytes as the modulus needs. All bytes may come from a stranger, so
every length is checked before it is used, and malformed bytes raise ProtectionError.
"""

from __future__ import annotations

import os
import struct
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b

import numpy as np
import zstandard
from google.protobuf.empty_pb2 import Empty
from google.protobuf.unknown_fields import UnknownFieldSet

from fedveil.core.errors import ProtectionError
from fedveil.core.foreign import reading
from fedveil.privacy.homomorphic.parameters import STANDARD, Lattice

SEED = 64  # bytes of the seed that stands for the second half of a fresh ciphertext
SCHEMES = {1: "bfv", 2: "ckks"}  # SEAL's numbers
_HEADER = struct.Struct("<HBBBBHQ")  # magic, length of this header, major, minor, compression, 0, length of it all
_MAGIC = 0xA15E
_PLAIN, _ZSTD = 0, 2
_SHAPE = struct.Struct("<32sBQQQdQ")  # parms_id, NTT form, polynomials, degree, primes, scale, correction factor
_COUNT = struct.Struct("<Q")
_BLAKE2XB = 1
_SMALL = 4096  # bytes; encryption parameters are smaller
_FIELDS = {0: 0, 1: 8, 2: 0, 5: 4}  # kinds of a protocol buffer's fields, and the bytes of those of a fixed size

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True)
class Ring:
    """The numbers behind a Lattice, as SEAL chose them. A ciphertext is two polynomials of `degree` modulo `prime`.

    special: SEAL's second prime, which never travels; plain: BFV's plain modulus, 0 for CKKS
    """

    scheme: str
    degree: int
    prime: int
    special: int
    plain: int

    @property
    def lattice(self) -> Lattice:
        """The parameters that a key is made for."""
        primes = (self.prime.bit_length(), self.special.bit_length())
        return Lattice(self.scheme, self.degree, primes, self.plain.bit_length())

    @property
    def width(self) -> int:
        """Bytes of a coefficient on the wire."""
        return (self.prime.bit_length() + 7) // 8

    @cached_property
    def parms_id(self) -> bytes:
        """SEAL's name for these parameters, 32 bytes: BLAKE2b of scheme, degree, primes in use, plain modulus."""
        number = next(number for number, scheme in SCHEMES.items() if scheme == self.scheme)
        return blake2b(struct.pack("<4Q", number, self.degree, self.prime, self.plain), digest_size=32).digest()


@dataclass(frozen=True)
class Ciphertext:
    """The part of a SEAL ciphertext that carries information.

    coefficients: uint64 [2, N], or [1, N] where `seed` (64 bytes, else empty) stands for the second half
    version: of the SEAL that wrote it
    """

    coefficients: np.ndarray
    seed: bytes
    version: tuple[int, int]


def write_varint(number: int) -> bytes:
    """Encode a whole number as protocol buffers do."""
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


def write_field(number: int, content: bytes) -> bytes:
    """Encode a field of bytes of a protocol buffer."""
    return write_varint(number << 3 | 2) + write_varint(len(content)) + content


def read_fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield the fields of a protocol buffer in order: numbers, and fixed-size or delimited bytes.

    Raise ProtectionError where the bytes are no protocol buffer.
    """
    with reading(lambda _: ProtectionError("not TenSEAL's bytes, or cut short: no protocol buffer can be read")):
        fields = UnknownFieldSet(Empty.FromString(data))  # a message that knows no field keeps all of them
    for field in fields:
        if field.wire_type not in _FIELDS:
            raise ProtectionError(f"not TenSEAL's bytes: a field of kind {field.wire_type}")
        size = _FIELDS[field.wire_type]
        yield field.field_number, field.data.to_bytes(size, "little") if size else field.data


def read_context(data: bytes) -> dict[int, list[int | bytes]]:
    """Read the fields of a TenSEAL context by number, in lists.

    1 parameters, 2 public part, 3 private part, 4 kind of encryption; others are kept.
    """
    found: dict[int, list[int | bytes]] = {}
    for number, value in read_fields(data):
        found.setdefault(number, []).append(value)
    return found


def read_ring(parameters: bytes) -> tuple[Ring, tuple[int, int]]:
    """Read the ring of SEAL's encryption parameters, and the version of the SEAL that wrote them.

    Raise ProtectionError for anything but BFV or CKKS with two primes, in sizes that FedVeil makes keys for.
    """
    body, version = _open(parameters, _SMALL)
    layout = struct.Struct("<BQQ")
    if len(body) != layout.size + 3 * (_HEADER.size + 8):
        raise ProtectionError(f"no encryption parameters with two primes: {len(body)} bytes")
    number, degree, primes = layout.unpack_from(body)
    values = []
    for place in range(3):
        start = layout.size + place * (_HEADER.size + 8)
        inner, _ = _open(body[start : start + _HEADER.size + 8], 8)
        if len(inner) != 8:
            raise ProtectionError("the encryption parameters are damaged: a modulus is not 8 bytes")
        values.append(int.from_bytes(inner, "little"))
    prime, special, plain = values
    fits = all(20 <= value.bit_length() <= 60 for value in (prime, special))
    if number not in SCHEMES or primes != 2 or degree not in STANDARD or not fits or plain.bit_length() > 60:
        raise ProtectionError(
            f"the encryption parameters are damaged: scheme {number}, degree {degree}, primes {values}"
        )
    return Ring(SCHEMES[number], degree, prime, special, plain), version


def read_vector(data: bytes) -> list[bytes]:
    """Read the ciphertexts of a TenSEAL vector, as SEAL's bytes; raise ProtectionError where it has none."""
    blobs = [value for number, value in read_fields(data) if number == 2]
    found = [blob for blob in blobs if isinstance(blob, bytes)]
    if not found or len(found) != len(blobs):
        raise ProtectionError(f"a TenSEAL vector of {len(found)} ciphertexts among {len(blobs)} parts")
    return found


def write_vector(ciphertexts: Sequence[bytes], size: int, scale_bits: int) -> bytes:
    """Write a TenSEAL vector of ciphertexts that hold `size` numbers each.

    scale_bits: 0 for BFV, which has no scale
    """
    scale = b"\x19" + struct.pack("<d", 2.0**scale_bits) if scale_bits else b""
    sizes = write_field(1, write_varint(size) * len(ciphertexts))
    return b"".join([sizes, *(write_field(2, ciphertext) for ciphertext in ciphertexts), scale])


def read_ciphertext(data: bytes, ring: Ring) -> Ciphertext:
    """Read a ciphertext of two polynomials under the data prime, as SEAL saved it, seeded or not.

    Raise ProtectionError where the bytes are no such ciphertext.
    """
    half = 8 * ring.degree
    fixed = _SHAPE.size + _HEADER.size + _COUNT.size
    body, version = _open(data, fixed + 2 * half)
    if len(body) < fixed:
        raise ProtectionError(f"a ciphertext of {len(body):,} bytes, too few for its shape")
    parms_id, ntt, polynomials, degree, primes, _, correction = _SHAPE.unpack_from(body)
    expected = (ring.parms_id, ring.scheme == "ckks", 2, ring.degree, 1, 1)
    if (parms_id, ntt, polynomials, degree, primes, correction) != expected:
        raise ProtectionError(
            f"a ciphertext of other parameters: degree {degree}, {polynomials} polynomials, {primes} primes"
        )
    (count,) = _COUNT.unpack_from(body, fixed - _COUNT.size)
    if count not in (ring.degree, 2 * ring.degree) or len(body) < fixed + 8 * count:
        raise ProtectionError(f"a ciphertext of {count:,} coefficients in {len(body):,} bytes, at degree {ring.degree}")
    coefficients = np.frombuffer(body, "<u8", count, fixed).reshape(-1, ring.degree)
    tail, seed = body[fixed + 8 * count :], b""
    if count == ring.degree:
        generator, _ = _open(tail, 1 + SEED)
        if len(generator) != 1 + SEED or generator[0] != _BLAKE2XB:
            raise ProtectionError("a seeded ciphertext without a BLAKE2xb seed of 64 bytes")
        seed = generator[1:]
    elif tail:
        raise ProtectionError(f"{len(tail):,} bytes too many after a ciphertext")
    return Ciphertext(coefficients, seed, version)


def write_ciphertext(
    coefficients: np.ndarray, ring: Ring, scale_bits: int, version: tuple[int, int], seed: Buffer = b""
) -> bytes:
    """Write a ciphertext as SEAL loads it, not compressed.

    coefficients: uint64 [2, N], or [1, N] with a `seed` of 64 bytes; scale_bits: 0 for BFV
    """
    tail = _head(1 + SEED, version) + bytes([_BLAKE2XB]) + bytes(seed) if seed else b""
    inner = _COUNT.size + coefficients.nbytes
    shape = _SHAPE.pack(ring.parms_id, ring.scheme == "ckks", 2, ring.degree, 1, 2.0**scale_bits, 1)
    head = _head(_SHAPE.size + _HEADER.size + inner + len(tail), version)
    count = _COUNT.pack(coefficients.size)
    return b"".join((head, shape, _head(inner, version), count, coefficients.data, tail))


def before_seed(ring: Ring, scale_bits: int, version: tuple[int, int]) -> bytes:
    """Return what comes before the seed in a ciphertext of nothing but a seed, as SEAL loads it.

    Its zeros are compressed; the seed is the last block of the frame, which holds it as it is (RFC 8878, 3.1.1.2).
    """
    seed = bytes(range(SEED))  # no two bytes alike, so that they are not compressed
    body = write_ciphertext(np.zeros((1, ring.degree), np.uint64), ring, scale_bits, version, seed)[_HEADER.size :]
    stream = zstandard.ZstdCompressor().compressobj()
    packed = stream.compress(body[:-SEED]) + stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    packed += stream.compress(seed) + stream.flush()
    assert packed.endswith(seed)
    return (_head(len(packed), version, _ZSTD) + packed)[:-SEED]


def _head(length: int, version: tuple[int, int], compression: int = _PLAIN) -> bytes:
    return _HEADER.pack(_MAGIC, _HEADER.size, *version, compression, 0, _HEADER.size + length)


def _open(data: bytes, most: int) -> tuple[bytes, tuple[int, int]]:
    """Return the body of a SEAL object, at most `most` bytes, and the version of SEAL that wrote it.

    Nothing may follow the length that the object announces.
    """
    if len(data) < _HEADER.size:
        raise ProtectionError(f"no SEAL object: {len(data)} bytes")
    magic, own, major, minor, compression, _, length = _HEADER.unpack_from(data)
    if magic != _MAGIC or own != _HEADER.size:
        raise ProtectionError("no SEAL object: it does not start as one")
    if length != len(data):
        raise ProtectionError(f"a SEAL object of {length:,} bytes in {len(data):,}")
    body = data[_HEADER.size :]
    if compression == _ZSTD:
        body = _decompress(body, most)
    elif compression != _PLAIN:
        raise ProtectionError(f"a SEAL object compressed in way {compression}, which FedVeil does not read")
    if len(body) > most:
        raise ProtectionError(f"a SEAL object of {len(body):,} bytes, where at most {most:,} were expected")
    return body, (major, minor)


def _decompress(data: bytes, most: int) -> bytes:
    unreadable = f"a SEAL object that cannot be decompressed within {most:,} bytes"
    with reading(lambda why: ProtectionError(f"{unreadable}: {why}")):
        announced = zstandard.frame_content_size(data)
        if announced > most:  # the library would allocate what the bytes announce
            raise ProtectionError(f"a SEAL object of {announced:,} bytes, where at most {most:,} were expected")
        return zstandard.ZstdDecompressor().decompress(data, max_output_size=most, allow_extra_data=False)


def trim(coefficients: np.ndarray, width: int) -> np.ndarray:
    """Keep the `width` low bytes of every coefficient, uint8 [n * width].

    The others are zero, because the modulus is smaller. coefficients: uint64 [n]; width: 4 to 8
    """
    out = np.empty(coefficients.size * width + 8, np.uint8)
    places = np.ndarray(coefficients.size, "<u8", out, strides=(width,))
    places[...] = coefficients  # each write ends in zeros that the next one covers: eight times as fast as slices
    return out[:-8]


def untrim(data: Buffer | np.ndarray, width: int) -> np.ndarray:
    """Return the coefficients, uint64 [n], of n * width bytes that `trim` made."""
    size = len(data) // width
    out = np.empty(size, "<u8")
    out[:-1] = np.ndarray(size - 1, "<u8", data, strides=(width,))  # with the low bytes of the next one
    out[-1] = int.from_bytes(bytes(data[-width:]), "little")
    out &= np.uint64(2 ** (8 * width) - 1)
    return out


class Scratch:
    """A file in memory for a library that saves to and loads from paths only; a forked process gets a new one.

    Where the system has no such files, it lies in memory-backed storage or in a temporary folder that only its owner
    can read.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner = 0

    def _file(self) -> tuple[int, str]:
        if self._owner != os.getpid():
            self._descriptor, self._path = _memory_file(self)
            self._owner = os.getpid()
        return self._descriptor, self._path

    def saved(self, save: Callable[[str], object]) -> bytes:
        """Return the bytes that `save` writes to a path."""
        with self._lock:
            descriptor, path = self._file()
            save(path)
            return os.pread(descriptor, os.fstat(descriptor).st_size, 0)

    def loaded(self, load: Callable[[str], object], content: bytes) -> None:
        """Let `load` read bytes from a path."""
        with self._lock:
            descriptor, path = self._file()
            os.pwrite(descriptor, content, 0)
            os.ftruncate(descriptor, len(content))  # cut after writing, so that its pages are kept for the next one
            load(path)


def _memory_file(owner: Scratch) -> tuple[int, str]:
    if hasattr(os, "memfd_create") and os.path.isdir("/proc/self/fd"):
        descriptor = os.memfd_create("fedveil")
        weakref.finalize(owner, os.close, descriptor)
        return descriptor, f"/proc/self/fd/{descriptor}"
    shared = "/dev/shm"
    folder = tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else None)
    path = os.path.join(folder.name, "scratch")
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    weakref.finalize(owner, folder.cleanup)
    weakref.finalize(owner, os.close, descriptor)
    return descriptor, path
