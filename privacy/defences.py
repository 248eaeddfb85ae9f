"""What a client does to its update before it sends anything: a defence, then clipping, then noise.

A defence changes an update so that it tells less. None is a guarantee: an attack that knows the defence may do better.
Only clipping with noise bounds what any attack can do. Numbers that a defence sets to zero still travel, as zeros:
which numbers are left out would tell which words an update is about.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from inspect import signature

import numpy as np
from pydantic import Field

from fedveil.core.declaration import declares, part
from fedveil.core.errors import ProtectionError, SettingsError
from fedveil.core.randomness import Stream
from fedveil.core.settings.section import Fraction, Section
from fedveil.core.settings.sections import Privacy
from fedveil.privacy.dp.distributed import contribution
from fedveil.privacy.dp.noise import Normal, Update, add_noise, clip, norm, secret_normal
from fedveil.privacy.dp.samplers import secret_bytes
from fedveil.privacy.fixed_point import Layout, flatten, unflatten
from fedveil.privacy.plan import Plan, noise_share

Defence = Callable[[Update, np.random.Generator], Update]  # its settings are bound already


class Prune(Section):
    """Settings of `prune`."""

    fraction: Fraction = Field(0.9, description="share of the update's numbers that are set to zero")


@part(Prune)
def prune(update: Update, settings: Prune, generator: np.random.Generator) -> Update:
    """Set the smallest `settings.fraction` of an update's numbers to zero, by magnitude over all tensors.

    Gradient pruning of Zhu et al. 2019, "Deep Leakage from Gradients", section 5.
    """
    sizes = np.concatenate([np.abs(value).reshape(-1) for value in update.values()])
    kept = np.ones(sizes.size, bool)
    kept[np.argsort(sizes, kind="stable")[: int(settings.fraction * sizes.size + 1e-9)]] = (
        False  # 0.29 of 100 are 29, not 28
    )
    pieces = np.split(kept, np.cumsum([value.size for value in update.values()])[:-1])
    return {
        name: value * piece.reshape(value.shape) for (name, value), piece in zip(update.items(), pieces, strict=True)
    }


def find_defence(privacy: Privacy) -> Defence | None:
    """Return the defence that the settings name; None where they name none.

    A defence is a function `(update, settings, generator)`, or `(update, generator)` where it declares no settings.
    Raise SettingsError where it cannot be loaded or called so.
    """
    chosen = privacy.defence
    if chosen.name == "none":
        return None
    defence = chosen.load()
    given = (chosen.settings,) if declares(defence) else ()
    try:
        signature(defence).bind({}, *given, None)
    except TypeError as error:
        raise SettingsError(
            f"privacy.defence = '{chosen.name}': must be a function (update, {'settings, ' * len(given)}generator) ({error})"
        ) from None
    return lambda update, generator: defence(update, *given, generator)


def defend(privacy: Privacy, given: Update, weights: Update, stream: Stream, *, secret: bool) -> Update:
    """Return the weights that a client answers with: given + noise(clip(defence(weights - given))), float32.

    Where they are to be rounded to a protection's grid, `share` adds the noise: float32 rounds too.
    given, weights: float32, before and after training; stream: of this client in this round
    secret: draw noise from the operating system's generator, not from the stream
    A client answers whatever its data is, so a non-finite update counts as zero where the settings ask for clipping and
    noise. Without noise it is returned as it is, and refused later.
    Raise SettingsError where a user's own defence does not return an update of this network, and ProtectionError where
    a share of distributed noise would be all that hides an update.
    """
    if privacy.noisy and privacy.noise_at == "distributed" and not privacy.protected:
        raise ProtectionError("privacy.noise_at = 'distributed': a client's share of the noise hides nothing by itself")
    if not privacy.defends:
        return weights
    with np.errstate(over="ignore", invalid="ignore"):  # non-finite updates are dealt with below
        update = {name: np.subtract(value, given[name], dtype=np.float64) for name, value in weights.items()}
    defence = find_defence(privacy)
    finite = np.isfinite(norm(update))
    if not finite and not privacy.noisy:
        return weights
    if defence is not None and finite:
        update = _checked(privacy.defence.name, defence(update, stream.generator("defence")), weights)
    if privacy.bound is not None:
        update = clip(update, privacy.bound)
        if privacy.noisy and privacy.noise_at == "client" and not privacy.protected:
            update = add_noise(update, privacy.deviation, _normal(stream, secret))
    return {name: np.asarray(given[name] + value, np.float32) for name, value in update.items()}


def share(
    privacy: Privacy,
    plan: Plan,
    given: Update,
    weights: Update,
    stream: Stream,
    *,
    secret: bool,
    bounded: bool = True,
) -> tuple[Update, Update | None]:
    """Return what a client rounds to a protection's grid: its weights, and the noise to add to them; float64.

    privacy: of `dp/sensitivity.of_updates`; bounded: noise hides whole updates, else single examples' parts of them
    given, weights: float32, as they were sent and as `defend` returns them; stream, secret: as there
    Weights are float32 as they are, and None, where the client adds no noise. Else they are clipped again, since a norm
    of C is a little more after rounding to float32.
    Distributed noise is added to an update in whole numbers of the plan's unit: the first is then the given model alone, the
    second the rounded update and its noise, both of them multiples of the unit, which rounding to the grid leaves as they are.
    """
    distributed = privacy.noisy and privacy.noise_at == "distributed"
    if distributed and not plan.honest:
        raise ProtectionError(
            "a share of the noise hides nothing without a protection that adds whole numbers (secagg, bfv), and a bound of updates"
        )
    if not privacy.noisy or privacy.noise_at == "server" or privacy.bound is None:
        return weights, None
    update = clip(
        {name: np.subtract(value, given[name], dtype=np.float64) for name, value in weights.items()},
        privacy.bound if bounded else math.inf,
    )
    if distributed:
        return _distributed(privacy, plan, given, update, stream, secret=secret, bounded=bounded)
    still = {name: np.zeros(value.shape) for name, value in update.items()}
    exact = {name: given[name] + value for name, value in update.items()}
    return exact, add_noise(still, privacy.deviation, _normal(stream, secret))


def _distributed(
    privacy: Privacy, plan: Plan, given: Update, update: Update, stream: Stream, *, secret: bool, bounded: bool
) -> tuple[Update, Update]:
    """Return the given model in multiples of the plan's unit, and what the client adds to it, for `share`."""
    layout, before = Layout.of(given), flatten(given, np.float64)
    if not np.isfinite(before).all():
        bad = int(np.flatnonzero(~np.isfinite(before))[0])
        raise ProtectionError(f"{layout.tensor_at(bad)} of the model that was sent holds a number that is not finite")
    random = secret_bytes if secret else stream.generator("noise").bytes
    own = flatten({name: update[name] for name in given}, np.float64)
    kind = noise_share(privacy, plan, layout.size, bounded=bounded)
    parts = contribution(before, own, plan.grid.limit, kind, random)
    known, added = (unflatten(part * plan.unit, layout) for part in parts)
    return known, added


def _normal(stream: Stream, secret: bool) -> Normal:
    """Return the generator of a client's noise."""
    return secret_normal if secret else stream.generator("noise").standard_normal


def _checked(name: str, update: Update, like: Update) -> Update:
    """Return an update in the order of `like`; raise SettingsError where its tensors are not those of `like`."""
    wanted = {key: value.shape for key, value in like.items()}
    found = {key: np.shape(value) for key, value in update.items()} if isinstance(update, dict) else type(update)
    if found != wanted:
        raise SettingsError(
            f"privacy.defence = '{name}': gave {found}, and an update of this network is a dict of {wanted}"
        )
    return {key: np.asarray(update[key], np.float64) for key in like}
