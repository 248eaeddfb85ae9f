"""A client's side of a protection, without a server: what it refuses to encrypt or mask, and what order does not change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedveil import Experiment
from fedveil.client.learning.homomorphic import HomomorphicClient, Terms
from fedveil.client.learning.secagg import SecAggClients
from fedveil.core.errors import ProtectionError
from fedveil.core.wire.messages import to_arrays, to_sealed
from fedveil.privacy.fixed_point import Layout
from fedveil.privacy.homomorphic.keys import SERVER, load_server, write_keys
from fedveil.privacy.homomorphic.lattice import Adder
from fedveil.privacy.homomorphic.mac import Tally, model_digest, settings_digest
from fedveil.privacy.homomorphic.wire import expect, read, write
from fedveil.privacy.plan import make_lattice, make_plan

RNG = np.random.default_rng(5)
WEIGHTS = {
    "first.weight": RNG.normal(size=(4, 3)).astype(np.float32),
    "first.bias": RNG.normal(size=4).astype(np.float32),
}
LAYOUT, RUN = Layout.of(WEIGHTS), bytes(range(16))
TERMS = Terms(1, RUN, 30, model_digest(WEIGHTS, LAYOUT), settings_digest({"learning-rate": 0.1}))


def settings(protection: str) -> Experiment:
    return Experiment(data={"clients": 3}, federation={"cohort": 3}, privacy={"protection": protection})


@pytest.fixture(params=["bfv", "ckks"])
def side(request, tmp_path) -> HomomorphicClient:
    """The clients' side of three that share a key, in the folder "keys"."""
    experiment = settings(request.param)
    write_keys(tmp_path / "keys", make_lattice(experiment.privacy), 1)
    return HomomorphicClient(make_plan(experiment.privacy, 3), 3, LAYOUT, tmp_path / "keys" / "client-1" / "client.key")


def aggregate(side: HomomorphicClient, folder: Path, weights: dict[str, np.ndarray]) -> bytes:
    """The aggregate of round 1, of three clients that send the same weights, each with 10 examples."""
    context = load_server(folder / "keys" / "server" / SERVER)
    adder, tally = Adder(context, side.plan), Tally(context.ring)
    for client in range(3):
        blob = side.seal((weights, None), client, 10, TERMS).blob
        wanted = expect(
            "upload", side.plan, context,
            run=RUN, round=1, layout=LAYOUT, client=client, reference=30, model=TERMS.model, settings=TERMS.settings,
        )  # fmt: skip
        header, body, proof = read(blob, wanted)
        adder.add(body, header.form, header.seeded)
        tally.add(proof)
    header = replace(header, kind="aggregate", client=0, seeded=False, clients=3, examples=30, nonce=bytes(16))
    return write(header, adder.total(), tally.proof())


def test_the_order_in_which_weights_are_named_changes_nothing_that_is_encrypted(side, tmp_path) -> None:
    opened = side.open(aggregate(side, tmp_path, WEIGHTS), RUN, 1)
    turned = side.open(aggregate(side, tmp_path, dict(reversed(WEIGHTS.items()))), RUN, 1)
    for name, value in WEIGHTS.items():
        np.testing.assert_array_equal(opened[name], turned[name])
        np.testing.assert_allclose(opened[name], value, atol=3 * side.plan.rounding)


def test_the_newest_aggregate_is_not_taken_for_the_next_rounds(side, tmp_path) -> None:
    model = to_sealed(aggregate(side, tmp_path, WEIGHTS), side.plan.protection)
    _, seen = side.receive(model, RUN, 1, None)
    side.receive(model, RUN, 1, seen)  # the same again, as a server sends it that was killed
    with pytest.raises(ProtectionError, match="with round 1, where round 2 was expected"):
        side.receive(model, RUN, 2, seen)
    with pytest.raises(ProtectionError, match=r"with run .*, where run .* was expected"):
        side.receive(model, bytes(16), 1, None)
    with pytest.raises(ProtectionError, match="the server sent a second aggregate of round 1, or an old one"):
        side.receive(to_sealed(aggregate(side, tmp_path, WEIGHTS), side.plan.protection), RUN, 1, seen)


def test_the_order_in_which_weights_are_named_changes_nothing_that_is_masked() -> None:
    side = SecAggClients(settings("secagg"), LAYOUT)
    numbers, _ = side.numbers((WEIGHTS, None), 10, 30)
    turned, _ = side.numbers((dict(reversed(WEIGHTS.items())), None), 10, 30)
    np.testing.assert_array_equal(numbers, turned)


@pytest.mark.parametrize("number", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_is_not_encrypted_and_the_tensor_named(side, number) -> None:
    bad = {**WEIGHTS, "first.bias": np.array([0, number, 0, 0], np.float32)}
    with pytest.raises(ProtectionError, match=rf"first\.bias holds a number that is not finite \({number}\)"):
        side.seal((bad, None), 0, 10, TERMS)
    with pytest.raises(ProtectionError, match=rf"first\.bias holds a number that is not finite \({number}\)"):
        SecAggClients(settings("secagg"), LAYOUT).numbers((bad, None), 10, 30)


@pytest.mark.parametrize("examples", [0, -3, 31])
def test_a_share_of_the_cohort_that_is_none_is_not_encrypted(side, examples) -> None:
    with pytest.raises(ProtectionError, match=rf"{examples} training examples are no share of the 30"):
        side.seal((WEIGHTS, None), 0, examples, TERMS)


def test_a_model_in_the_clear_is_taken_once_at_the_very_beginning(side) -> None:
    given, seen = side.receive(to_arrays(WEIGHTS), RUN, 0, None)
    assert seen == (0, model_digest(WEIGHTS, LAYOUT))
    side.receive(to_arrays(WEIGHTS), RUN, 0, seen)  # the same again
    with pytest.raises(ProtectionError, match="a second aggregate of round 0"):
        side.receive(to_arrays({name: value + 1 for name, value in WEIGHTS.items()}), RUN, 0, seen)
    with pytest.raises(ProtectionError, match="a first model of another network"):
        side.receive(to_arrays({"first.weight": WEIGHTS["first.weight"]}), RUN, 0, None)
    for name, value in WEIGHTS.items():
        np.testing.assert_array_equal(given[name], value)
    with pytest.raises(ProtectionError, match="the model of round 4 came without"):
        side.receive(to_arrays(WEIGHTS), RUN, 4, None)
    with pytest.raises(ProtectionError, match=r"only the first one may.*the newest is of round 2"):
        side.receive(to_arrays(WEIGHTS), RUN, 0, (2, bytes(32)))
