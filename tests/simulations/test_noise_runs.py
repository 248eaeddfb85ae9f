"""Runs with clipping, noise and defences: the noise that is accounted for is in the model, on every engine, and nothing is told beside it."""

from __future__ import annotations

import itertools
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp.strategy import FedAvg
from helpers.kills import content
from safetensors.numpy import load_file

from fedveil import Experiment, Result, SettingsError, run
from fedveil.client.app import Runtimes, app, client_app
from fedveil.core.errors import Interrupted
from fedveil.core.randomness import Stream
from fedveil.core.record.record import Record
from fedveil.core.wire.messages import to_arrays
from fedveil.datasets.federated import load
from fedveil.models.local.training import train_clients
from fedveil.models.networks.build import build
from fedveil.models.parameters import get, to_numpy
from fedveil.privacy.dp.accounting.accountants import gaussian_epsilon
from fedveil.privacy.dp.noise import norm
from fedveil.server.checkpoint import load_state
from fedveil.server.federation import federate, prepare, resolve
from fedveil.server.rounds.captures import read_captures
from fedveil.server.rounds.context import Hooks
from fedveil.simulations.engine.grid import InProcessGrid

SIMULATED = client_app(Runtimes(simulating=True))  # as an engine makes it
NOISY = {"privacy.clip": 1.0, "privacy.noise_multiplier": 0.05}
Weights = dict[str, np.ndarray]


def small(**settings: Any) -> Experiment:
    """Six clients of unequal sizes, four a round, two rounds."""
    few = {"data.clients": 6, "federation.cohort": 4, "federation.rounds": 2, "training.epochs": 1}
    unequal = {"data.partition": "quantity", "data.min_examples": 20, "engine": "sequential"}
    return Experiment.preset("digits").override({**few, **unequal, **settings})


def first(experiment: Experiment) -> Weights:
    return to_numpy(get(build(load(experiment.data, experiment.seed).dataset.task, experiment.model, Stream(0))))


def trained(experiment: Experiment, client: int, given: Weights, number: int) -> Weights:
    """What a client makes of a model, by the training function alone."""
    network = build(load(experiment.data, experiment.seed).dataset.task, experiment.model, Stream(0))
    examples, _ = load(experiment.data, experiment.seed).client(client)
    import torch

    made = train_clients(
        network, {name: torch.from_numpy(value) for name, value in given.items()}, [examples], experiment.training,
        experiment.training.learning_rate, [Stream(experiment.seed, number, client)], classes=10,
    )  # fmt: skip
    return {name: value[0].numpy() for name, value in made.parameters.items()}


def model(result: Result) -> Weights:
    return load_file(result.run_dir / "model.safetensors")


def change(after: Weights, before: Weights) -> Weights:
    return {name: value.astype(np.float64) - before[name] for name, value in after.items()}


def flat(parameters: Weights) -> np.ndarray:
    return np.concatenate([value.reshape(-1) for value in parameters.values()])


@pytest.mark.parametrize(("protection", "noise_at"), [("none", "client"), ("secagg", "server"), ("bfv", "client")])
def test_processes_give_the_bytes_of_one_by_one(protection, noise_at, tmp_path) -> None:
    settings = {**NOISY, "privacy.protection": protection, "privacy.noise_at": noise_at, "privacy.defence": "prune"}
    one = run(small(**settings), out=tmp_path / "one")
    many = run(small(**settings, engine="processes", workers=2), out=tmp_path / "many")
    for name in ("model.safetensors", "metrics.csv", "clients.csv"):
        assert (one.run_dir / name).read_bytes() == (many.run_dir / name).read_bytes()


def test_all_at_once_agrees_to_rounding(tmp_path) -> None:
    one, batched = (model(run(small(**NOISY, engine=e), out=tmp_path / e)) for e in ("sequential", "batched"))
    for name, value in one.items():
        np.testing.assert_allclose(batched[name], value, atol=1e-4)


@pytest.mark.parametrize("protection", ["none", "secagg", "ckks"])
def test_clients_noise_in_the_mean_has_the_size_that_is_accounted_for(protection, tmp_path) -> None:
    """sigma / sqrt(K) of N(0, sigma^2) each: with an update of next to nothing, the model moves by noise alone."""
    still = {"training.learning_rate": 1e-12, "federation.rounds": 1, "data.clients": 4}
    experiment = small(**still, **{**NOISY, "privacy.noise_multiplier": 0.2, "privacy.protection": protection})
    moved = flat(change(model(run(experiment, out=tmp_path / "run")), first(experiment)))
    assert abs(moved.std() / (0.2 / math.sqrt(4)) - 1) < 5 / math.sqrt(2 * moved.size)
    assert abs(moved.mean()) < 5 * moved.std() / math.sqrt(moved.size)


@pytest.mark.parametrize("protection", ["none", "secagg"])
def test_the_servers_noise_in_the_mean_has_the_size_that_is_accounted_for(protection, tmp_path) -> None:
    still = {"training.learning_rate": 1e-12, "federation.rounds": 1, "data.clients": 4}
    experiment = small(**still, **NOISY, **{"privacy.noise_at": "server", "privacy.protection": protection})
    moved = flat(change(model(run(experiment, out=tmp_path / "run")), first(experiment)))
    assert abs(moved.std() / (0.05 / 4) - 1) < 5 / math.sqrt(2 * moved.size)


@pytest.mark.parametrize(("protection", "noise_at"), [("none", "client"), ("none", "server"), ("secagg", "server")])
def test_clients_weigh_alike_whatever_they_hold(protection, noise_at, tmp_path) -> None:
    """With next to no noise the model is the plain mean of clipped updates, and not the one by examples."""
    settings = {"privacy.clip": 0.5, "privacy.noise_multiplier": 1e-9, "privacy.noise_at": noise_at}
    everybody = {"federation.cohort": 6, "federation.rounds": 1, "privacy.protection": protection}
    experiment = small(**settings, **everybody)
    given = first(experiment)
    assert len({len(load(experiment.data, 0).client(client)[0]) for client in range(6)}) == 6
    updates = [change(trained(experiment, client, given, 1), given) for client in range(6)]
    assert min(norm(update) for update in updates) > 0.5
    made = change(model(run(experiment, out=tmp_path / "run")), given)
    for name, value in made.items():
        wanted = sum(update[name] * (0.5 / norm(update)) for update in updates) / 6
        np.testing.assert_allclose(value, wanted, atol=3e-7)


def test_the_server_clips_what_came_longer_than_it_should(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(
        "fedveil.client.learning.transforms.defend", lambda _privacy, _given, weights, _stream, secret: weights
    )
    settings = {"privacy.clip": 0.01, "privacy.noise_multiplier": 1e-6, "privacy.noise_at": "server"}
    experiment = small(**settings, **{"federation.rounds": 1})
    made = change(model(run(experiment, out=tmp_path / "run")), first(experiment))
    assert norm(made) <= 0.01 * 1.001


@pytest.mark.parametrize("encoding", ["float16", "int8"])
def test_noise_goes_before_the_encoding(encoding, tmp_path) -> None:
    everybody = {**NOISY, "federation.cohort": 6}  # int8 is refused where clients are sampled
    experiment = small(**everybody, **{"communication.encoding": encoding})
    plain = model(run(small(**everybody), out=tmp_path / "plain"))
    made = model(run(experiment, out=tmp_path / encoding))
    assert max(float(np.abs(made[name] - plain[name]).max()) for name in plain) < 0.05


def test_a_pruned_update_is_sent_whole(tmp_path) -> None:
    """Which numbers are left out would tell what an update is about."""
    pruned = run(small(**{"privacy.defence": "prune", "federation.capture": True}), out=tmp_path / "pruned")
    plain = run(small(), out=tmp_path / "plain")
    assert pruned.summary["bytes_up"] == plain.summary["bytes_up"]
    captured = read_captures(pruned.run_dir)[0]
    for update in captured.updates.values():
        assert update.weights is not None
        assert 0.89 < np.mean(flat(change(update.weights, captured.before)) == 0) < 0.92


@pytest.mark.parametrize("protection", ["none", "secagg"])
def test_clients_tell_nothing_of_their_data_beside_a_noisy_update(protection, tmp_path) -> None:
    settings = {**NOISY, "privacy.protection": protection, "federation.capture": True}
    result = run(small(**settings), out=tmp_path / "run")
    sealing = {"clipped", "seal-seconds", "open-seconds"} if protection == "secagg" else set()
    told = [update.metrics for captured in read_captures(result.run_dir) for update in captured.updates.values()]
    assert len(told) == 8
    for metrics in told:
        assert set(metrics) == {"client", "num-examples", "seconds"} | sealing
        assert metrics["num-examples"] == 1
    assert result.clients[["examples", "steps", "train_loss"]].isna().all(axis=None)
    assert result.metrics.train_loss.isna().all()


def test_epsilon_stands_in_the_metrics_and_the_summary_with_its_unit(tmp_path) -> None:
    result = run(small(**{**NOISY, "privacy.noise_multiplier": 2.0, "federation.cohort": 6}), out=tmp_path / "run")
    wanted = [gaussian_epsilon(2.0, rounds, 1e-5) for rounds in (1, 2)]
    assert result.metrics.epsilon.tolist()[1:] == wanted
    assert math.isnan(result.metrics.epsilon[0])
    assert result.metrics.epsilon_sum.tolist()[1:] == [gaussian_epsilon(2 * math.sqrt(5), r, 1e-5) for r in (1, 2)]
    said = result.summary
    assert (said["epsilon"], said["delta"], said["epsilon_unit"]) == (wanted[1], 1e-5, "one client's whole data")
    assert "against the server" in said["epsilon_against"]["epsilon"]
    assert said["noise"].startswith("from the seed")
    assert json.loads((result.run_dir / "noise.json").read_text())["noise"] == said["noise"]


def test_a_client_that_is_not_asked_again_spends_nothing(tmp_path) -> None:
    result = run(small(**{**NOISY, "privacy.noise_multiplier": 2.0}), out=tmp_path / "run")
    rounds = result.clients.groupby("client")["round"].count().max()
    assert result.summary["epsilon"] == gaussian_epsilon(2.0, int(rounds), 1e-5)


@pytest.mark.parametrize("settings", [{}, {"privacy.clip": 1.0}], ids=["nothing", "clipping alone"])
def test_without_noise_nothing_is_called_differential_privacy(settings, tmp_path) -> None:
    result = run(small(**settings, **{"federation.rounds": 1}), out=tmp_path / "run")
    assert not [name for name in result.metrics if name.startswith("epsilon")]
    assert not [name for name in result.summary if name.startswith(("epsilon", "delta", "noise"))]


@pytest.mark.parametrize("noise_at", ["client", "server"])
def test_a_run_that_was_cut_off_ends_as_if_it_had_not_been(noise_at, tmp_path) -> None:
    experiment = small(**NOISY, **{"privacy.noise_at": noise_at, "federation.rounds": 3})
    whole = run(experiment, out=tmp_path / "whole").run_dir
    folder = tmp_path / "cut"
    resolved = resolve(experiment)
    record = Record.create(resolved, folder)

    def stop(_row: Any, state: Any) -> None:
        if state.round == 2:
            raise Interrupted("stopped")

    federation = prepare(resolved)
    with pytest.raises(Interrupted):
        federate(federation, grid(resolved), record, Hooks(stop, federation.evaluate))
    run(experiment, resume=folder)
    for name in ("model.safetensors", "metrics.csv"):
        assert content(folder)[name] == content(whole)[name]


def grid(experiment: Experiment) -> InProcessGrid:
    return InProcessGrid(SIMULATED, experiment.data.clients, {"experiment": experiment.toml(), "keys": ""})


def test_on_other_machines_the_servers_noise_and_whom_it_draws_are_nobodys_to_repeat(tmp_path) -> None:
    settings = {"privacy.noise_at": "server", "data.clients": 40, "federation.cohort": 3, "data.min_examples": 1}
    experiment = resolve(small(**NOISY, **settings))
    made = []
    for name in ("one", "two"):
        federation, record = prepare(experiment), Record.create(experiment, tmp_path / name)
        federate(federation, grid(experiment), record, Hooks(lambda _row, _state: None, secret=True))
        made.append((pd.read_csv(record.path("clients.csv")).client.tolist(), flat(federation.state.parameters)))
    assert made[0][0] != made[1][0]  # the same six of forty, by chance: once in 10^7
    assert (made[0][1] != made[1][1]).all()


def test_an_update_that_may_have_been_seen_is_counted_before_it_is_asked_for(tmp_path) -> None:
    """A server that is killed in a round asks again with fresh noise: two updates of one round were seen."""
    experiment = resolve(small(**NOISY, **{"federation.cohort": 6, "federation.rounds": 1}))
    record = Record.create(experiment, tmp_path / "run")

    class Killed(InProcessGrid):
        def answers(self, messages: Any, timeout: float | None = None) -> Any:
            raise KeyboardInterrupt

    killed = Killed(SIMULATED, 6, {"experiment": experiment.toml()})
    with pytest.raises(KeyboardInterrupt):
        federate(prepare(experiment), killed, record, Hooks(lambda _row, _state: None, secret=True))
    state, _ = load_state(record)
    assert state.asked == dict.fromkeys(range(6), 1)
    federation = prepare(experiment, Record(tmp_path / "run"))
    rows: list[dict[str, Any]] = []
    federate(federation, grid(experiment), record, Hooks(lambda row, _state: rows.append(row), secret=True))
    assert rows[-1]["epsilon"] == gaussian_epsilon(0.05, 2, 1e-5)


def test_a_client_that_no_engine_started_draws_noise_that_the_server_cannot_repeat() -> None:
    """Also one of Flower's own SuperNodes, which may be on a machine of its own: no message says that it is not."""
    experiment = small(**NOISY, **{"training.learning_rate": 1e-12, "data.partition": "iid"})
    given = first(experiment)
    replies = []
    nodes: list[dict[str, Any]] = [{"partition-id": 0}, {"partition-id": 0, "data": "digits:1/6", "policy": ""}]
    for client, node in [(SIMULATED, nodes[0])] * 2 + [(app, node) for node in nodes for _ in range(2)]:
        message = Message(
            RecordDict(
                {"arrays": to_arrays(given), "config": ConfigRecord({"server-round": 1, "learning-rate": 1e-12})}
            ),
            dst_node_id=1,
            message_type="train",
        )
        context = Context(1, 1, node, RecordDict(), {"experiment": experiment.toml()})
        reply = client(message, context)
        assert reply.has_content(), reply.error
        replies.append({name: array.numpy() for name, array in reply.content["arrays"].items()})
    seeded, again, *secret = (flat(change(reply, given)) for reply in replies)
    np.testing.assert_array_equal(seeded, again)
    for drawn in secret:
        assert abs(drawn.std() / 0.05 - 1) < 5 / math.sqrt(2 * drawn.size)
        assert abs(np.corrcoef(drawn, seeded)[0, 1]) < 6 / math.sqrt(drawn.size)
    for one, other in itertools.combinations(secret, 2):
        assert abs(np.corrcoef(one, other)[0, 1]) < 6 / math.sqrt(one.size)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"privacy.noise_multiplier": 1.0}, "privacy.noise_multiplier = 1: noise hides an update only up to its norm"),
        (
            {**NOISY, "privacy.noise_at": "server", "privacy.protection": "ckks"},
            "privacy.noise_at = 'server': the server of privacy.protection = 'ckks' only adds up ciphertexts",
        ),
        ({**NOISY, "federation.strategy": "fedmedian"}, "federation.strategy = 'fedmedian': cannot work with"),
        ({**NOISY, "federation.strategy": "krum"}, "federation.strategy = 'krum': cannot work with"),
        ({**NOISY, "federation.strategy": "qfedavg"}, "federation.strategy = 'qfedavg': cannot work with"),
        ({**NOISY, "federation.strategy": "mine:strategy"}, "federation.strategy = 'mine:strategy': cannot work with"),
        ({**NOISY, "training.schedule": "plateau"}, "training.schedule = 'plateau': follows the clients' training losses"),
        (
            {**NOISY, "evaluation.federated": True, "data.validation_fraction": 0.2},
            "evaluation.federated = true: clients' scores travel without noise",
        ),
        ({**NOISY, "privacy.delta": 0.2}, "privacy.delta = 0.2: must be smaller than 1 / data.clients = 0.166667"),
        ({"privacy.noise_at": "server"}, "privacy.noise_at = 'server': has no effect without noise"),
        ({"privacy.delta": 1e-6}, "privacy.delta = 1e-06: has no effect without noise"),
        ({"privacy.clip": 0.0}, "privacy.clip = 0.0: must be"),
        ({"privacy.noise_multiplier": -1.0}, "privacy.noise_multiplier = -1.0: must be"),
        ({**NOISY, "privacy.noise_at": "both"}, "privacy.noise_at = 'both': must be 'client', 'server' or 'distributed'"),
    ],
)  # fmt: skip
def test_noise_that_could_not_keep_its_promise_is_refused(settings, said, monkeypatch) -> None:
    mine = ModuleType("mine")
    mine.strategy = lambda _experiment, shared: FedAvg(**shared)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mine", mine)
    with pytest.raises(SettingsError) as refused:
        small(**settings)
    assert said in str(refused.value)


@pytest.mark.parametrize("strategy", ["fedavgm", "fedadam"])
@pytest.mark.parametrize("noise_at", ["client", "server"])
def test_strategies_of_the_mean_go_on_from_the_noisy_mean(strategy, noise_at, tmp_path: Path) -> None:
    result = run(
        small(**NOISY, **{"federation.strategy": strategy, "privacy.noise_at": noise_at}), out=tmp_path / "run"
    )
    assert np.isfinite(flat(model(result))).all()
    assert result.summary["epsilon"] > 20
