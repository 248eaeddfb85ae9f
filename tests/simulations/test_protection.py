"""Protected runs, whole: the model is the fixed-point sum of the plain updates, whoever computes, stops or kills the run."""

from __future__ import annotations

import importlib.util
import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.kills import content
from helpers.protected import HELD_OUT, Made, Observed, Sent, Watched, Weights, assert_same, by_hand, ended, kill, small
from safetensors.numpy import load_file
from threadpoolctl import threadpool_limits

from fedveil import Experiment, SettingsError, run
from fedveil.core.errors import Interrupted, ProtectionError
from fedveil.core.randomness import Stream
from fedveil.datasets.federated import load
from fedveil.models.computing import one_thread
from fedveil.models.local.evaluation import evaluate
from fedveil.models.local.training import train_clients
from fedveil.models.networks.build import build
from fedveil.privacy.homomorphic import keys
from fedveil.privacy.homomorphic.keys import write_keys
from fedveil.privacy.plan import make_lattice, make_plan
from fedveil.server.federation import prepare, resolve
from fedveil.server.rounds import observers
from fedveil.simulations.holder import open_record

LATTICES = ("bfv", "ckks")
PROTECTIONS = (*LATTICES, "secagg")


def summary(seen: Observed) -> dict[str, Any]:
    """What a run's summary says."""
    assert seen.result is not None
    return seen.result.summary


def network_of(experiment: Experiment) -> torch.nn.Module:
    """The network that everybody makes from the seed."""
    return build(load(experiment.data, experiment.seed).dataset.task, experiment.model, Stream(experiment.seed))


def trained_plainly(experiment: Experiment, model: Weights, number: int) -> Made:
    """What all clients make of a model in a round, one by one, with no server and no protection."""
    federated, network = load(experiment.data, experiment.seed), network_of(experiment)
    start = {name: torch.from_numpy(value) for name, value in model.items()}
    rate, made = experiment.training.learning_rate, {}
    for client in range(experiment.data.clients):
        examples, streams = federated.client(client)[0], [Stream(experiment.seed, number, client)]
        with one_thread():
            trained = train_clients(network, start, [examples], experiment.training, rate, streams, classes=10)
        made[client] = {name: value[0].numpy() for name, value in trained.parameters.items()}, len(examples)
    return made


def in_whole_numbers(experiment: Experiment, made: Made) -> Weights:
    """The model of a round whose clients all took part, by hand."""
    grid = make_plan(experiment.privacy, experiment.federation.cohort).grid
    return by_hand(made, made, grid, sum(examples for _, examples in made.values()))


# --- the model


@pytest.mark.parametrize("engine", ["sequential", "batched", "processes"])
@pytest.mark.parametrize("protection", PROTECTIONS)
def test_the_model_after_each_round_is_the_sum_of_the_updates_in_whole_numbers(protection, engine, watched) -> None:
    experiment = small(protection, engine=engine, **({"workers": 2} if engine == "processes" else {}))
    seen = ended(watched(experiment))
    assert len(seen.models) == 2
    model: Weights = {name: value.detach().numpy() for name, value in network_of(experiment).named_parameters()}
    for number, after in enumerate(seen.models, start=1):
        made, plain = seen.made[number - 1], trained_plainly(experiment, model, number)
        assert sorted(made) == sorted(plain)
        for client, (weights, examples) in plain.items():
            assert made[client][1] == examples
            if engine == "batched":  # all at once the last bits are others
                for name, value in weights.items():
                    np.testing.assert_allclose(made[client][0][name], value, rtol=1e-3, atol=1e-4)
            else:
                assert_same(made[client][0], weights)
        assert_same(after, in_whole_numbers(experiment, made))
        model = after
    assert summary(seen)["privacy"]["clipped"] == 0
    assert 0 < summary(seen)["privacy"]["largest_error"] <= summary(seen)["privacy"]["error_bound"]


@pytest.mark.parametrize("protection", PROTECTIONS)
def test_nothing_sent_is_the_same_twice_and_yet_the_model_is(protection, watched) -> None:
    first, second = (ended(watched(small(protection, **HELD_OUT), name)) for name in "ab")
    assert content(first.folder) == content(second.folder)
    sent = first.uploads + second.uploads
    assert len(set(sent)) == len(sent) == 2 * 2 * 5


@pytest.mark.parametrize("protection", PROTECTIONS)
def test_a_protected_round_ends_within_rounding_of_the_plain_one(protection, watched) -> None:
    protected = ended(watched(small(protection, federation__rounds=1)))
    plain = ended(watched(small("none", federation__rounds=1), "plain"))
    for name, value in plain.models[0].items():
        assert np.abs(protected.models[0][name] - value).max() <= summary(protected)["privacy"]["error_bound"]


@pytest.mark.parametrize("strategy", ["fedavgm", "fedadam"])
def test_a_strategy_on_the_server_makes_of_the_masked_mean_what_it_makes_of_the_plain_one(strategy, watched) -> None:
    settings = {"federation__strategy": strategy, "federation__rounds": 3}
    masked, plain = (ended(watched(small(kind, **settings), kind)) for kind in ("secagg", "none"))
    assert len(masked.models) == 3
    for ours, theirs in zip(masked.models, plain.models, strict=True):
        for name, value in theirs.items():
            np.testing.assert_allclose(ours[name], value, rtol=1e-4, atol=1e-4)
    assert summary(masked)["privacy"]["largest_error"] <= summary(masked)["privacy"]["error_bound"]  # of the mean


@pytest.mark.parametrize("protection", PROTECTIONS)
def test_clients_whose_weights_differ_a_thousandfold_add_up_exactly(protection, watched) -> None:
    experiment = small(protection, data__partition="quantity", data__partition__exponent=8.0)
    seen = ended(watched(experiment))
    sizes = [examples for _, examples in seen.made[0].values()]
    assert max(sizes) >= 1000 * min(sizes)
    for made, model in zip(seen.made, seen.models, strict=False):
        assert_same(model, in_whole_numbers(experiment, made))


@pytest.mark.parametrize("protection", PROTECTIONS)
def test_weights_that_are_all_zero_stay_zero(protection, watched) -> None:
    seen = ended(watched(small(protection, model__initialization="zeros", training__learning_rate=1e-30)))
    assert all(not value.any() for model in seen.models for value in model.values())


@pytest.mark.parametrize("engine", ["sequential", "batched"])
@pytest.mark.parametrize("protection", PROTECTIONS)
def test_weights_out_of_range_are_clipped_counted_and_reported(protection, engine, watched) -> None:
    experiment = small(protection, engine=engine, privacy__protection__range=0.25)
    seen = ended(watched(experiment))
    beyond = [
        sum(int((np.abs(value) > 0.25).sum()) for value in weights.values())
        for made in seen.made
        for _, (weights, _) in sorted(made.items())
    ]
    assert min(beyond) > 0
    assert summary(seen)["privacy"]["clipped"] == sum(beyond)
    assert seen.table("clients")["clipped"].tolist() == beyond
    for made, model in zip(seen.made, seen.models, strict=False):
        assert_same(model, in_whole_numbers(experiment, made))
    assert summary(seen)["privacy"]["largest_error"] > summary(seen)["privacy"]["error_bound"]


@pytest.mark.parametrize("engine", ["sequential", "processes"])
@pytest.mark.parametrize("protection", LATTICES)
def test_clients_score_a_ciphertext_as_the_opened_model_scores(protection, engine, watched, tmp_path) -> None:
    experiment = small(protection, engine=engine, **HELD_OUT)
    seen = ended(watched(experiment))
    opened = open_record(seen.folder, seen.folder / "keys" / "client-1", tmp_path / "opened.safetensors")
    assert opened.read_bytes() == (seen.folder / "model.safetensors").read_bytes()
    weights = {name: torch.from_numpy(value) for name, value in load_file(opened).items()}
    network, federated = network_of(experiment), load(experiment.data, experiment.seed)
    with one_thread():
        scores = [evaluate(network, weights, federated.client(k)[1], "cross_entropy") for k in range(5)]
        central = evaluate(network, weights, federated.dataset.test, "cross_entropy")
    clients = seen.table("clients")
    last = clients[(clients["round"] == 2) & (clients.stage == "evaluate")]
    assert last.validation_loss.tolist() == [score.loss for score in scores]
    assert last.validation_accuracy.tolist() == [score.accuracy for score in scores]
    right, of = sum(score.sums["correct"] for score in scores), sum(score.examples for score in scores)
    assert summary(seen)["validation_accuracy"] == right / of
    assert summary(seen)["test_accuracy"] == central.accuracy


# --- killed, stopped, gone on with


def killed(watched: Watched, experiment: Experiment, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """Run in another process, in the folder "cut", and kill it at a moment."""
    save, write = observers.save_state, keys._write

    def save_and_die(record: Any, settings: Any, state: Any, strategy: Any) -> None:
        save(record, settings, state, strategy)
        if moment == ("pending" if state.pending else f"stored {state.round}"):
            kill()

    def reply_and_die(sent: Sent, reply: Any) -> list[Any]:
        if moment == f"{sent.stage} {sent.round}" and sent.client == 3:
            kill()
        return [reply]

    def write_and_die(path: Path, content: bytes) -> None:
        write(path, content)
        if moment == "keys":
            kill()

    def child() -> None:
        torch.set_num_threads(1)  # threads of the parent's pools are not there
        threadpool_limits(1)
        monkeypatch.setattr(observers, "save_state", save_and_die)
        monkeypatch.setattr(keys, "_write", write_and_die)
        watched(experiment, "cut", home=reply_and_die)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    assert process.exitcode == -9


MOMENTS = ["pending", "evaluate 1", "stored 1", "train 2", "stored 2"]


@pytest.mark.parametrize(
    ("protection", "engine", "moment"),
    [(kind, "sequential", moment) for kind in ("bfv", "secagg") for moment in MOMENTS]
    + [("ckks", "batched", "pending"), ("bfv", "sequential", "keys")],
)
def test_a_killed_run_goes_on_to_the_bytes_of_one_that_never_was(
    protection, engine, moment, watched, honest, monkeypatch
) -> None:
    # fedavgm keeps arrays between rounds, without names
    strategy = {"federation__strategy": "fedavgm"} if protection == "secagg" else {}
    experiment = small(protection, engine=engine, **HELD_OUT, **strategy)
    whole = honest(experiment)
    killed(watched, experiment, monkeypatch, moment)
    resumed = ended(watched(experiment, "cut"))
    assert content(resumed.folder) == content(whole.folder)
    assert not list(resumed.folder.rglob(".*"))
    for key in ("rounds", "model_sha256", "bytes_up", "bytes_down", "best_round", "test_accuracy"):
        assert summary(resumed)[key] == summary(whole)[key]


def stopped(watched: Watched, experiment: Experiment) -> Path:
    """The folder of a run that its user stopped in the second round."""

    def stop(sent: Sent, reply: Any) -> list[Any]:
        if sent.round == 2:
            raise Interrupted("stopped")
        return [reply]

    seen = watched(experiment, home=stop)
    assert isinstance(seen.error, Interrupted)
    return seen.folder


def open_the_key_to_all(folder: Path) -> None:
    (folder / "keys" / "client-1" / "client.key").chmod(0o644)


def give_the_server_the_key(folder: Path) -> None:
    shutil.copy(folder / "keys" / "client-1" / "client.key", folder / "keys" / "server" / "server.ctx")


def lose_the_keys(folder: Path) -> None:
    shutil.rmtree(folder / "keys")


def bring_other_keys(folder: Path) -> None:
    shutil.rmtree(folder / "keys")
    write_keys(folder / "keys", make_lattice(small("bfv").privacy), 1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (open_the_key_to_all, "others than its owner can read this key; chmod 600 "),
        (give_the_server_the_key, "server.ctx: holds a secret key, and a server must not have one"),
        (lose_the_keys, "keys: the run's keys are gone, and its model is encrypted with them; put them back"),
        (bring_other_keys, "an encrypted aggregate with key "),
    ],
)
def test_a_run_does_not_go_on_with_keys_it_cannot_trust(change, said, watched, tmp_path) -> None:
    experiment = small("bfv")
    folder = stopped(watched, experiment)
    shutil.copytree(folder / "keys", tmp_path / "kept")
    change(folder)
    refused = watched(experiment)
    assert isinstance(refused.error, ProtectionError)
    assert said in str(refused.error)
    shutil.rmtree(folder / "keys", ignore_errors=True)
    shutil.copytree(tmp_path / "kept", folder / "keys")
    resumed, whole = ended(watched(experiment)), ended(watched(experiment, "whole"))
    assert summary(resumed)["model_sha256"] == summary(whole)["model_sha256"]
    assert resumed.table("metrics").equals(whole.table("metrics"))


def test_a_server_does_not_start_with_a_secret_key(tmp_path) -> None:
    federation = prepare(resolve(small("ckks")))
    write_keys(tmp_path / "keys", make_lattice(federation.experiment.privacy), 3)
    (tmp_path / "keys" / "client-2" / "client.key").rename(tmp_path / "keys" / "client-2" / "server.ctx")
    with pytest.raises(ProtectionError, match="holds a secret key, and a server must not have one"):
        federation.protect(tmp_path / "keys" / "client-2")
    federation.protect(tmp_path / "keys" / "server")
    shutil.copy(tmp_path / "keys" / "client-1" / "client.key", tmp_path / "keys" / "server")
    with pytest.raises(ProtectionError, match="a client's secret in the server's folder"):
        federation.protect(tmp_path / "keys" / "server")


# --- settings that cannot work


@pytest.mark.parametrize(
    ("protection", "settings", "said"),
    [
        *((kind, {"federation.strategy": name}, f"federation.strategy = '{name}': cannot work with privacy.protection = '{kind}'")
          for kind in PROTECTIONS
          for name in ("fedmedian", "fedtrimmedavg", "krum", "multikrum", "bulyan", "qfedavg", "math:sqrt")),
        *((kind, {"federation.strategy": name}, "it computes with the mean of the weights, which is a ciphertext here")
          for kind in LATTICES for name in ("fedavgm", "fedadam", "fedyogi", "fedadagrad")),
        *((kind, {"federation.cohort": 2}, "federation.cohort = 2: an aggregate of fewer than privacy.protection.min_clients = 3")
          for kind in PROTECTIONS),
        *((kind, {"privacy.protection.min_clients": 2}, "privacy.protection.min_clients = 2: must be greater than or equal to 3")
          for kind in PROTECTIONS),
        ("secagg", {"privacy.protection.min_clients": 6}, "federation.cohort = 5: an aggregate of fewer than privacy.protection.min_clients = 6"),
        ("bfv", {"privacy.protection.profile": "fast"}, "privacy.protection.profile = 'fast': must be 'exact-small' or 'own'"),
        ("ckks", {"privacy.protection.profile": "exact-small"}, "privacy.protection.profile = 'exact-small': must be 'fast', 'conservative' or 'own'"),
        ("secagg", {"privacy.protection.profile": "fast"}, "profile is a setting of privacy.protection = 'ckks' or 'bfv'"),
        ("ckks", {"privacy.protection.profile": "own", "privacy.protection.degree": 2048}, "100 bits together are insecure with privacy.protection.degree = 2048"),
        ("ckks", {"privacy.protection.profile": "own", "privacy.protection.primes": [30, 30]}, "leaves no room for weights"),
        ("bfv", {"privacy.protection.profile": "own", "privacy.protection.primes": [50, 50], "privacy.protection.plain_bits": 50}, "privacy.protection.plain_bits = 50"),
        ("bfv", {"privacy.protection.range": 5000.0}, "privacy.protection.range = 5000: for 5 clients a 45-bit plain modulus leaves a grid of"),
        ("ckks", {"privacy.protection.range": 2e4}, "privacy.protection.range = 20000: for 5 clients a 40-bit modulus leaves a grid of"),
        ("secagg", {"privacy.protection.range": 1e6}, "leaves a grid of 2^-11, coarser than 2^-12"),
        ("bfv", {"data.dataset": "synthetic", "data.clients": 2000, "federation.cohort": 2000}, "adds at most "),
        ("ckks", {"data.dataset": "synthetic", "data.clients": 10**7, "federation.cohort": 10**7}, "coarser than 2^-12"),
        ("secagg", {"privacy.protection.drop_outs": 0.6, "privacy.protection.colluders": 0.6}, "4 must stay"),
        ("none", {"privacy.protection.range": 3.0}, "range: unknown setting of privacy.protection = 'none'; range is a setting of"),
        ("none", {"privacy.protection.profile": "fast"}, "profile is a setting of privacy.protection = 'ckks' or 'bfv'"),
        ("none", {"privacy.protection.min_clients": 4}, "min_clients is a setting of privacy.protection = 'ckks' or 'bfv' or 'secagg'"),
        ("bfv", {"privacy.protection.drop_outs": 0.1}, "of privacy.protection = 'bfv'; drop_outs is a setting of privacy.protection = 'secagg'"),
        ("bfv", {"privacy.protection.colluders": 0.1}, "colluders is a setting of privacy.protection = 'secagg'"),
        ("bfv", {"privacy.protection.degree": 8192}, "privacy.protection.degree = 8192: has no effect"),
        ("bfv", {"privacy.protection.plain_bits": 40}, "privacy.protection.plain_bits = 40: has no effect"),
        ("ckks", {"privacy.protection.profile": "own", "privacy.protection.plain_bits": 40}, "plain_bits is a setting of privacy.protection = 'bfv'"),
    ],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused_before_anything_is_written(protection, settings, said, tmp_path) -> None:
    with pytest.raises(SettingsError) as caught:
        run(small(protection).override(settings), out=tmp_path / "run")
    assert said in str(caught.value)
    assert not (tmp_path / "run").exists()


# --- Flower's simulation runtime


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra fedveil[ray]")
@pytest.mark.parametrize("protection", ["bfv", "secagg"])
def test_on_flowers_runtime_it_is_the_same_model(protection, watched, monkeypatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")  # Ray keeps sockets there, whose paths must be short
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    experiment = small(protection, federation__cohort=3, **HELD_OUT)  # fewer nodes than clients
    own = ended(watched(experiment, "own"))
    ray = ended(watched(experiment.override({"engine": "ray", "workers": 1}), "ray"))
    for key in ("model_sha256", "test_accuracy", "validation_accuracy", "bytes_up"):
        assert summary(ray)[key] == summary(own)[key]
    for table in ("metrics", "clients"):
        pd.testing.assert_frame_equal(ray.table(table), own.table(table))
    assert summary(ray)["privacy"]["largest_error"] is None  # clients work out of sight
