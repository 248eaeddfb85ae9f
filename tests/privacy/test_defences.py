"""What a client does to its own update: pruning, a user's own, and that clipping comes after and noise last."""

from __future__ import annotations

import sys
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedveil import Experiment
from fedveil.core.declaration import part
from fedveil.core.errors import SettingsError
from fedveil.core.randomness import Stream
from fedveil.core.settings.sections import Privacy
from fedveil.privacy.defences import Prune, defend, find_defence, prune
from fedveil.privacy.dp.noise import norm

STREAM = Stream(3, 2, 1)
GIVEN = {"weight": np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3), "bias": np.zeros(4, np.float32)}
WEIGHTS = {"weight": GIVEN["weight"] + np.float32(0.5), "bias": np.arange(4, dtype=np.float32)}


def change(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: value.astype(np.float64) - GIVEN[name] for name, value in weights.items()}


@pytest.fixture
def own(monkeypatch) -> ModuleType:
    """A user's module, importable as `my_defences`."""
    module = ModuleType("my_defences")
    monkeypatch.setitem(sys.modules, "my_defences", module)
    return module


updates = st.fixed_dictionaries({
    "a": arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(1, 6)), elements=st.floats(-9, 9)),
    "b": arrays(np.float64, st.integers(1, 9), elements=st.floats(-9, 9)),
})  # fmt: skip


@given(updates, st.floats(0, 0.99))
def test_pruning_sets_the_smallest_numbers_to_zero_and_leaves_the_rest(update, fraction) -> None:
    pruned = prune(update, Prune(fraction=fraction), np.random.default_rng(0))
    flat = [float(x) for value in update.values() for x in value.reshape(-1)]
    smallest = sorted(range(len(flat)), key=lambda i: (abs(flat[i]), i))[: int(fraction * len(flat) + 1e-9)]
    wanted = [0.0 if i in set(smallest) else x for i, x in enumerate(flat)]
    assert [float(x) for value in pruned.values() for x in value.reshape(-1)] == wanted
    assert {name: value.shape for name, value in pruned.items()} == {n: v.shape for n, v in update.items()}


def test_a_share_of_numbers_is_counted_without_loss() -> None:
    pruned = prune({"a": np.arange(1.0, 101.0)}, Prune(fraction=0.29), np.random.default_rng(0))
    assert np.count_nonzero(pruned["a"] == 0) == 29


def test_nothing_set_leaves_the_weights_themselves() -> None:
    assert defend(Privacy(), GIVEN, WEIGHTS, STREAM, secret=False) is WEIGHTS
    assert find_defence(Privacy()) is None


def test_clipping_bounds_what_a_client_sends() -> None:
    sent = defend(Privacy(clip=0.25), GIVEN, WEIGHTS, STREAM, secret=False)
    assert all(value.dtype == np.float32 for value in sent.values())
    assert norm(change(sent)) == pytest.approx(0.25, rel=1e-6)
    whole = change(WEIGHTS)
    for name, value in change(sent).items():
        np.testing.assert_allclose(value, whole[name] * (0.25 / norm(whole)), atol=1e-7)


def test_the_defence_comes_first_then_clipping_then_noise(own) -> None:
    def double_and_jitter(update: dict[str, np.ndarray], generator: np.random.Generator) -> dict[str, np.ndarray]:
        return {name: 2 * value + generator.standard_normal(value.shape) for name, value in update.items()}

    own.double_and_jitter = double_and_jitter
    privacy = Privacy(defence="my_defences:double_and_jitter", clip=0.5, noise_multiplier=0.4)
    sent = defend(privacy, GIVEN, WEIGHTS, STREAM, secret=False)
    defence, noise = STREAM.generator("defence"), STREAM.generator("noise")
    changed = {name: 2 * value + defence.standard_normal(value.shape) for name, value in change(WEIGHTS).items()}
    factor = 0.5 / norm(changed)
    assert factor < 1
    for name, value in changed.items():
        wanted = GIVEN[name] + (value * factor + 0.2 * noise.standard_normal(value.size).reshape(value.shape))
        np.testing.assert_allclose(sent[name], wanted, rtol=0, atol=2e-7)


def test_noise_of_the_server_is_none_of_the_clients() -> None:
    clipped = defend(Privacy(clip=0.5), GIVEN, WEIGHTS, STREAM, secret=False)
    sent = defend(Privacy(clip=0.5, noise_multiplier=9.0, noise_at="server"), GIVEN, WEIGHTS, STREAM, secret=True)
    for name, value in clipped.items():
        np.testing.assert_array_equal(sent[name], value)


def test_noise_is_the_seeds_in_a_simulation_and_nobodys_elsewhere() -> None:
    privacy = Privacy(clip=0.5, noise_multiplier=1.0)
    seeded, again = (defend(privacy, GIVEN, WEIGHTS, STREAM, secret=False) for _ in range(2))
    secret, other = (defend(privacy, GIVEN, WEIGHTS, STREAM, secret=True) for _ in range(2))
    for name in GIVEN:
        np.testing.assert_array_equal(seeded[name], again[name])
        assert (secret[name] != seeded[name]).all()
        assert (secret[name] != other[name]).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_update_that_is_not_finite_is_noise_alone_where_noise_is_on_and_else_is_left_to_be_refused(bad) -> None:
    spoiled = {**WEIGHTS, "bias": np.array([0, bad, 0, 0], np.float32)}
    assert defend(Privacy(clip=0.5), GIVEN, spoiled, STREAM, secret=False) is spoiled
    noisy = Privacy(clip=0.5, noise_multiplier=1.0, defence="prune")
    sent, still = (defend(noisy, GIVEN, weights, STREAM, secret=False) for weights in (spoiled, dict(GIVEN)))
    for name in GIVEN:
        np.testing.assert_array_equal(sent[name], still[name])
        assert np.isfinite(sent[name]).all()


@pytest.mark.parametrize(
    ("gives", "said"),
    [
        (lambda update, _: None, "gave <class 'NoneType'>"),
        (lambda update, _: {"weight": update["weight"]}, "gave {'weight': (4, 3)}"),
        (lambda update, _: {**update, "bias": np.zeros(3)}, "'bias': (3,)"),
    ],
    ids=["nothing", "a tensor short", "another shape"],
)
def test_a_defence_that_gives_no_update_is_refused(own, gives, said) -> None:
    own.spoil = gives
    with pytest.raises(SettingsError, match=r"^privacy.defence = 'my_defences:spoil': gave ") as refused:
        defend(Privacy(defence="my_defences:spoil"), GIVEN, WEIGHTS, STREAM, secret=False)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"privacy.defence": "pruned"}, "privacy.defence: no defence is called 'pruned'; did you mean 'prune'?"),
        (
            {"privacy.defence.fraction": 0.5},
            "unknown setting of privacy.defence = 'none'; fraction is a setting of privacy.defence = 'prune'",
        ),
        (
            {"privacy.defence": "prune", "privacy.defence.fraction": 1.0},
            "privacy.defence.fraction = 1.0: must be less than 1",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, said) -> None:
    with pytest.raises(SettingsError) as refused:
        Experiment().override(settings)
    assert said in str(refused.value)


def test_a_defence_that_cannot_be_loaded_is_refused_by_name() -> None:
    with pytest.raises(SettingsError, match=r"privacy\.defence: 'my_missing:x' cannot be loaded"):
        Experiment().override({"privacy.defence": "my_missing:x"})


def test_a_defence_that_takes_other_arguments_is_refused_before_a_run(own) -> None:
    own.alone = lambda update: update
    with pytest.raises(SettingsError, match=r"'my_defences:alone': must be a function \(update, generator\)"):
        find_defence(Privacy(defence="my_defences:alone"))
    own.declared = part(Prune)(lambda update, generator: update)
    with pytest.raises(
        SettingsError, match=r"'my_defences:declared': must be a function \(update, settings, generator\)"
    ):
        find_defence(Privacy(defence="my_defences:declared"))
