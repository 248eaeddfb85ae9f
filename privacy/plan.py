"""How large, how fine, for how many: the parameters of a protection, which follow from each other.

`make_plan` is the one place that knows. From a ring degree, a modulus and a range of weights it finds the scale, then the
finest grid whose half step stays above the noise of a whole cohort, then the largest cohort for that grid; it says so in
words, and refuses what is insecure or could go wrong unnoticed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedveil.core.errors import SettingsError
from fedveil.core.experiment import Privacy
from fedveil.privacy.packing import Grid

RESERVED = 2  # numbers at the start of every chunk: the client's examples, and 1 for the client itself
COARSEST = 12  # bits: a grid coarser than 2^-12 rounds away what training learns
FAILURE = 8  # standard deviations of noise that fit under half a step: one failure in 10^15 numbers
FRESH = 21 / 2  # variance of a fresh coefficient: SEAL's centred binomial noise
ROUNDING = 1 / 12  # and of rounding it to a whole number: the same for clients that send the same
RING = 32  # bits a number of secure aggregation has on the wire

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
# name: (protection, degree, bits of the data prime and of the special prime, bits of the plain modulus)
PROFILES = {
    "fast": ("ckks", 4096, (40, 60), 0),
    "conservative": ("ckks", 8192, (48, 60), 0),
    "exact-small": ("bfv", 4096, (56, 50), 45),
}
DEFAULT = {"ckks": "fast", "bfv": "exact-small"}


@dataclass(frozen=True)
class Lattice:
    """The parameters of CKKS or BFV, as a key is made for them.

    degree: N; primes: bits of the data prime, whose ciphertexts travel, and of the special prime, which never does (SEAL
    wants it); plain_bits: of BFV's plain modulus t, 0 for CKKS
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
        """Bits, of what anybody but the clients sees: ciphertexts under the data prime, and no public key."""
        return max(level for level, most in STANDARD[self.degree].items() if self.primes[0] <= most)


@dataclass(frozen=True)
class Plan:
    """How numbers travel under a protection; every party makes the same from the settings.

    grid: what weights are rounded to; clients: the most whose numbers may be added
    lattice, scale_bits: of CKKS and BFV (scale_bits 0 for BFV); None and 0 for secure aggregation
    least: an aggregate of fewer clients is neither made nor used
    """

    protection: str
    profile: str
    grid: Grid
    clients: int
    least: int
    lattice: Lattice | None = None
    scale_bits: int = 0

    @property
    def rounding(self) -> float:
        """The most that the mean of one client's weights can lie off the grid: half a step; K clients: K halves."""
        return self.grid.step / 2

    def explain(self) -> str:
        """The parameters in a sentence."""
        grid = f"weights within ±{self.grid.limit:g} on a grid of 2^-{self.grid.bits}"
        if self.lattice is None:
            return f"numbers modulo 2^{RING}; {grid}"
        lattice, grid = self.lattice, f"{grid}, at most {self.clients:,} clients"
        scale = f", scale 2^{self.scale_bits}" if self.scale_bits else f", plain modulus of {lattice.plain_bits} bits"
        return (
            f"{self.profile}: degree {lattice.degree}, {lattice.primes[0]}-bit modulus ({lattice.security}-bit security)"
            f"{scale}; {grid}"
        )


def make_plan(privacy: Privacy, cohort: int) -> Plan:
    """The plan of a protection for cohorts of so many clients; raise SettingsError, with the reason, where there is none."""
    if privacy.protection == "secagg":
        bits = math.floor(math.log2((2 ** (RING - 1) - cohort / 2 - 1) / privacy.range))
        grid = _grid(privacy, bits, cohort, f"numbers modulo 2^{RING}")
        return Plan("secagg", "", grid, 2 * int(2 ** (RING - 1) - 1 - grid.most), privacy.min_clients)
    profile = privacy.profile or DEFAULT[privacy.protection]
    lattice = make_lattice(privacy)
    scale_bits = 0
    if lattice.scheme == "ckks":
        grid, scale_bits, clients = _ckks(privacy, lattice, cohort)
    else:
        grid, clients = _bfv(privacy, lattice, cohort)
    if cohort > clients:
        other = "ckks, which takes a coarser grid" if lattice.scheme == "bfv" else "a profile with a larger modulus"
        raise SettingsError(
            f"federation.cohort = {cohort:,}: {privacy.protection} with privacy.profile = '{profile}' adds at most {clients:,} "
            f"clients, or their noise would pass the grid of 2^-{grid.bits}; take a smaller cohort, {other}, or parameters of "
            "your own (privacy.profile = 'own')"
        )
    return Plan(lattice.scheme, profile, grid, clients, privacy.min_clients, lattice, scale_bits)


def make_lattice(privacy: Privacy) -> Lattice:
    """The parameters that a key is made for: a profile's, or the user's own; raise SettingsError where insecure or useless."""
    name = privacy.profile or DEFAULT[privacy.protection]
    if name != "own":
        scheme, degree, primes, plain_bits = PROFILES[name]
        return Lattice(scheme, degree, primes, plain_bits)
    plain_bits = privacy.plain_bits if privacy.protection == "bfv" else 0
    lattice = Lattice(privacy.protection, privacy.degree, privacy.primes, plain_bits)
    total, most = sum(lattice.primes), STANDARD[lattice.degree][128]
    if total > most:
        larger = [degree for degree, levels in STANDARD.items() if levels[128] >= total]
        raise SettingsError(
            f"privacy.primes = {list(lattice.primes)}: {total} bits together are insecure with privacy.degree = "
            f"{lattice.degree}, which allows {most} (Homomorphic Encryption Standard, 128 bits); take smaller primes"
            + (f", or privacy.degree = {larger[0]}" if larger else "")
        )
    if lattice.scheme == "bfv" and not 20 <= lattice.plain_bits < min(lattice.primes):
        raise SettingsError(
            f"privacy.plain_bits = {lattice.plain_bits}: must be at least 20 and smaller than both of privacy.primes = "
            f"{list(lattice.primes)}"
        )
    return lattice


def _ckks(privacy: Privacy, lattice: Lattice, cohort: int) -> tuple[Grid, int, int]:
    """Grid, scale and most clients of CKKS.

    Two weights share a complex slot, so a coefficient of the encoded sum is at most sqrt(2) (limit + rounding) scale; SEAL
    encodes up to a quarter of the modulus. In a sum of K the variance of a coefficient's noise is K FRESH, and of its
    rounding up to K^2 ROUNDING, where all clients send the same; in each part of a slot it is N/2 of that (Cheon et al.
    2017, section 3.4: additions).
    """
    room = math.floor(lattice.primes[0] - 2 - math.log2(math.sqrt(2) * privacy.range * (1 + 2.0**-COARSEST)))
    scale_bits = min(room, lattice.primes[0] - 2)  # SEAL takes no larger scale, however small the numbers
    variance = lattice.degree / 2 * (FRESH * cohort + ROUNDING * cohort**2)
    bits = math.floor(scale_bits - math.log2(2 * FAILURE * math.sqrt(variance)))
    grid = _grid(privacy, bits, cohort, f"a {lattice.primes[0]}-bit modulus")
    # the root of ROUNDING K^2 + FRESH K = what half a step has room for
    most = (2.0 ** (scale_bits - bits) / (2 * FAILURE)) ** 2 / (lattice.degree / 2)
    return grid, scale_bits, math.floor((math.sqrt(FRESH**2 + 4 * ROUNDING * most) - FRESH) / (2 * ROUNDING))


def _bfv(privacy: Privacy, lattice: Lattice, cohort: int) -> tuple[Grid, int]:
    """Grid and most clients of BFV.

    A sum must fit its half of a slot, sign and rounding included; and decryption is exact while the summed noise stays
    under q / 2t (Fan and Vercauteren 2012, lemma 1): FAILURE sqrt(FRESH K), and K / 2 of rounding.
    """
    bits = math.floor(math.log2((2 ** (lattice.field_bits - 1) - cohort / 2 - 1) / privacy.range))
    grid = _grid(privacy, bits, cohort, f"a {lattice.plain_bits}-bit plain modulus")
    noise = FAILURE * math.sqrt(FRESH)
    by_noise = (math.sqrt(noise**2 + 2.0 ** (lattice.primes[0] - lattice.plain_bits)) - noise) ** 2
    by_field = 2 * (2 ** (lattice.field_bits - 1) - 1 - grid.most)
    return grid, math.floor(min(by_noise, by_field))


def _grid(privacy: Privacy, bits: int, cohort: int, room: str) -> Grid:
    if bits < COARSEST:
        raise SettingsError(
            f"privacy.range = {privacy.range:g}: for {cohort:,} clients {room} leaves a grid of 2^{-bits}, coarser than 2^-{COARSEST}, "
            "which rounds away what training learns; take a smaller range or cohort, or a larger modulus (privacy.profile)"
        )
    return Grid(privacy.range, bits)
