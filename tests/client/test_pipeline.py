"""A client's work is told once: a step, a transform or an adversary from outside acts on every engine and on a deployed client."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

from fedveil import Experiment, run
from fedveil.client.app import Runtimes, client_app
from fedveil.client.learning import pipeline
from fedveil.client.learning.contribution import Contributions
from fedveil.client.learning.pipeline import Step
from fedveil.client.learning.runtime import ClientRuntime
from fedveil.client.learning.states import ContextStates, StateKey
from fedveil.client.node.policy import Policy
from fedveil.core.wire.messages import from_arrays, to_arrays
from fedveil.models.parameters import get, to_numpy

SMALL = {
    "data.clients": 6, "federation.cohort": 4, "federation.rounds": 2, "training.epochs": 1, "model.hidden": [8],
    "workers": 2,
}  # fmt: skip
COUNT = StateKey("visits")
Arrays = Mapping[str, np.ndarray]


def small(**settings: Any) -> Experiment:
    changes = SMALL | {key.replace("__", "."): value for key, value in settings.items()}
    if changes.get("engine") == "sequential":
        changes["workers"] = 1
    return Experiment.preset("digits").override(changes)


def zero_biases(_runtime: ClientRuntime, contributions: Contributions) -> None:
    """A step: every bias that leaves is zero."""
    for name, rows in contributions.weights.items():
        if name.endswith("bias"):
            rows[:] = 0


def count_visits(_runtime: ClientRuntime, contributions: Contributions) -> None:
    """A step with state: the first bias says how often this client has trained."""
    for k in range(len(contributions.clients)):
        before = contributions.states[COUNT.name][k]
        visits = 1 if before is None else int(before["visits"]) + 1
        contributions.states[COUNT.name][k] = {"visits": np.array(visits)}
        contributions.weights["dense1.bias"][k] = visits


def halve(update: dict[str, np.ndarray], _generator: np.random.Generator) -> dict[str, np.ndarray]:
    """A transform: half of the update."""
    return {name: value / 2 for name, value in update.items()}


def with_step(monkeypatch: pytest.MonkeyPatch, step: Step, after: str) -> None:
    place = next(i for i, known in enumerate(pipeline.STEPS) if known.name == after) + 1
    monkeypatch.setattr(pipeline, "STEPS", [*pipeline.STEPS[:place], step, *pipeline.STEPS[place:]])


def deployed(experiment: Experiment, rounds: int = 1) -> list[dict[str, np.ndarray]]:
    """What a client on a machine of its own sends, round after round, in its own process with its own context."""
    app, state = client_app(Runtimes()), RecordDict()
    runtime = pipeline_runtime(experiment)
    sent = []
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr("fedveil.client.app.policy_of", lambda _context: Policy(reproducible="allow"))
    for number in range(1, rounds + 1):
        context = Context(
            1, 7, {"partition-id": 1, "data": "digits:2/6", "keys": "", "policy": ""}, state,
            {"experiment": experiment.toml(), "words": "", "reproducible": "yes"},
        )  # fmt: skip
        config = ConfigRecord({"server-round": number, "learning-rate": 0.1})
        content = RecordDict({"arrays": to_arrays(to_numpy(get(runtime.network))), "config": config})
        message = Message(content, dst_node_id=7, message_type="train")
        message.metadata.__dict__["_message_id"] = str(number)
        reply = app(message, context)
        assert not reply.has_error(), reply.error
        sent.append(from_arrays(reply.content["arrays"]))
    monkeypatch.undo()
    return sent


def pipeline_runtime(experiment: Experiment) -> ClientRuntime:
    from fedveil.client.learning.runtime import client_runtime

    return client_runtime(experiment.toml())


@pytest.mark.parametrize("where", ["anywhere", "home", "together"])
@pytest.mark.parametrize("engine", ["batched", "processes", "sequential"])
def test_a_step_from_outside_acts_on_every_engine(engine, where, monkeypatch, tmp_path) -> None:
    with_step(monkeypatch, Step("zero biases", zero_biases, where), "train")
    result = run(small(engine=engine), out=tmp_path / "run", plots=False)
    for name, value in result.model.state_dict().items():
        assert bool((value == 0).all()) == name.endswith("bias"), name


def test_a_step_from_outside_acts_on_a_deployed_client(monkeypatch) -> None:
    assert deployed(small())[0]["dense1.bias"].any()
    with_step(monkeypatch, Step("zero biases", zero_biases), "train")
    (sent,) = deployed(small())
    assert not sent["dense1.bias"].any()
    assert sent["dense1.weight"].any()


@pytest.mark.parametrize("where", ["anywhere", "home"])
@pytest.mark.parametrize("engine", ["batched", "processes", "sequential"])
def test_a_step_finds_what_it_kept_of_each_client(engine, where, monkeypatch, tmp_path) -> None:
    """With everybody in every round, the mean of the visits is the round."""
    with_step(monkeypatch, Step("count", count_visits, where, COUNT), "train")
    experiment = small(engine=engine, federation__cohort=6, federation__rounds=3)
    result = run(experiment, out=tmp_path / "run", plots=False)
    np.testing.assert_allclose(result.model.state_dict()["dense1.bias"].numpy(), 3, rtol=1e-6)


def test_a_deployed_client_finds_what_it_kept_in_its_context(monkeypatch) -> None:
    with_step(monkeypatch, Step("count", count_visits, keeps=COUNT), "train")
    assert [float(sent["dense1.bias"][0]) for sent in deployed(small(federation__rounds=3), rounds=3)] == [1, 2, 3]
    records = RecordDict()
    ContextStates(records).put(1, COUNT, {"visits": np.array(5)})
    assert ContextStates(records).get(1, COUNT)["visits"] == 5


@pytest.mark.parametrize("engine", ["batched", "processes", "sequential"])
def test_a_transform_from_outside_acts_on_every_engine_and_on_a_deployed_client(engine, monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(sys.modules, "tests_transform", sys.modules[__name__])
    settings = {"engine": engine, "federation__rounds": 1}
    plain = run(small(**settings), out=tmp_path / "plain", plots=False)
    half = run(small(**settings, privacy__defence="tests_transform:halve"), out=tmp_path / "half", plots=False)
    start = to_numpy(get(pipeline_runtime(small()).network))
    for name, value in plain.model.state_dict().items():
        wanted = start[name] + (value.numpy() - start[name]) / 2
        np.testing.assert_allclose(half.model.state_dict()[name].numpy(), wanted, atol=1e-6)
    (full,), (sent,) = deployed(small()), _deployed_with_code(small(privacy__defence="tests_transform:halve"), tmp_path)
    for name, value in full.items():
        np.testing.assert_allclose(sent[name], start[name] + (value - start[name]) / 2, atol=1e-6)


def _deployed_with_code(experiment: Experiment, folder: Any) -> list[dict[str, np.ndarray]]:
    """As `deployed`, of a client whose owner's policy does not stand in the way of code that the settings name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedveil.client.node.policy.Policy.check", lambda _policy, _experiment: None)
        return deployed(experiment)


@pytest.mark.parametrize("engine", ["batched", "processes", "sequential"])
@pytest.mark.parametrize("protection", ["none", "secagg", "bfv"])
def test_an_adversary_sees_and_changes_all_contributions_of_a_cohort_before_they_are_protected(
    engine, protection, tmp_path
) -> None:
    seen: list[list[int]] = []

    def lie(contributions: Contributions) -> None:
        """The first of the cohort sends the opposite of the others' mean move."""
        seen.append(sorted(contributions.clients))
        for name, rows in contributions.weights.items():
            rows[0] = 2 * contributions.given[name] - rows[1:].mean(0)

    experiment = small(engine=engine, privacy__protection=protection)
    result = run(experiment, out=tmp_path / "run", plots=False, adversary=lie)
    honest = run(experiment, out=tmp_path / "honest", plots=False)
    assert [len(cohort) for cohort in seen] == [4, 4]
    assert seen[0] == sorted(result.clients.query("round == 1").client)
    assert result.summary["model_sha256"] != honest.summary["model_sha256"]
    assert float(result.metrics.train_loss.iloc[-1]) > float(honest.metrics.train_loss.iloc[-1])
