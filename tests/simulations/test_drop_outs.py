"""Clients that drop out, one or several, at every stage: the rest add up exactly, or too few are left and nothing is revealed."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
from flwr.app import Message
from helpers.protected import Sent, assert_goes_on, assert_same, assert_sums, blob_of, ended, small

from fedveil.core.errors import ProtectionError
from fedveil.core.wire.messages import BLOB, CONFIG


def silent(stage: str, clients: Iterable[int], number: int = 2, attempts: Iterable[int] = (0, 1, 2)) -> Any:
    """Clients whose replies of a stage are lost."""
    gone, lost = set(clients), set(attempts)

    def home(sent: Sent, reply: Message) -> Sequence[Message]:
        lose = (sent.stage, sent.round) == (stage, number) and sent.client in gone and sent.attempt in lost
        return [] if lose else [reply]

    return home


@pytest.mark.parametrize(("protection", "engine"), [("bfv", "sequential"), ("ckks", "batched")])
def test_an_aggregate_of_two_is_not_made(protection, engine, watched, honest) -> None:
    experiment = small(protection, engine=engine, data__clients=3, federation__cohort=3)
    seen = watched(experiment, home=silent("train", [1]))
    assert isinstance(seen.error, ProtectionError)
    assert str(seen.error).splitlines() == [
        "round 2: 2 clients sent an update that could be used, and an aggregate of fewer than privacy.protection.min_clients = 3 is not made",
        "  client 1: no answer in time",
        f"  kept: the model and metrics of rounds up to 1, in {seen.folder}",
    ]
    assert_goes_on(seen, experiment, watched, honest(experiment))


NOISE = {"privacy__clip": 1.0, "privacy__noise_multiplier": 1.0}


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize(
    ("protection", "noise_at", "engine", "gone"),
    [("bfv", "client", "sequential", [0, 1, 3]), ("ckks", "client", "batched", [0, 1, 3]), ("bfv", "distributed", "batched", [1])],
)  # fmt: skip
def test_with_noise_a_round_of_too_few_is_left_out_and_the_next_trains_the_same_model(
    protection, noise_at, engine, gone, number, watched
) -> None:
    """Distributed noise under BFV is sized for all of them: one that is missing is too few."""
    settings = {**NOISE, "privacy__noise_at": noise_at, "federation__rounds": 4, "engine": engine}
    seen = ended(watched(small(protection, **settings), home=silent("train", gone, number)))
    metrics = seen.table("metrics")
    assert metrics.clients.tolist()[1:] == [0 if k == number else 5 for k in range(1, 5)]
    before, after = metrics.test_loss[number - 1], metrics.test_loss[number]
    assert before == after
    assert metrics.test_loss.nunique() == 4
    assert (metrics.epsilon.diff()[2:] > 0).all()


STAGES = ("advertise", "share", "train", "reveal")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("clients", "gone", "engine"), [(5, [3], "sequential"), (8, [1, 6], "batched")])
def test_clients_drop_out_of_a_secure_aggregation_and_the_rest_add_up_exactly(
    clients, gone, stage, engine, watched
) -> None:
    experiment = small("secagg", engine=engine, data__clients=clients, federation__cohort=clients)
    seen = ended(watched(experiment, home=silent(stage, gone)))
    assert seen.failures == [f"2 {stage} {client}: no answer in time" for client in gone]
    # who was silent when shares were revealed is in the sum already
    left = set(range(clients)) - (set() if stage == "reveal" else set(gone))
    row = seen.table("metrics").loc[2]
    assert (row.clients, row.failures) == (len(left), len(gone))
    assert_sums(seen, experiment, 2, left)


@pytest.mark.parametrize("stage", STAGES)
def test_below_the_threshold_nothing_is_revealed_and_after_three_attempts_one_error_says_why(
    stage, watched, honest
) -> None:
    experiment, asked = small("secagg"), []

    def lose(sent: Sent, reply: Message) -> Sequence[Message]:
        if sent.round == 2:
            asked.append((sent.attempt, sent.stage))
        return silent(stage, [1, 3])(sent, reply)

    seen = watched(experiment, home=lose)
    assert isinstance(seen.error, ProtectionError)
    said = str(seen.error)
    assert said.startswith("round 2: ")
    assert f"kept: the model and metrics of rounds up to 1, in {seen.folder}" in said
    if stage == "reveal":  # shares were shown: another attempt could show others
        assert "after some shares were revealed" in said
        assert {attempt for attempt, _ in asked} == {0}
    else:
        assert "attempt 2, is abandoned, nothing was revealed: " in said
        assert re.search(r"came from 3 of 5 clients, and it takes 4 \(missing, counted from 0: 1, 3\)", said)
        assert {attempt for attempt, _ in asked} == {0, 1, 2}
        assert "reveal" not in {name for _, name in asked}
    assert f"client 1{'' if stage == 'train' else f', {stage}'}: no answer in time" in said
    assert_goes_on(seen, experiment, watched, honest(experiment))


@pytest.mark.parametrize(
    ("stage", "engine"),
    [
        ("advertise", "sequential"),
        ("share", "batched"),
        ("train", "sequential"),
        ("train", "batched"),
        ("train", "processes"),
    ],
)
def test_an_abandoned_attempt_is_followed_by_one_with_fresh_keys(stage, engine, watched, honest) -> None:
    experiment, sent_in = small("secagg", engine=engine), {}

    def lose(sent: Sent, reply: Message) -> Sequence[Message]:
        if sent.round == 2 and sent.stage in ("advertise", "train"):
            content = blob_of(reply) if sent.stage == "train" else reply.content[CONFIG][BLOB]
            sent_in[sent.stage, sent.attempt, sent.client] = content
        return silent(stage, [1, 3], attempts=[0])(sent, reply)

    seen = ended(watched(experiment, home=lose))
    assert seen.failures == [f"2 {stage} {client}: no answer in time" for client in (1, 3)]
    assert seen.warnings[2].startswith("round 2: abandoned with nothing revealed, and tried again: round 2, attempt 0,")
    row = seen.table("metrics").loc[2]
    assert (row.clients, row.failures) == (5, 3)
    assert_sums(seen, experiment, 2, range(5))
    assert_same(seen.models[1], honest(experiment).models[1])
    assert len(set(sent_in.values())) == len(sent_in)
    assert {(name, attempt) for name, attempt, _ in sent_in} >= {("advertise", 0), ("advertise", 1), ("train", 1)}


# --- the stages of secure aggregation, with bad bytes


BAD_BYTES: dict[str, tuple[Callable[[bytes, bytes], bytes], str]] = {
    "empty": (lambda content, _: b"", "0 bytes are no message"),
    "cut": (lambda content, _: content[:-1], "is cut off or out of order"),
    "too long": (lambda content, _: content + b"\0", "1 bytes too many"),
    "another": (lambda content, _: b"\xff" * len(content), "this is another message"),
    "replayed": (lambda _, before: before, "from another run, round or attempt than round"),
    "another client's": (lambda content, _: content[:37] + struct.pack(">Q", 0) + content[45:], "of client 0, not of"),
}


@pytest.mark.parametrize("stage", ["advertise", "share", "reveal"])
def test_bad_bytes_in_a_stage_drop_their_client_by_name(stage, watched) -> None:
    before, changes = [b""], list(BAD_BYTES.values())

    def home(sent: Sent, reply: Message) -> Sequence[Message]:
        if (sent.stage, sent.client) == (stage, 3):
            content = reply.content[CONFIG][BLOB]
            if sent.round > 1:  # one change a round, from the second on
                reply.content[CONFIG][BLOB] = changes[sent.round - 2][0](content, before[0])
            before[0] = content
        return [reply]

    seen = ended(watched(small("secagg", federation__rounds=1 + len(changes)), home=home))
    assert len(seen.failures) == len(changes)
    for number, (failure, (_, said)) in enumerate(zip(seen.failures, changes, strict=True), start=2):
        assert failure.startswith(f"{number} {stage} 3: round {number}, attempt 0, client 3, ")
        assert said in failure
    assert seen.table("metrics").clients.tolist()[2:] == [5 if stage == "reveal" else 4] * len(changes)


@pytest.mark.parametrize("protection", ["secagg", "bfv"])
def test_a_sum_of_fewer_clients_than_a_budget_has_noise_for_is_not_made(protection, watched) -> None:
    """Clients add noise for sums of five; the last round's of four would pass the budget."""
    noise = {"privacy__clip": 1.0, "privacy__epsilon": 5.0, "privacy__noise_at": "client"}
    experiment = small(protection, federation__rounds=2, **noise)
    seen = watched(experiment, home=silent("train", [3]))
    spent = seen.table("metrics").epsilon
    assert spent.max() <= 5.0
    assert_same(seen.models[1], seen.models[0])
    assert any("would spend more than privacy.epsilon = 5" in warning for warning in seen.warnings)
