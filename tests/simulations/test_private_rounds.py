"""Rounds with noise: cohorts by coins and in turn, a bound that adapts, noise that is taken back, budgets, and runs that are cut off."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from helpers.kills import content
from safetensors.numpy import load_file

from fedveil import Experiment, Result, SettingsError, resume, run
from fedveil.client.app import Runtimes, client_app
from fedveil.client.learning.contribution import Instructions
from fedveil.core.errors import Interrupted, ProtectionError
from fedveil.core.record.record import Record
from fedveil.core.wire.messages import CLIP, WITHIN, to_arrays
from fedveil.privacy.dp.accounting.accountants import gaussian_epsilon, poisson_epsilon
from fedveil.privacy.dp.adaptive import RATE, START
from fedveil.privacy.plan import plan_for, share_for
from fedveil.server.checkpoint import State, load_state
from fedveil.server.federation import federate, noise_file, prepare, resolve
from fedveil.server.rounds.captures import read_captures
from fedveil.server.rounds.context import Hooks
from fedveil.simulations.engine.grid import InProcessGrid

SIMULATED = client_app(Runtimes(simulating=True))
SERVER = {"privacy.clip": 0.5, "privacy.noise_multiplier": 1.0, "privacy.noise_at": "server"}
COINS = {**SERVER, "federation.sampling": "poisson"}
TURNS = {**SERVER, "federation.sampling": "order"}
BANDED = {**TURNS, "privacy.noise": "banded"}
ADAPTIVE = {**SERVER, "privacy.clip": "adaptive"}


def small(**settings: Any) -> Experiment:
    """Twelve clients, four a round, three rounds."""
    few = {
        "data.clients": 12,
        "federation.cohort": 4,
        "federation.rounds": 3,
        "training.epochs": 1,
        "model.hidden": [16],
    }
    return Experiment.preset("digits").override({**few, "engine": "sequential", **settings})


def grid(experiment: Experiment, kind: type[InProcessGrid] = InProcessGrid) -> InProcessGrid:
    return kind(SIMULATED, experiment.data.clients, {"experiment": experiment.toml(), "keys": ""})


def quiet(_row: Any, _state: Any) -> None:
    pass


def flat(model: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([model[name].reshape(-1).astype(np.float64) for name in sorted(model)])


def model(result: Result) -> np.ndarray:
    return flat(load_file(result.run_dir / "model.safetensors"))


def asked(result: Result) -> list[list[int]]:
    """The clients of each round."""
    rounds = result.clients.groupby("round").client
    return [
        sorted(rounds.get_group(number)) if number in rounds.groups else [] for number in range(1, len(result.metrics))
    ]


@pytest.mark.parametrize(
    "settings",
    [
        COINS,
        BANDED,
        {**COINS, **ADAPTIVE},
        {**BANDED, **ADAPTIVE},
        {"federation.sampling": "poisson"},
        {"federation.sampling": "order"},
    ],
)
def test_every_engine_draws_the_same_cohorts_and_makes_the_same_models(settings, tmp_path) -> None:
    ways: dict[str, dict[str, Any]] = {"sequential": {}, "processes": {"workers": 2}, "batched": {}}
    made = {
        name: run(small(**{**settings, **way, "engine": name}), out=tmp_path / name, plots=False)
        for name, way in ways.items()
    }
    one = made["sequential"]
    for name in ("model.safetensors", "metrics.csv", "clients.csv"):
        assert (one.run_dir / name).read_bytes() == (made["processes"].run_dir / name).read_bytes()
    assert asked(one) == asked(made["batched"])
    np.testing.assert_allclose(model(made["batched"]), model(one), atol=1e-3)


def test_clients_take_turns(tmp_path) -> None:
    result = run(small(**{"federation.sampling": "order", "federation.rounds": 6}), out=tmp_path / "run", plots=False)
    rounds = asked(result)
    assert sorted(rounds[0] + rounds[1] + rounds[2]) == list(range(12))
    assert rounds[3:] == rounds[:3]


@pytest.mark.parametrize("protection", ["none", "secagg"])
def test_cohorts_by_coins_are_divided_by_their_average(protection, tmp_path) -> None:
    """Next to no noise: what the model moves by is a sum of updates over q N, which a cohort of another size shows."""
    many = {
        "data.clients": 120,
        "federation.cohort": 100,
        "data.min_examples": 1,
        "federation.rounds": 1,
        "privacy.clip": 0.01,
    }
    settings = {
        **COINS,
        **many,
        "privacy.noise_multiplier": 1e-9,
        "privacy.protection": protection,
        "engine": "batched",
    }
    experiment = small(**settings)
    poisson = run(experiment, out=tmp_path / "coins", plots=False)
    (cohort,) = asked(poisson)
    assert len(cohort) != 100
    before = flat(prepare(resolve(experiment)).state.parameters)
    moved = np.linalg.norm(model(poisson) - before)
    plain = run(
        small(**{**settings, "privacy.protection": "none", "federation.capture": True}),
        out=tmp_path / "plain",
        plots=False,
    )
    updates = [flat(update.weights) - before for update in read_captures(plain.run_dir)[0].updates.values()]
    assert len(updates) == len(cohort)
    assert moved == pytest.approx(float(np.linalg.norm(np.sum(updates, axis=0) / 100)), rel=0.02)


def test_the_noise_of_shares_is_that_of_the_largest_cohort_whatever_the_coins_draw(tmp_path) -> None:
    many = {"data.clients": 120, "federation.cohort": 100, "data.min_examples": 1, "model.hidden": [128]}
    shares = {
        **COINS,
        "privacy.noise_at": "distributed",
        "privacy.protection": "secagg",
        "privacy.protection.drop_outs": 0.1,
    }
    still = {"training.learning_rate": 1e-12, "engine": "batched", "federation.capture": True}
    experiment = small(**many, **shares, **still)
    result = run(experiment, out=tmp_path / "run", plots=False)
    plan = plan_for(experiment)
    assert max(len(cohort) for cohort in asked(result)) < plan.cohort
    moved = np.concatenate([flat(each.after) - flat(each.before) for each in read_captures(result.run_dir)])
    share = share_for(experiment, plan, moved.size // 3)
    wanted = math.sqrt(plan.cohort) * share.deviation * share.unit / 100
    assert abs(moved.std() / wanted - 1) < 5 / math.sqrt(2 * moved.size)


def test_a_cohort_of_nobody_releases_noise_as_any_other(tmp_path) -> None:
    rare = {**COINS, "data.clients": 500, "federation.cohort": 1, "data.min_examples": 1, "federation.rounds": 6}
    result = run(small(**rare), out=tmp_path / "run", plots=False)
    assert [] in asked(result)
    assert (result.metrics.clients[1:] >= 0).all()
    states = [small(**{**rare, "federation.rounds": number}) for number in range(1, 7)]
    empty = asked(result).index([]) + 1
    before = (
        flat(prepare(resolve(small(**rare))).state.parameters)
        if empty == 1
        else model(run(states[empty - 2], out=tmp_path / "before", plots=False))
    )
    after = model(run(states[empty - 1], out=tmp_path / "after", plots=False))
    assert abs((after - before).std() / 0.5 - 1) < 5 / math.sqrt(2 * after.size)


def test_without_noise_a_round_of_nobody_is_left_out(tmp_path) -> None:
    rare = {
        "federation.sampling": "poisson",
        "data.clients": 500,
        "federation.cohort": 1,
        "data.min_examples": 1,
        "federation.rounds": 6,
    }
    result = run(small(**rare), out=tmp_path / "run", plots=False)
    empty = [
        row for row, clients in zip(result.metrics.iloc[1:].itertuples(), asked(result), strict=True) if not clients
    ]
    assert empty
    for row in empty:
        assert row.clients == 0
        assert math.isnan(row.train_loss)
        assert row.test_loss == result.metrics.test_loss[row.round - 1]


@pytest.mark.parametrize("sampling", ["poisson", "order"])
def test_epsilon_is_that_of_the_sampling(sampling, tmp_path) -> None:
    result = run(
        small(**{**SERVER, "federation.sampling": sampling, "federation.rounds": 4}), out=tmp_path / "run", plots=False
    )
    most = max(sum(client in cohort for cohort in asked(result)) for client in range(12))
    known = gaussian_epsilon(1.0, most, 1e-5)
    if sampling == "order":
        assert (result.summary["epsilon"], most) == (known, 2)
        return
    assert result.summary["epsilon_known"] == known
    assert result.summary["epsilon"] == min(known, poisson_epsilon(1.0, 1 / 3, 4, 1e-5))


@pytest.mark.parametrize("noise", ["independent", "banded"])
def test_the_bound_starts_small_follows_the_noisy_median_and_stands_in_the_metrics(noise, tmp_path) -> None:
    settings = {**(BANDED if noise == "banded" else SERVER), "privacy.clip": "adaptive", "federation.capture": True}
    result = run(small(**settings, **{"federation.rounds": 8}), out=tmp_path / "run", plots=False)
    bounds = result.metrics["clip"].to_numpy()
    assert bounds[0] == START
    steps = np.abs(np.diff(np.log(bounds)))
    assert (steps <= RATE / 2 + 1e-12).all()
    assert bounds[-1] > START  # the updates are longer than that
    for captured, bound in zip(read_captures(result.run_dir), bounds, strict=False):
        assert captured.clip == bound
        for update in captured.updates.values():
            assert np.linalg.norm(flat(update.weights) - flat(captured.before)) <= bound * (1 + 1e-4)
            assert set(update.metrics) == {"client", "num-examples", "seconds"}
    text = "".join(path.read_text() for path in result.run_dir.glob("*.csv"))
    assert WITHIN not in text


def instructions(experiment: Experiment, **config: Any) -> Instructions:
    return Instructions.read({"server-round": 1, "learning-rate": 0.1, **config}, experiment)


@pytest.mark.parametrize("given", [{}, {CLIP: 0.0}, {CLIP: -1.0}, {CLIP: math.inf}, {CLIP: math.nan}, {CLIP: "1"}])
def test_a_client_takes_no_bound_that_is_none(given) -> None:
    with pytest.raises(ProtectionError, match="clip"):
        instructions(small(**ADAPTIVE), **given)
    assert instructions(small(**ADAPTIVE), **{CLIP: 0.25}).clip == 0.25


def test_no_server_changes_a_bound_that_the_settings_fix() -> None:
    assert instructions(small(**SERVER), **{CLIP: 1e9}).clip is None


@pytest.mark.parametrize("found", [-1, 3, 4])
def test_a_client_trains_no_model_of_the_round_or_of_a_later_one(found) -> None:
    with pytest.raises(ProtectionError, match=f"the model of round {found} to be trained in round 3"):
        instructions(small(**SERVER), **{"server-round": 3, "model-round": found})
    assert instructions(small(**SERVER), **{"server-round": 3, "model-round": 1}).model_round == 1
    assert instructions(small(**SERVER), **{"server-round": 3}).model_round == 2


def test_without_noise_no_model_is_trained_twice() -> None:
    """Sums of two rounds that began with one model differ by who is in one of them alone."""
    with pytest.raises(ProtectionError, match="the model of round 1 to be trained in round 3"):
        instructions(small(), **{"server-round": 3, "model-round": 1})


def reply(experiment: Experiment, weights: dict[str, np.ndarray], **config: Any) -> Message:
    """A client's reply to a training message, on a machine of its own."""
    grid(experiment)  # messages can be made where there is a grid
    sent = ConfigRecord({"server-round": 1, "learning-rate": 0.1, **config})
    message = Message(RecordDict({"arrays": to_arrays(weights), "config": sent}), dst_node_id=1, message_type="train")
    node = {"partition-id": 0, "data": f"digits:1/{experiment.data.clients}", "policy": ""}
    context = Context(1, 1, node, RecordDict(), {"experiment": experiment.toml()})  # type: ignore[arg-type]
    return client_app(Runtimes())(message, context)


@pytest.mark.parametrize(("bound", "within"), [(1e-3, 0), (1e3, 1)])
def test_a_client_tells_one_bit_of_its_update_and_nothing_else_of_its_data(bound, within) -> None:
    experiment = small(**ADAPTIVE)
    given = prepare(resolve(experiment)).state.parameters
    answer = reply(experiment, given, **{CLIP: bound})
    assert answer.has_content(), answer.error
    told = dict(answer.content["metrics"])
    assert told == {"client": 0, "num-examples": 1, "seconds": 0.0, WITHIN: within}
    moved = flat({name: array.numpy() for name, array in answer.content["arrays"].items()}) - flat(given)
    assert np.linalg.norm(moved) <= bound * (1 + 1e-4)


def test_a_client_on_a_machine_of_its_own_finds_the_noise_that_a_budget_asks_for() -> None:
    """Nobody sends it a multiplier: the server's settings have the budget alone."""
    budget = {"privacy.clip": 0.5, "privacy.epsilon": 3.0, "training.learning_rate": 1e-12}
    experiment = small(**budget)
    federation = prepare(resolve(experiment))
    z = federation.experiment.privacy.multiplier
    assert gaussian_epsilon(z, 3, 1e-5) == pytest.approx(3.0, rel=1e-3)
    answer = reply(experiment, federation.state.parameters, **{"learning-rate": 1e-12})
    assert answer.has_content(), answer.error
    moved = flat({name: array.numpy() for name, array in answer.content["arrays"].items()}) - flat(
        federation.state.parameters
    )
    assert abs(moved.std() / (0.5 * z) - 1) < 5 / math.sqrt(2 * moved.size)
    assert reply(small(**budget, **{"privacy.calibrated": 0.01}), federation.state.parameters).has_error()
    assert reply(small(**budget, **{"privacy.calibrated": 2 * z}), federation.state.parameters).has_content()


def test_a_client_with_noise_answers_no_question_about_a_loss_or_a_score() -> None:
    experiment = small(**SERVER)
    given = prepare(resolve(experiment)).state.parameters
    assert reply(experiment, given, **{"report-global-loss": True}).has_error()
    message = Message(
        RecordDict({"arrays": to_arrays(given), "config": ConfigRecord({"server-round": 1})}),
        dst_node_id=1,
        message_type="evaluate",
    )
    node = {"partition-id": 0}
    context = Context(1, 1, node, RecordDict(), {"experiment": experiment.toml()})  # type: ignore[arg-type]
    assert SIMULATED(message, context).has_error()


@pytest.mark.parametrize(
    ("protection", "noise_at"),
    [("secagg", "server"), ("secagg", "client"), ("bfv", "client"), ("secagg", "distributed")],
)
def test_no_seconds_and_no_clipped_numbers_are_told_of_protected_updates(protection, noise_at, tmp_path) -> None:
    """A range that clips many weights: their count would tell of the data."""
    told = {**SERVER, "privacy.noise_at": noise_at, "privacy.protection": protection, "privacy.protection.range": 0.5}
    result = run(
        small(**told, **{"federation.capture": True, "training.learning_rate": 1.0}), out=tmp_path / "run", plots=False
    )
    assert (result.clients.clipped == 0).all()
    ledger = pd.read_csv(result.run_dir / "ledger.csv")
    assert (ledger[ledger.stage == "train"].seconds == 0).all()
    for captured in read_captures(result.run_dir):
        for update in captured.updates.values():
            assert {update.metrics[name] for name in ("seconds", "clipped", "seal-seconds", "open-seconds")} == {0.0}


@pytest.mark.parametrize("sampling", ["fixed", "poisson", "order"])
def test_a_budget_is_spent_to_its_end_and_never_passed(sampling, tmp_path) -> None:
    budget = {
        "privacy.clip": 0.5,
        "privacy.epsilon": 6.0,
        "privacy.noise_at": "server",
        "federation.sampling": sampling,
    }
    experiment = small(**budget, **{"federation.rounds": 6})
    result = run(experiment, out=tmp_path / "run", plots=False)
    assert result.summary["rounds"] == 6
    assert result.summary["stopped"] is None
    assert result.summary["epsilon"] <= 6.0
    if sampling != "fixed":
        assert result.summary["epsilon"] > 5.9
    longer = resume(tmp_path / "run", rounds=20)
    assert longer.summary["rounds"] < 20
    assert longer.metrics.epsilon.max() <= 6.0
    assert longer.summary["stopped"].startswith("another round could spend more than privacy.epsilon = 6; ")
    assert longer.summary["stopped"].endswith(f"is spent after {longer.summary['rounds']} rounds")
    again = resume(tmp_path / "run")
    assert again.summary["rounds"] == longer.summary["rounds"]


def test_the_last_round_of_a_budget_is_evaluated(tmp_path) -> None:
    budget = {"privacy.clip": 0.5, "privacy.epsilon": 6.0, "privacy.noise_at": "server", "evaluation.every": 7}
    result = run(
        small(**budget, **{"federation.rounds": 4, "federation.sampling": "order"}), out=tmp_path / "run", plots=False
    )
    longer = resume(result.run_dir, rounds=20)
    assert 4 < longer.summary["rounds"] < 20
    assert not math.isnan(longer.metrics.test_accuracy.iloc[-1])


class Cut(Exception):
    """The process ends here."""


def begin(
    experiment: Experiment,
    folder: Path,
    *,
    secret: bool = True,
    kind: type[InProcessGrid] = InProcessGrid,
    watch: Any = quiet,
) -> None:
    federation, record = prepare(experiment), Record.create(experiment, folder)
    federation.protect(None)
    federate(federation, grid(experiment, kind), record, Hooks(watch, federation.evaluate, secret=secret))


def go_on(experiment: Experiment, folder: Path, *, secret: bool = True) -> tuple[State, pd.DataFrame]:
    record = Record(folder)
    federation = prepare(experiment, record)
    federation.protect(None)
    federate(federation, grid(experiment), record, Hooks(quiet, federation.evaluate, secret=secret))
    return federation.state, pd.read_csv(folder / "metrics.csv")


@pytest.mark.parametrize("settings", [COINS, TURNS, BANDED, {**BANDED, **ADAPTIVE}, {**COINS, **ADAPTIVE}])
def test_a_simulation_that_was_cut_off_ends_as_if_it_had_not_been(settings, tmp_path) -> None:
    experiment = small(**settings, **{"federation.rounds": 5})
    whole = run(experiment, out=tmp_path / "whole", plots=False).run_dir
    resolved = resolve(experiment)

    def stop(_row: Any, state: State) -> None:
        if state.round == 3:
            raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        begin(resolved, tmp_path / "cut", secret=False, watch=stop)
    run(experiment, resume=tmp_path / "cut")
    for name in ("model.safetensors", "metrics.csv"):
        assert content(tmp_path / "cut")[name] == content(whole)[name]


@pytest.mark.parametrize("settings", [SERVER, BANDED, {**COINS, **ADAPTIVE}])
def test_a_model_that_was_made_is_kept_and_no_second_one_of_its_round_is_made(settings, tmp_path, monkeypatch) -> None:
    """A server that is killed between its round's sum and the next message: two models of one round would be two releases."""
    experiment = resolve(small(**settings))
    made: list[np.ndarray] = []

    def cut(*_given: Any, **_named: Any) -> None:
        raise Cut

    with monkeypatch.context() as patch:
        patch.setattr("fedveil.server.rounds.loop._advance", cut)
        with pytest.raises(Cut):
            begin(experiment, tmp_path / "run")
    state, _ = load_state(Record(tmp_path / "run"))
    made.append(flat(state.pending))
    assert (state.round, state.cohorts) == (0, 1)
    bound = state.clip

    def ended(_row: Any, state: State) -> None:
        if state.round == 1:
            made.append(flat(state.parameters))

    record = Record(tmp_path / "run")
    federation = prepare(experiment, record)
    federate(federation, grid(experiment), record, Hooks(ended, federation.evaluate, secret=True))
    np.testing.assert_array_equal(made[0], made[1])
    assert federation.state.cohorts == 3
    metrics = pd.read_csv(tmp_path / "run" / "metrics.csv")
    if "clip" in metrics:
        assert metrics["clip"][1] == bound != START


def test_a_sum_of_few_is_counted_before_it_is_opened(tmp_path) -> None:
    """A server that is killed with a sum of three open, and then sees one of six: epsilon counts the noise of three."""
    settings = {"privacy.clip": 0.5, "privacy.noise_multiplier": 1.0, "privacy.protection": "secagg"}
    experiment = resolve(
        small(
            **settings,
            **{
                "data.clients": 6,
                "federation.cohort": 6,
                "federation.rounds": 1,
                "privacy.protection.drop_outs": 0.4,
                "privacy.protection.colluders": 0.0,
            },
        )
    )

    class Killed(InProcessGrid):
        def answers(self, messages: Any, timeout: float | None = None) -> Any:
            for i, answer in super().answers(messages, timeout):
                kind = messages[i].metadata.message_type
                if kind.endswith("reveal"):
                    raise Cut
                if not (kind == "train" and messages[i].metadata.dst_node_id in (2, 5)):
                    yield i, answer

    with pytest.raises(Cut):
        begin(experiment, tmp_path / "run", kind=Killed)
    state, _ = load_state(Record(tmp_path / "run"))
    assert (state.fewest, state.asked, state.cohorts) == (4, dict.fromkeys(range(6), 1), 1)
    state, metrics = go_on(experiment, tmp_path / "run")
    assert (state.fewest, state.cohorts) == (4, 2)
    assert metrics.epsilon.iloc[-1] == gaussian_epsilon(math.sqrt(3), 2, 1e-5)  # three honest ones, asked twice


def test_a_cohort_that_was_asked_in_vain_counts_in_what_coins_spend(tmp_path) -> None:
    experiment = resolve(small(**COINS, **{"federation.rounds": 2}))

    class Killed(InProcessGrid):
        def answers(self, messages: Any, timeout: float | None = None) -> Any:
            raise Cut

    with pytest.raises(Cut):
        begin(experiment, tmp_path / "run", kind=Killed)
    state, metrics = go_on(experiment, tmp_path / "run")
    assert (state.round, state.cohorts) == (2, 3)
    known = gaussian_epsilon(1.0, max(state.asked.values()), 1e-5)
    assert metrics.epsilon.iloc[-1] == min(known, poisson_epsilon(1.0, 1 / 3, 3, 1e-5))


def test_a_budget_counts_it_too(tmp_path) -> None:
    budget = {
        "privacy.clip": 0.5,
        "privacy.epsilon": 6.0,
        "privacy.noise_at": "server",
        "federation.sampling": "poisson",
    }
    experiment = prepare(resolve(small(**budget))).experiment

    class Killed(InProcessGrid):
        def answers(self, messages: Any, timeout: float | None = None) -> Any:
            raise Cut

    with pytest.raises(Cut):
        begin(experiment, tmp_path / "run", kind=Killed)
    state, metrics = go_on(experiment, tmp_path / "run")
    assert (state.round, state.cohorts) == (2, 3)
    assert state.stopped.startswith("another round could spend more than privacy.epsilon = 6; ")
    assert metrics.epsilon.max() <= 6.0
    assert load_state(Record(tmp_path / "run"))[0].stopped == state.stopped


def test_turns_that_the_operating_system_drew_go_on_after_a_resume(tmp_path) -> None:
    experiment = resolve(small(**TURNS, **{"federation.rounds": 6}))

    def stop(_row: Any, state: State) -> None:
        if state.round == 2:
            raise Interrupted("stopped")

    orders = []
    for name in ("one", "two"):
        with pytest.raises(Interrupted):
            begin(experiment, tmp_path / name, watch=stop)
        go_on(experiment, tmp_path / name)
        clients = pd.read_csv(tmp_path / name / "clients.csv").groupby("round").client
        orders.append([sorted(clients.get_group(number)) for number in range(1, 7)])
        assert orders[-1][:3] == orders[-1][3:]
        assert sorted(client for turn in orders[-1][:3] for client in turn) == list(range(12))
    assert orders[0] != orders[1]


def test_banded_noise_of_a_deployed_run_is_taken_back_after_a_resume_by_who_has_the_key(tmp_path) -> None:
    """With updates of next to nothing the models are sums of noise: the matrix of the mechanism gives white noise back."""
    from fedveil.privacy.dp.banded import coefficients

    still = {"training.learning_rate": 1e-12, "federation.rounds": 6, "privacy.noise_multiplier": 1.0}
    experiment = resolve(small(**{**BANDED, **still}))
    path = noise_file(Record(tmp_path / "run"))
    models = [flat(prepare(experiment).state.parameters)]

    def note(_row: Any, state: State) -> None:
        if state.round:
            models.append(flat(state.parameters))
        if state.round == 4 and len(models) == 5:
            raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        begin(experiment, tmp_path / "run", watch=note)
    key = path.read_bytes()
    inside = b"".join(file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file())
    assert path.parent == tmp_path
    assert key not in inside
    assert key.hex().encode() not in inside

    path.rename(tmp_path / "elsewhere")
    with pytest.raises(SettingsError, match="the key of the run's noise cannot be read"):
        go_on(experiment, tmp_path / "run")
    (tmp_path / "elsewhere").rename(path)
    record = Record(tmp_path / "run")
    federation = prepare(experiment, record)
    federate(federation, grid(experiment), record, Hooks(note, None, secret=True))
    assert not path.exists()  # nobody needs it any more
    noises = np.diff(np.stack(models), axis=0) * 4 / 0.5  # of the sum, in units of z C
    c = coefficients(3)
    white = np.stack([sum(c[j] * noises[t - j] for j in range(min(3, t + 1))) for t in range(6)])
    size = white.shape[1]
    assert np.abs(white.std(axis=1) - 1).max() < 5 / math.sqrt(2 * size)
    assert np.abs(np.corrcoef(white) - np.eye(6)).max() < 5 / math.sqrt(size)
    assert np.corrcoef(noises)[3, 4] < -0.2  # which is taken back


def test_a_run_goes_on_with_its_own_mechanism_alone(tmp_path) -> None:
    experiment = resolve(small(**COINS, **{"federation.rounds": 2}))

    def stop(_row: Any, state: State) -> None:
        if state.round == 1:
            raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        begin(experiment, tmp_path / "run", watch=stop)
    for other, name in ((TURNS, "server-order"), ({}, "none")):
        with pytest.raises(
            SettingsError, match=f"the mechanism 'server-poisson', and its settings now ask for '{name}'"
        ):
            prepare(resolve(small(**other, **{"federation.rounds": 2})), Record(tmp_path / "run"))
    assert json.loads((tmp_path / "run" / "noise.json").read_text())["mechanism"] == "server-poisson"


class Silent(InProcessGrid):
    """Nobody answers in the second round, or too few for secure aggregation."""

    def answers(self, messages: Any, timeout: float | None = None) -> Any:
        for i, answer in super().answers(messages, timeout):
            second = messages[i].content["config"]["server-round"] == 2
            if not (second and messages[i].metadata.message_type == "train" and messages[i].metadata.dst_node_id > 2):
                yield i, answer


@pytest.mark.parametrize("noise_at", ["server", "client", "distributed"])
def test_a_round_of_too_few_reveals_nothing_and_the_run_goes_on(noise_at, tmp_path) -> None:
    settings = {
        **SERVER,
        "privacy.noise_at": noise_at,
        "privacy.protection": "secagg",
        "data.clients": 6,
        "federation.cohort": 6,
    }
    experiment, models, warned = resolve(small(**settings)), [], []
    federation, record = prepare(experiment), Record.create(experiment, tmp_path / "run")
    federation.protect(None)

    def note(_row: Any, state: State) -> None:
        models.append(flat(state.parameters))

    federate(federation, grid(experiment, Silent), record, Hooks(note, federation.evaluate, warned.append))
    np.testing.assert_array_equal(models[1], models[2])
    assert (models[2] != models[3]).any()
    metrics = pd.read_csv(tmp_path / "run" / "metrics.csv")
    assert metrics.clients.tolist()[1:] == [6, 0, 6]
    assert any(text.startswith("round 2: left out, and the model stays as it is: ") for text in warned)
    assert metrics.epsilon[2] >= metrics.epsilon[1]
    ledger = pd.read_csv(tmp_path / "run" / "ledger.csv")
    assert "reveal" not in set(ledger[ledger["round"] == 2].stage)


def test_without_noise_it_ends_the_run_as_ever(tmp_path) -> None:
    experiment = resolve(small(**{"privacy.protection": "secagg", "data.clients": 6, "federation.cohort": 6}))
    federation, record = prepare(experiment), Record.create(experiment, tmp_path / "run")
    federation.protect(None)
    with pytest.raises(ProtectionError, match="round 2: "):
        federate(federation, grid(experiment, Silent), record, Hooks(quiet, federation.evaluate))


def test_a_round_whose_clients_all_leave_is_left_out_where_each_adds_its_own_noise(tmp_path) -> None:
    class Gone(InProcessGrid):
        def answers(self, messages: Any, timeout: float | None = None) -> Any:
            if messages[0].content["config"]["server-round"] != 2:
                yield from super().answers(messages, timeout)

    experiment = resolve(small(**{**SERVER, "privacy.noise_at": "client"}))
    begin(experiment, tmp_path / "run", secret=False, kind=Gone)
    assert pd.read_csv(tmp_path / "run" / "metrics.csv").clients.tolist()[1:] == [4, 0, 4]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"privacy.protection": "bfv"},
            "federation.sampling = 'poisson': a round may draw nobody, and with privacy.protection = 'bfv'",
        ),
        ({"privacy.protection": "secagg"}, "a round may draw 0, and secure aggregation needs"),
    ],
)
def test_cohorts_by_coins_are_refused_where_a_protection_cannot_add_them_up(settings, said) -> None:
    with pytest.raises(SettingsError, match=said):
        prepare(resolve(small(**{"federation.sampling": "poisson", **settings})))


def test_a_bound_that_adapts_needs_noise() -> None:
    with pytest.raises(SettingsError, match=r"privacy\.clip = 'adaptive': the bound follows a noisy count"):
        small(**{"privacy.clip": "adaptive"})


def test_a_run_is_not_made_longer_where_its_noise_is_taken_back_over_fewer_rounds(tmp_path) -> None:
    """A client's turns are three rounds apart. A run of two rounds knows of no third, whose noise a longer run takes back."""
    whole = run(small(**BANDED, **{"federation.rounds": 4}), out=tmp_path / "whole", plots=False)
    assert resume(whole.run_dir, rounds=6).summary["rounds"] == 6  # three rounds from turn to turn, in either
    short = run(small(**BANDED, **{"federation.rounds": 2}), out=tmp_path / "short", plots=False)
    with pytest.raises(SettingsError, match="took back the noise of so many rounds as the run was to have, 2"):
        resume(short.run_dir, rounds=6)
