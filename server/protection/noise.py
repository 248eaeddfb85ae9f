"""How the sum of a round's updates becomes a noisy mean: its noise, the public number it is divided by, the bound's count.

A trusted server adds noise once to the sum (central differential privacy): it sees the updates before its noise, and those
who receive the models do not. Under secure aggregation the sum may hold the clients' shares of the noise already.

**The divisor is public**: it must not depend on who answered, which may depend on data. With fixed cohorts and in turn it
is the number of clients that were asked, with Poisson cohorts their average, q N = `federation.cohort`. A client that does
not answer counts as an update of zero, as the client that a neighbouring run lacks does. So the mean of a round that many
left is short, and not biased towards those that stayed.

**So is the noise**: shares of noise add up to more, the more clients a sum has, and who sees a model of many weights could read
off how many they were. Cohorts drawn by coins hide a client from those alone who do not know that. There the server adds the
shares that the largest cohort would have had beside.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedveil.core.errors import SettingsError
from fedveil.core.randomness import Stream
from fedveil.core.settings.experiment import Experiment
from fedveil.privacy.dp.adaptive import count_deviation, noisy_share, sum_multiplier
from fedveil.privacy.dp.banded import BandedNoise, bands_of
from fedveil.privacy.dp.noise import Normal, Update, Updates, keyed_normal, secret_normal
from fedveil.privacy.dp.sensitivity import change_of_sum, in_sums
from fedveil.privacy.fixed_point import Layout, flatten, unflatten
from fedveil.privacy.plan import plan_for, share_for

Draw = Callable[[int, int], np.ndarray]  # (round, size) -> a round's standard normal noise, float64 [size]
KEY = 32  # bytes of the key of noise that is taken back


@dataclass(frozen=True)
class NoisySum:
    """What becomes of a round's sum of updates.

    given: the model that clients were sent, float32 by name
    bound: C, to which each update is clipped
    divisor: the public number of clients that the sum is divided by
    deviation: sigma of the noise in each number of the sum; 0 where the clients' own shares of noise are enough
    normal: draws the noise, before it is multiplied by `deviation`
    shares: of noise in the sum of the largest cohort, of which the server adds those that are missing, and the deviation of one
    count: s, the deviation of the noise in the number of updates within C; None where the bound is fixed
    """

    given: Mapping[str, np.ndarray]
    bound: float
    divisor: int
    deviation: float
    normal: Normal
    shares: tuple[int, float] = (0, 0.0)
    count: float | None = None
    normal_count: Normal = secret_normal

    def of_updates(self, weights: Sequence[Mapping[str, np.ndarray]]) -> Update:
        """Return given + (sum of clip(w_k - given) + N(0, sigma^2)) / divisor, float32; noise alone for no clients.

        McMahan et al. 2018, algorithm 1. Updates are clipped again here, because an update may arrive longer, by its
        encoding or on purpose. One that is not finite counts as zero.
        """
        layout, updates = Layout.of(self.given), Updates(self.given)
        total = np.zeros(layout.size)
        for own in weights:
            length = updates.read(own)
            if not math.isfinite(length):
                continue
            if length > self.bound:
                updates.update *= self.bound / length
            total += updates.update
        if self.deviation:
            total += self.deviation * self.normal(layout.size)
        return unflatten((updates.before + total / self.divisor).astype(np.float32), layout)

    def of_mean(self, mean: Mapping[str, np.ndarray], clients: int, still: np.ndarray) -> Update:
        """Return still + (clients (mean - still) + N(0, sigma^2)) / divisor, float32; sigma^2 with that of missing shares.

        mean: of the weights of so many clients, which clipped their updates
        still: what a client sends whose update is zero, float64 [size]: `given`, within a protection's range and on its grid.
        So a client more or less changes the sum by its own update, and not by what the range or the grid does to `given`.
        """
        layout = Layout.of(self.given)
        share = clients / self.divisor
        made = share * flatten({name: mean[name] for name in self.given}, np.float64) + (1 - share) * still
        most, own = self.shares
        deviation = math.hypot(self.deviation, own * math.sqrt(max(0, most - clients)))
        if deviation:
            made += deviation / self.divisor * self.normal(layout.size)
        return unflatten(made.astype(np.float32), layout)

    def share_within(self, within: int, clients: int) -> float:
        """Return the noisy share of updates within the bound, where so many of `clients` said that theirs was."""
        assert self.count is not None  # else nobody was asked
        return noisy_share(within, clients, self.divisor, self.count * float(self.normal_count(1)[0]))


def noisy_sum(
    experiment: Experiment, number: int, given: Mapping[str, np.ndarray], asked: int, bound: float | None, draw: Draw,
    *, secret: bool, learning_rate: float,
) -> NoisySum | None:  # fmt: skip
    """Return what becomes of a round's sum; None where it has no noise, or each update has all its noise already.

    number, given, asked: the round, its model, and how many clients it asks
    bound: C where it changes from round to round, else None; draw: the noise of the server, from `server_draw`
    secret: the count's noise comes from the operating system's generator, and not from the seed
    learning_rate: of the clients' step, where the noise hides examples
    """
    privacy, federation = experiment.privacy, experiment.federation
    if not privacy.noisy or privacy.noise_at == "client":
        return None
    divisor = federation.cohort if federation.sampling == "poisson" else asked or federation.cohort
    if privacy.noise_at == "distributed":
        shares = (0, 0.0)
        if federation.sampling == "poisson":
            plan = plan_for(experiment)
            own = share_for(experiment, plan, Layout.of(given).size)
            shares = plan.cohort, own.deviation * own.unit
        return NoisySum(given, math.inf, divisor, 0.0, lambda size: draw(number, size), shares)
    if in_sums(privacy):  # clients bound each example's part of an update, and not the update
        change = change_of_sum(experiment, learning_rate)
        return NoisySum(given, math.inf, divisor, privacy.multiplier * change, lambda size: draw(number, size))
    if bound is None:
        assert privacy.bound is not None  # a mechanism's check
        return NoisySum(given, privacy.bound, divisor, privacy.deviation, lambda size: draw(number, size))
    cohort = federation.cohort
    return NoisySum(
        given, bound, divisor, sum_multiplier(privacy.multiplier, cohort) * bound, lambda size: draw(number, size),
        (0, 0.0), count_deviation(privacy.multiplier, cohort),
        secret_normal if secret else Stream(experiment.seed, number).generator("clip count").standard_normal,
    )  # fmt: skip


def server_draw(experiment: Experiment, key: bytes | None, *, secret: bool) -> Draw:
    """Return the generator of a run's server noise.

    key: of banded noise, where it is secret; None else
    secret: draw from the operating system's generator, or by the key that it made, and not from the seed
    """

    def seeded(number: int, size: int) -> np.ndarray:
        return Stream(experiment.seed, number).generator("server noise").standard_normal(size)

    def keyed(number: int, size: int) -> np.ndarray:
        assert key is not None
        return keyed_normal(key, number, size)

    if experiment.privacy.noise == "banded":
        federation = experiment.federation
        bands = bands_of(experiment.data.clients, federation.cohort, federation.rounds)
        return BandedNoise(bands, keyed if secret else seeded)
    return (lambda _number, size: secret_normal(size)) if secret else seeded


def noise_key(path: Path, *, begins: bool) -> bytes:
    """Return the key of a run's banded noise, of the server alone; a run that begins makes it (mode 0600).

    Raise SettingsError where a run that goes on has lost it: without it, no later noise can take back earlier noise.
    """
    if begins:
        path.unlink(missing_ok=True)
        key = os.urandom(KEY)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(key)
            file.flush()
            os.fsync(file.fileno())
        return key
    try:
        key = path.read_bytes()
    except OSError as error:
        key = b""
        why = error.strerror or str(error)
    else:
        why = f"it has {len(key)} bytes of {KEY}"
    if len(key) != KEY:
        raise SettingsError(
            f"{path}: the key of the run's noise cannot be read ({why}), and with privacy.noise = 'banded' later noise is made "
            "of earlier noise; put the file back, or start a new run"
        )
    return key
