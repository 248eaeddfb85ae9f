"""The parameters of a protection, which follow from each other: range of weights, grid, size of cohort.

Each protection is a part, `(settings, cohort, noise) -> Plan`. From a ring degree, a modulus, a range of weights and
room for the clients' noise beside it, it computes the scale, then the finest grid whose half step stays above the noise of a whole cohort, then the largest
cohort for that grid. It refuses parameters that are insecure or could go wrong unnoticed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from pydantic import Field

from fedveil.core.declaration import part
from fedveil.core.errors import ProtectionError, SettingsError
from fedveil.core.settings.marks import Needs
from fedveil.core.settings.section import Fraction, Section
from fedveil.core.settings.sections import Privacy, Settings
from fedveil.privacy.dp.cohorts import cohort_sizes, usual_cohort
from fedveil.privacy.dp.distributed import FAR, FINEST, LONGEST, NoiseShare, honest_clients
from fedveil.privacy.dp.distributed import noise_share as _noise_share
from fedveil.privacy.dp.sensitivity import in_sums, of_updates
from fedveil.privacy.fixed_point import Grid
from fedveil.privacy.homomorphic.parameters import STANDARD, Lattice

RESERVED = 2  # numbers at the start of every chunk: the client's examples, and 1 for the client itself
COARSEST = 12  # bits: a grid coarser than 2^-12 rounds away what training learns
FAILURE = 8  # standard deviations of noise that fit under half a step: one failure in 10^15 numbers
SMALL = 16  # where a large range makes a coarse grid: a client takes part with this part of its cohort's mean examples
UNITS = 4  # the least sigma of a client's noise, in units of what it rounds to: see `dp/accounting/guarantee.py`
FRESH = 21 / 2  # variance of a fresh coefficient: SEAL's centred binomial noise
ROUNDING = 1 / 12  # variance of rounding it to a whole number; it is the same for clients that send the same
RING = 32  # bits of a number of secure aggregation on the wire

# name: (protection, degree, bits of the data prime and of the special prime, bits of the plain modulus)
PROFILES = {
    "fast": ("ckks", 4096, (40, 60), 0),
    "conservative": ("ckks", 8192, (48, 60), 0),
    "exact-small": ("bfv", 4096, (56, 50), 45),
}


Prime = Annotated[int, Field(ge=30, le=60)]
Degree = Literal[2048, 4096, 8192, 16384, 32768]


class Protected(Section):
    """Settings of every protection."""

    range: Annotated[float, Field(ge=0.01, le=1e6)] = Field(
        6.0, description="weights are clipped to this distance from zero; public, not a privacy bound"
    )
    min_clients: Annotated[int, Field(ge=3, le=10**8)] = Field(
        3, description="no aggregate of fewer clients is made or used"
    )


class Ckks(Protected):
    """Settings of `ckks`."""

    profile: Literal["fast", "conservative", "own"] = Field("fast", description="parameters by name, or your own")
    degree: Annotated[Degree, Needs("profile", ("own",))] = Field(
        4096, description="profile own: degree of the ring, N"
    )
    primes: Annotated[tuple[Prime, Prime], Field(strict=False), Needs("profile", ("own",))] = Field(
        (40, 60), description="profile own: bits of the modulus that travels, and of SEAL's special prime"
    )


class Bfv(Ckks):
    """Settings of `bfv`."""

    profile: Literal["exact-small", "own"] = Field(  # type: ignore[assignment]
        "exact-small", description="parameters by name, or your own"
    )
    plain_bits: Annotated[int, Field(ge=0, le=59), Needs("profile", ("own",))] = Field(
        45, description="profile own: bits of the plain modulus"
    )


class Secagg(Protected):
    """Settings of `secagg`."""

    drop_outs: Fraction = Field(0.2, description="share of a cohort that may drop out in a round")
    colluders: Fraction = Field(
        0.2, description="share of the clients that may collude with the server, and learn nothing more"
    )


@dataclass(frozen=True)
class Plan:
    """How numbers travel under a protection. Every party computes the same plan from the settings.

    grid: what weights are rounded to; clients: the most whose numbers may be added
    lattice, scale_bits: of CKKS and BFV (scale_bits 0 for BFV); None and 0 for secure aggregation
    least: an aggregate of fewer clients is neither made nor used
    cohort: the largest; deviation: sigma, of the noise that each client adds before it rounds, 0 without
    honest: of distributed noise, the clients whose shares are enough, 0 without
    """

    protection: str
    profile: str
    grid: Grid
    clients: int
    least: int
    lattice: Lattice | None = None
    scale_bits: int = 0
    cohort: int = 0
    deviation: float = 0.0
    honest: int = 0

    @property
    def unit(self) -> float:
        """The multiples in which a client sends its weights, where all weigh alike."""
        return self.grid.step * self.cohort

    def reference(self, announced: int) -> int:
        """Return n_ref of a round, of which so many examples were announced.

        With distributed noise it is always the largest cohort, so that noise of the same units suits every round.
        Raise ProtectionError where the cohort is larger, and its sum could wrap.
        """
        if not self.honest:
            return announced
        if announced > self.cohort:
            raise ProtectionError(
                f"a cohort of {announced:,} clients, where the numbers of {self.cohort:,} fit the protection's"
            )
        return self.cohort

    @property
    def enough(self) -> str:
        """The fewest clients of an aggregate, in words."""
        many = f"{self.least:,}"
        return f"{many} (the noise is made for so many)" if self.honest else f"privacy.protection.min_clients = {many}"

    @property
    def rounding(self) -> float:
        """The largest error of one client's mean from rounding, half a step; the sum of K clients has K halves."""
        return self.grid.step / 2

    def check_share(self, examples: int, reference: int) -> None:
        """Raise ProtectionError where a client's weights would be rounded away in its share of a cohort's examples.

        The others would then hide nobody. Where clients weigh alike, a cohort has no more shares than clients.
        """
        if self.honest and reference != self.cohort:
            raise ProtectionError(
                f"the server announces {reference:,} shares of clients that weigh alike, and this run's noise is made for "
                f"{self.cohort:,}; other shares are of other units than it is accounted in"
            )
        if self.deviation and not self.least <= reference <= self.cohort:
            raise ProtectionError(
                f"the server announces {reference:,} shares of clients that weigh alike, and this run's cohorts have {self.least:,} "
                f"to {self.cohort:,} clients; other shares are rounded otherwise than the noise is accounted for"
            )
        unit, coarsest = (
            self.grid.step * reference / examples,
            max(2.0**-COARSEST, SMALL * self.grid.step * self.cohort),
        )
        if self.lattice is None and unit > coarsest:
            raise ProtectionError(
                f"the server announces {reference:,} examples for the cohort, of which this client would send its share in "
                f"multiples of {unit:.1g}, coarser than {coarsest:.1g}: it would be rounded away"
            )

    def explain(self) -> str:
        """Describe the parameters in a sentence."""
        grid = f"weights within ±{self.grid.limit:g} on a grid of 2^-{self.grid.bits}"
        if self.lattice is None:
            return f"numbers modulo 2^{RING}; {grid}"
        lattice, grid = self.lattice, f"{grid}, at most {self.clients:,} clients"
        scale = f", scale 2^{self.scale_bits}" if self.scale_bits else f", plain modulus of {lattice.plain_bits} bits"
        return (
            f"{self.profile}: degree {lattice.degree}, {lattice.primes[0]}-bit modulus ({lattice.security}-bit security)"
            f"{scale}; {grid}"
        )


def plan_for(settings: Settings) -> Plan:
    """Make the plan of an experiment's protection, for all its cohorts; raise what `make_plan` raises.

    Distributed noise is enough for a cohort of the usual size: rounds of fewer are left out. Under BFV all clients must
    answer, or federation.quorum of them.
    """
    privacy, federation = of_updates(settings), settings.federation
    _, largest = cohort_sizes(federation, settings.data.clients)
    fewest = usual_cohort(federation, settings.data.clients)
    if privacy.shows == "sum" and federation.quorum is not None:
        fewest = min(fewest, federation.quorum)
    return make_plan(privacy, largest, fewest)


def make_plan(privacy: Privacy, cohort: int, fewest: int | None = None) -> Plan:
    """Make the plan of a protection; raise SettingsError where there is none, or its grid would swallow the clients' noise.

    cohort: clients of the largest cohort; fewest: of the smallest, for which distributed noise is enough; as many without
    """
    if privacy.noise_at == "distributed" and privacy.deviation:
        return _distributed_plan(privacy, cohort, cohort if fewest is None else fewest)
    deviation = privacy.deviation if privacy.noise_at == "client" else 0.0
    noise = FAILURE * deviation / math.sqrt(privacy.least)  # of the mean of the fewest clients
    plan = replace(_load(privacy, cohort, noise), deviation=deviation)
    _check_units(privacy, plan, deviation, "")
    return plan


def _load(privacy: Privacy, cohort: int, noise: float) -> Plan:
    plan: Plan = privacy.protection.load()(privacy.protection.settings, cohort, noise)
    return replace(plan, cohort=cohort)


def _check_units(privacy: Privacy, plan: Plan, deviation: float, whose: str) -> None:
    if deviation and deviation < UNITS * plan.unit:
        raise SettingsError(
            f"privacy.clip = {privacy.clip}, a noise multiplier of {privacy.multiplier:g}: noise of {deviation:.2g}{whose} "
            f"would be rounded away, as {privacy.protection} lets each of {plan.cohort:,} clients send multiples of {plan.unit:.2g}, and "
            f"epsilon is proven for {UNITS} of them or more; take a larger privacy.clip or noise, a smaller federation.cohort or "
            "privacy.protection.range, or a finer grid (secagg)"
        )


def _distributed_plan(privacy: Privacy, cohort: int, fewest: int) -> Plan:
    """Make the plan of noise that clients add in shares, on a grid that is no finer than the noise needs.

    No sum of fewer clients than may stay is unmasked or decrypted, by no client.
    """
    settings = privacy.protection.settings
    if not isinstance(settings, Secagg | Bfv):
        raise SettingsError(
            f"privacy.noise_at = 'distributed': privacy.protection = '{privacy.protection}' does not add whole numbers "
            "exactly; use secagg or bfv"
        )
    missing, colluding = (settings.drop_outs, settings.colluders) if isinstance(settings, Secagg) else (0.0, 0.0)
    honest = honest_clients(fewest, missing, colluding)
    if honest < 1:
        raise SettingsError(
            f"privacy.noise_at = 'distributed': nobody's noise is left of {fewest:,} clients where "
            f"privacy.protection.drop_outs = {missing:g} of them may be missing and privacy.protection.colluders = {colluding:g} "
            "may tell theirs; lower these, or take a larger federation.cohort"
        )
    own = privacy.deviation / math.sqrt(honest)
    plan = _load(privacy, cohort, FAR * LONGEST * own / math.sqrt(cohort))
    _check_units(privacy, plan, own, f", a share of {honest:,} clients' noise,")
    grid = replace(plan.grid, bits=min(plan.grid.bits, math.floor(math.log2(cohort * FINEST / own))))
    stay = fewest - math.floor(fewest * missing + 1e-9)
    return replace(plan, grid=grid, clients=min(plan.clients, cohort), honest=honest, least=max(plan.least, stay))


def noise_share(privacy: Privacy, plan: Plan, size: int, *, bounded: bool = True) -> NoiseShare:
    """Return what each client rounds and adds to an update of `size` numbers, with distributed noise.

    privacy: of `sensitivity.of_updates`; bounded: whole updates are clipped, not single examples' parts of them
    Raise SettingsError where rounding to the plan's units would lengthen updates by so much that noise drowns them.
    """
    assert privacy.bound is not None  # else the plan has no share of noise
    share = _noise_share(
        privacy.multiplier, privacy.bound, plan.unit, plan.honest, size, privacy.distribution, bounded=bounded
    )
    if (longer := share.lengthening(privacy.bound)) > LONGEST:
        if share.deviation > FINEST / 2:  # the grid could be finer, but for the noise
            raise SettingsError(
                f"privacy.clip = {privacy.clip}, a noise multiplier of {privacy.multiplier:g}: each of {plan.honest:,} clients would "
                f"add noise of {share.deviation * plan.unit:.2g} to every weight, in which any model drowns; take less noise or a "
                "larger federation.cohort"
            )
        raise SettingsError(
            f"privacy.clip = {privacy.clip}: an update of {size:,} numbers, rounded to multiples of {plan.unit:.2g}, may be "
            f"{longer:.1f} times as long, and the noise must hide that; take a larger privacy.clip, a smaller federation.cohort or "
            "privacy.protection.range, or a finer grid (secagg)"
        )
    return share


def share_for(settings: Settings, plan: Plan, size: int) -> NoiseShare:
    """Return what each client of an experiment rounds and adds to an update of `size` numbers; raise what `noise_share` raises."""
    return noise_share(of_updates(settings), plan, size, bounded=not in_sums(settings.privacy))


def _check_noise(_settings: Section, experiment: Settings) -> None:
    """Refuse an experiment whose clients' noise the grid would swallow."""
    if experiment.privacy.noisy:
        plan_for(experiment)


@part(Secagg, needs="mean", check=_check_noise)
def secagg(settings: Secagg, cohort: int, noise: float) -> Plan:
    """Make the plan of secure aggregation: whole numbers modulo 2^32, whose sum must not wrap."""
    bits = math.floor(math.log2((2 ** (RING - 1) - cohort / 2 - 1) / (settings.range + noise)))
    grid = _grid(settings, bits, cohort, noise, f"numbers modulo 2^{RING}")
    return Plan("secagg", "", grid, 2 * int(2 ** (RING - 1) - 1 - grid.most), settings.min_clients)


@part(Ckks, needs="sum", check=_check_noise)
def ckks(settings: Ckks, cohort: int, noise: float) -> Plan:
    """Make the plan of CKKS: the finest grid whose half step stays above the noise of the cohort's sum."""
    lattice = _lattice("ckks", settings)
    grid, scale_bits, clients = _ckks(settings, lattice, cohort, noise)
    _check_cohort(settings, lattice, cohort, clients, grid, "a profile with a larger modulus")
    return Plan("ckks", settings.profile, grid, clients, settings.min_clients, lattice, scale_bits)


@part(Bfv, needs="sum", check=_check_noise)
def bfv(settings: Bfv, cohort: int, noise: float) -> Plan:
    """Make the plan of BFV: the finest grid whose sum fits the plain modulus.

    Its largest cohort is the one whose noise the ciphertext modulus holds.
    """
    lattice = _lattice("bfv", settings)
    grid, clients = _bfv(settings, lattice, cohort, noise)
    _check_cohort(settings, lattice, cohort, clients, grid, "ckks, which takes a coarser grid")
    return Plan("bfv", settings.profile, grid, clients, settings.min_clients, lattice)


def _check_cohort(settings: Ckks, lattice: Lattice, cohort: int, clients: int, grid: Grid, other: str) -> None:
    if cohort > clients:
        raise SettingsError(
            f"federation.cohort = {cohort:,}: {lattice.scheme} with privacy.protection.profile = '{settings.profile}' adds at most "
            f"{clients:,} clients, or their noise would pass the grid of 2^-{grid.bits}; take a smaller cohort, {other}, or "
            "parameters of your own (privacy.protection.profile = 'own')"
        )


def make_lattice(privacy: Privacy) -> Lattice:
    """Return the parameters that a key is made for: a profile's, or the user's own.

    Raise SettingsError where they are insecure or useless.
    """
    return _lattice(privacy.protection.name, privacy.protection.settings)


def _lattice(scheme: str, settings: Ckks) -> Lattice:
    if settings.profile != "own":
        _, degree, primes, plain_bits = PROFILES[settings.profile]
        return Lattice(scheme, degree, primes, plain_bits)
    lattice = Lattice(scheme, settings.degree, settings.primes, settings.plain_bits if isinstance(settings, Bfv) else 0)
    if scheme == "ckks" and lattice.primes[0] < 36:
        raise SettingsError(
            f"privacy.protection.primes = {list(lattice.primes)}: the noise leaves no room for weights in a modulus of fewer than "
            "36 bits"
        )
    total, most = sum(lattice.primes), STANDARD[lattice.degree][128]
    if total > most:
        larger = [degree for degree, levels in STANDARD.items() if levels[128] >= total]
        raise SettingsError(
            f"privacy.protection.primes = {list(lattice.primes)}: {total} bits together are insecure with privacy.protection.degree = "
            f"{lattice.degree}, which allows {most} (Homomorphic Encryption Standard, 128 bits); take smaller primes"
            + (f", or privacy.protection.degree = {larger[0]}" if larger else "")
        )
    if lattice.scheme == "bfv" and not 20 <= lattice.plain_bits < min(lattice.primes):
        raise SettingsError(
            f"privacy.protection.plain_bits = {lattice.plain_bits}: must be at least 20 and smaller than both of privacy.protection.primes = "
            f"{list(lattice.primes)}"
        )
    return lattice


def _ckks(settings: Protected, lattice: Lattice, cohort: int, noise: float) -> tuple[Grid, int, int]:
    """Return the grid, the scale and the most clients of CKKS.

    Two weights share a complex slot, so a coefficient of the encoded sum is at most sqrt(2) (limit + rounding) scale;
    SEAL encodes up to a quarter of the modulus. In a sum of K clients, the variance of a coefficient's noise is K
    FRESH, and that of its rounding at most K^2 ROUNDING, reached where all clients send the same. In each part of a
    slot it is N/2 of that (Cheon et al. 2017, section 3.4: additions).
    """
    largest = settings.range + noise
    room = math.floor(lattice.primes[0] - 2 - math.log2(math.sqrt(2) * largest * (1 + 2.0**-COARSEST)))
    scale_bits = min(room, lattice.primes[0] - 2)  # SEAL takes no larger scale, however small the numbers
    variance = lattice.degree / 2 * (FRESH * cohort + ROUNDING * cohort**2)
    bits = math.floor(scale_bits - math.log2(2 * FAILURE * math.sqrt(variance)))
    grid = _grid(settings, bits, cohort, noise, f"a {lattice.primes[0]}-bit modulus")
    # the root of ROUNDING K^2 + FRESH K = what half a step has room for
    most = (2.0 ** (scale_bits - bits) / (2 * FAILURE)) ** 2 / (lattice.degree / 2)
    return grid, scale_bits, math.floor((math.sqrt(FRESH**2 + 4 * ROUNDING * most) - FRESH) / (2 * ROUNDING))


def _bfv(settings: Protected, lattice: Lattice, cohort: int, noise: float) -> tuple[Grid, int]:
    """Return the grid and the most clients of BFV.

    A sum must fit its half of a slot, sign and rounding included. Decryption is exact while the summed noise stays
    under q / 2t (Fan and Vercauteren 2012, lemma 1): FAILURE sqrt(FRESH K), and K / 2 of rounding.
    """
    bits = math.floor(math.log2((2 ** (lattice.field_bits - 1) - cohort / 2 - 1) / (settings.range + noise)))
    grid = _grid(settings, bits, cohort, noise, f"a {lattice.plain_bits}-bit plain modulus")
    fresh = FAILURE * math.sqrt(FRESH)
    by_noise = (math.sqrt(fresh**2 + 2.0 ** (lattice.primes[0] - lattice.plain_bits)) - fresh) ** 2
    by_field = 2 * (2 ** (lattice.field_bits - 1) - 1 - grid.most)
    return grid, math.floor(min(by_noise, by_field))


def _grid(settings: Protected, bits: int, cohort: int, noise: float, room: str) -> Grid:
    if bits < COARSEST:
        beside = f", and noise of up to {noise:.2g} beside it" if noise else ""
        raise SettingsError(
            f"privacy.protection.range = {settings.range:g}{beside}: for {cohort:,} clients {room} leaves a grid of 2^{-bits}, coarser than 2^-{COARSEST}, "
            "which rounds away what training learns; take a smaller range or cohort, or a larger modulus (privacy.protection.profile)"
        )
    return Grid(settings.range, bits, noise)
