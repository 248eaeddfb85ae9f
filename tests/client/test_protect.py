"""A client's side of a protection, without a server: what it refuses to encrypt or mask, and what order does not change."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedveil import Experiment
from fedveil.client.masked import MaskedSide
from fedveil.client.protect import LatticeSide
from fedveil.core.errors import ProtectionError
from fedveil.core.messages import to_arrays
from fedveil.privacy.keys import SERVER, load_server, write_keys
from fedveil.privacy.lattice import Adder
from fedveil.privacy.packing import Layout
from fedveil.privacy.plan import make_lattice
from fedveil.privacy.wire import expect, read

RNG = np.random.default_rng(5)
WEIGHTS = {
    "first.weight": RNG.normal(size=(4, 3)).astype(np.float32),
    "first.bias": RNG.normal(size=4).astype(np.float32),
}
LAYOUT, RUN = Layout.of(WEIGHTS), bytes(range(16))


def settings(protection: str) -> Experiment:
    return Experiment(data={"clients": 3}, federation={"cohort": 3}, privacy={"protection": protection})


@pytest.fixture(params=["bfv", "ckks"])
def side(request, tmp_path) -> LatticeSide:
    """The clients' side of three that share a key, in the folder "keys"."""
    experiment = settings(request.param)
    write_keys(tmp_path / "keys", make_lattice(experiment.privacy), 1)
    return LatticeSide(experiment, LAYOUT, tmp_path / "keys" / "client-1" / "client.key")


def total(side: LatticeSide, folder: Path, blobs: list[bytes]) -> np.ndarray:
    """The decrypted sum of uploads of clients 0, 1, ... with 10 examples each, in steps of the grid."""
    context = load_server(folder / "keys" / "server" / SERVER)
    adder = Adder(context, side.plan)
    for client, blob in enumerate(blobs):
        wanted = expect("upload", side.plan, context, run=RUN, round=1, layout=LAYOUT, client=client, reference=30)
        header, body = read(blob, wanted)
        adder.add(body, header.form, header.seeded)
    return side._encryptor.decrypt(adder.total(), LAYOUT.size, 10 * len(blobs), len(blobs))


def test_the_order_in_which_weights_are_named_changes_nothing_that_is_encrypted(side, tmp_path) -> None:
    turned = dict(reversed(WEIGHTS.items()))
    as_they_are = [side.seal(WEIGHTS, client, 10, 1, RUN, 30).blob for client in range(3)]
    in_another_order = [side.seal(turned, client, 10, 1, RUN, 30).blob for client in range(3)]
    np.testing.assert_array_equal(total(side, tmp_path, as_they_are), total(side, tmp_path, in_another_order))


def test_the_order_in_which_weights_are_named_changes_nothing_that_is_masked() -> None:
    side = MaskedSide(settings("secagg"), LAYOUT, [])
    numbers, _ = side.numbers(WEIGHTS, 10, 30)
    turned, _ = side.numbers(dict(reversed(WEIGHTS.items())), 10, 30)
    np.testing.assert_array_equal(numbers, turned)


@pytest.mark.parametrize("number", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_is_not_encrypted_and_the_tensor_named(side, number) -> None:
    bad = {**WEIGHTS, "first.bias": np.array([0, number, 0, 0], np.float32)}
    with pytest.raises(ProtectionError, match=rf"first\.bias holds a number that is not finite \({number}\)"):
        side.seal(bad, 0, 10, 1, RUN, 30)
    with pytest.raises(ProtectionError, match=rf"first\.bias holds a number that is not finite \({number}\)"):
        MaskedSide(settings("secagg"), LAYOUT, []).numbers(bad, 10, 30)


@pytest.mark.parametrize("examples", [0, -3, 31])
def test_a_share_of_the_cohort_that_is_none_is_not_encrypted(side, examples) -> None:
    with pytest.raises(ProtectionError, match=rf"{examples} training examples are no share of the 30"):
        side.seal(WEIGHTS, 0, examples, 1, RUN, 30)


def test_a_model_in_the_clear_is_taken_once_at_the_very_beginning(side) -> None:
    given, seen = side.receive(to_arrays(WEIGHTS), RUN, 0, None)
    assert seen is None
    for name, value in WEIGHTS.items():
        np.testing.assert_array_equal(given[name], value)
    with pytest.raises(ProtectionError, match="the model of round 4 came without"):
        side.receive(to_arrays(WEIGHTS), RUN, 4, None)
    with pytest.raises(ProtectionError, match="only the first one may.*the newest is of round 2"):
        side.receive(to_arrays(WEIGHTS), RUN, 0, (2, bytes(32)))
