"""A server that shows its clients different runs: who signs what, and what each client then does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from trust.liar import DeployedClient, Refused

from fedveil.client.node.trainer import ClientProfile
from fedveil.core.settings.experiment import Experiment
from fedveil.core.settings.sections import Privacy
from fedveil.core.wire.messages import MANIFEST, SIGNATURES
from fedveil.privacy.homomorphic.keys import write_keys
from fedveil.privacy.trust.identity import load_signer
from fedveil.privacy.trust.key_folders import IDENTITY, load_registry, new_parties
from fedveil.privacy.trust.manifest import Manifest, now, sign, write_signatures

CLIENTS = 5
RUN = "ab" * 16
WORLD = Experiment.preset("digits").override(
    {"data.clients": CLIENTS, "federation.cohort": CLIENTS, "federation.rounds": 2}
)
OTHER = WORLD.override({"training.max_grad_norm": 1e-30})  # what empties everybody else's update


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> Path:
    """The keys of five clients."""
    folder = tmp_path_factory.mktemp("keys") / "keys"
    write_keys(folder, None, CLIENTS, new_parties(CLIENTS, Privacy()))
    return folder


def clients(keys: Path, **settings: Any) -> list[DeployedClient]:
    """Five clients whose server sends them these settings."""
    given = {"experiment": WORLD.toml(), "words": ""} | settings
    return [
        DeployedClient(ClientProfile(k, f"digits:{k + 1}/{CLIENTS}", str(keys / f"client-{k + 1}")), dict(given))
        for k in range(CLIENTS)
    ]


def manifest(keys: Path, experiment: Experiment = WORLD, words: str = "", **changes: Any) -> Manifest:
    """The manifest of a run, with changes that its server makes to it."""
    made = Manifest.of(
        RUN, experiment.toml(), words, load_registry(keys / "server") or {}, reproducible=False, created=now()
    )
    return made.model_copy(update=changes)


def signature(client: DeployedClient, shown: Manifest) -> bytes:
    """A client's signature of what it is shown; raise Refused where it gives none."""
    return bytes(client.ask("query.manifest", config={MANIFEST: shown.content})["config"][SIGNATURES])


def greet(client: DeployedClient, shown: Manifest, signatures: Mapping[int, bytes]) -> dict[str, Any]:
    """What a client tells of its data, greeted with a manifest and signatures of it."""
    reply = client.ask("query", config={MANIFEST: shown.content, SIGNATURES: write_signatures(signatures)})
    return dict(reply["metrics"])


def why(client: DeployedClient, error: pytest.ExceptionInfo[Refused]) -> str:
    """All that the operator of a client reads of a refusal."""
    return " ".join(error.value.said)


def test_an_honest_server_gets_signatures_and_then_answers(keys) -> None:
    here, shown = clients(keys), manifest(keys)
    signed = {k: signature(client, shown) for k, client in enumerate(here)}
    assert greet(here[4], shown, {k: signed[k] for k in range(3)})["num-examples"] > 200
    assert greet(here[0], shown, signed)["client"] == 0
    assert signature(here[0], shown)  # asked again by a server that was started anew


def test_nothing_is_told_before_more_than_half_have_signed(keys) -> None:
    here, shown = clients(keys), manifest(keys)
    signed = {k: signature(here[k], shown) for k in (0, 1)}
    with pytest.raises(Refused) as error:
        greet(here[0], shown, signed)
    assert "2 of 5 registered clients signed" in why(here[0], error)
    for kind in ("query", "train", "evaluate", "query.advertise"):
        with pytest.raises(Refused) as error:
            here[2].ask(kind, config={"server-round": 1, "learning-rate": 0.1})
        assert "manifest" in why(here[2], error)


def test_two_worlds_cannot_both_have_a_majority(keys) -> None:
    one, two = clients(keys)[:3], clients(keys, experiment=OTHER.toml())[3:]
    first, second = manifest(keys), manifest(keys, OTHER)
    signed = {k: signature(client, first) for k, client in enumerate(one)}
    others = {3 + k: signature(client, second) for k, client in enumerate(two)}
    greet(one[0], first, signed)  # the larger world goes on; it is a run of its own
    for given, said in (
        (others, "2 of 5 registered clients signed"),
        (others | {0: signed[0]}, "client-1's signature is not of this manifest"),
    ):
        with pytest.raises(Refused) as error:
            greet(two[0], second, given)
        assert said in why(two[0], error)


def test_settings_and_words_that_are_not_those_of_the_manifest_are_named(keys) -> None:
    shown = manifest(keys)
    emptied = clients(keys, experiment=OTHER.toml())[0]
    with pytest.raises(Refused) as error:
        signature(emptied, shown)
    assert "training.max_grad_norm is None in the manifest and 1e-30 here" in why(emptied, error)
    probed = clients(keys, words="viagra\nprobe")[0]
    with pytest.raises(Refused) as error:
        signature(probed, shown)
    assert "the words that came with the run are others" in why(probed, error)
    repeated = clients(keys, reproducible="yes")[0]
    with pytest.raises(Refused) as error:
        signature(repeated, shown)
    assert "reproducible is False in the manifest and True here" in why(repeated, error)


def test_settings_that_change_after_the_agreement_are_refused(keys) -> None:
    here, shown = clients(keys), manifest(keys)
    signed = {k: signature(client, shown) for k, client in enumerate(here)}
    greet(here[0], shown, signed)
    with pytest.raises(Refused) as error:
        here[0].ask("train", config={"server-round": 1, "learning-rate": 0.1}, experiment=OTHER.toml())
    assert "training.max_grad_norm" in why(here[0], error)
    with pytest.raises(Refused) as error:
        here[0].ask("train", config={"server-round": 1, "learning-rate": 0.1, "run": b"another run 1234"})
    assert "another run" in why(here[0], error)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cohort": 4}, "cohort is 4 in the manifest and 5 here"),
        ({"least": 2}, "least is 2 in the manifest and 1 here"),
        ({"protection": "secagg"}, "protection is 'secagg'"),
        ({"budget": "noise multiplier 9"}, "budget is 'noise multiplier 9'"),
        ({"code": "0" * 64}, "the server's FedVeil has other code"),
        ({"clients": "0" * 64}, "the registry of clients' keys is another"),
        ({"expires": now() + timedelta(days=3650)}, "expires is"),
        ({"created": now() + timedelta(hours=2)}, "set the clocks of both machines"),
        ({"created": now() - timedelta(days=90)}, "expired on"),
    ],
)
def test_a_manifest_that_was_edited_is_foreign_or_is_not_valid_now_is_not_signed(keys, changes, said) -> None:
    client = clients(keys)[0]
    made = manifest(keys, **changes)
    if "created" in changes:  # its dates agree with each other
        made = Manifest.of(RUN, WORLD.toml(), "", load_registry(keys / "server") or {}, reproducible=False, **changes)
    with pytest.raises(Refused) as error:
        signature(client, made)
    assert said in why(client, error)


def test_signatures_of_strangers_and_of_another_manifest_do_not_count(keys, tmp_path) -> None:
    here, shown = clients(keys), manifest(keys)
    signed = {k: signature(here[k], shown) for k in (0, 1)}
    write_keys(tmp_path / "foreign", None, 3, new_parties(3, Privacy()))
    stranger = sign(shown, load_signer(tmp_path / "foreign" / "client-3" / IDENTITY))
    later = manifest(keys, run="cd" * 16)
    for forged, said in (
        ({2: stranger}, "client-3's signature is not of this manifest"),
        ({7: stranger}, "client-8 signed the run's manifest, and is not registered"),
        ({2: signature(here[2], later)}, "client-3's signature is not of this manifest"),
        ({2: b""}, "client-3's signature is not of this manifest"),
    ):
        with pytest.raises(Refused) as error:
            greet(here[0], shown, signed | forged)
        assert said in why(here[0], error)


def test_a_run_has_one_manifest(keys) -> None:
    here, shown = clients(keys), manifest(keys)
    greet(here[0], shown, {k: signature(client, shown) for k, client in enumerate(here)})
    later = manifest(keys, created=shown.created - timedelta(hours=1), expires=shown.expires - timedelta(hours=1))
    with pytest.raises(Refused) as error:
        signature(here[1], later)
    assert "a second signature of this run" in why(here[1], error)
    signed = {k: signature(client, later) for k, client in enumerate(clients(keys))}  # they collude, or forgot
    with pytest.raises(Refused) as error:
        greet(here[0], later, signed)
    assert "a second manifest of this run" in why(here[0], error)


def test_what_a_server_is_told_of_a_refusal_is_nothing_of_this_client(keys) -> None:
    client, shown = clients(keys)[0], manifest(keys, cohort=4)
    with pytest.raises(Refused) as error:
        signature(client, shown)
    assert str(keys) not in error.value.reason
    with pytest.raises(Refused) as error:
        client.ask("query.manifest", config={MANIFEST: json.dumps({"run": RUN}).encode()})
    assert "cannot be read" in why(client, error)
