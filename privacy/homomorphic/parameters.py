"""The parameters of CKKS and BFV that a key is made for, and which of them are secure."""

from __future__ import annotations

from dataclasses import dataclass

# The most bits of all primes together for a degree, ternary secret: Homomorphic Encryption Standard (Albrecht et al.
# 2018), table 1, classical attacks.
STANDARD = {
    1024: {128: 27, 192: 19, 256: 14},
    2048: {128: 54, 192: 37, 256: 29},
    4096: {128: 109, 192: 75, 256: 58},
    8192: {128: 218, 192: 152, 256: 118},
    16384: {128: 438, 192: 305, 256: 237},
    32768: {128: 881, 192: 611, 256: 476},
}


@dataclass(frozen=True)
class Lattice:
    """The parameters of CKKS or BFV that a key is made for.

    degree: N; primes: bits of the data prime, whose ciphertexts travel, and of the special prime, which SEAL needs and
    which never travels
    plain_bits: of BFV's plain modulus t, 0 for CKKS
    """

    scheme: str
    degree: int
    primes: tuple[int, int]
    plain_bits: int = 0

    @property
    def numbers(self) -> int:
        """Weights and reserved numbers in a ciphertext: two in a slot, CKKS has N/2 slots and BFV N."""
        return self.degree if self.scheme == "ckks" else 2 * self.degree

    @property
    def field_bits(self) -> int:
        """BFV: bits of each of the two numbers in a slot."""
        return (self.plain_bits - 1) // 2

    @property
    def security(self) -> int:
        """Bits of security of the ciphertexts against all but the clients.

        Others see ciphertexts under the data prime, and no public key.
        """
        return max(level for level, most in STANDARD[self.degree].items() if self.primes[0] <= most)
