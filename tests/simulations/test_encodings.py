"""Encoded updates in whole runs: the same bytes on every engine and after a stop, and bad updates are left out by name."""

from __future__ import annotations

import signal
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message
from helpers.experiments import digits
from helpers.kills import content
from helpers.ray_runs import on_ray
from safetensors.numpy import load_file

from fedveil import Experiment, TrainingError, run
from fedveil.client.learning.protection import RESIDUALS
from fedveil.core.catalog import STRATEGIES
from fedveil.core.errors import Interrupted
from fedveil.core.record.record import Record
from fedveil.core.wire.messages import ARRAYS, to_arrays
from fedveil.server.checkpoint import FILE
from fedveil.server.federation import prepare, resolve
from fedveil.server.rounds.context import Hooks
from fedveil.simulations.display import Display
from fedveil.simulations.engine.cohort import CohortGrid
from fedveil.simulations.engine.states import DiskStates
from fedveil.simulations.run import CLIENTS

SMALL = {
    "data.clients": 6,
    "model.hidden": [16],
    "model.dropout": 0.2,
    "training.epochs": 1,
    "federation.cohort": 3,
    "federation.rounds": 4,
}
TENSORS, WEIGHTS = 4, 64 * 16 + 16 + 16 * 10 + 10
ENCODED = {"float16": 2 * WEIGHTS, "int8": WEIGHTS + 4 * TENSORS}  # bytes of an update
Watch = Callable[[int, int], None]


@pytest.fixture(autouse=True)
def no_plots(monkeypatch) -> None:
    """Pictures take longer than these little runs."""
    monkeypatch.setattr("fedveil.simulations.plots.draw", lambda federation, record: [])


def small(encoding: str, **settings) -> Experiment:
    return digits(SMALL | {"communication.encoding": encoding}, **settings)


def kept(folder: Path) -> dict[str, bytes]:
    """All that the next round takes from the ones before it, what each client keeps among it."""
    arrays = load_file(folder / FILE)
    found = {name: value.tobytes() for name, value in arrays.items() if not name.startswith(("rows/", "clients/"))}
    return found | {f"residuals/{client}": value.tobytes() for client, value in residuals(folder).items()}


def residuals(folder: Path) -> dict[int, np.ndarray]:
    """What int8 lost of each client's updates, float32 [P]."""
    arrays = load_file(folder / FILE)
    index = {name.removeprefix("clients/"): value for name, value in arrays.items() if name.startswith("clients/")}
    states = DiskStates(folder / CLIENTS, index)
    clients = index.get("residuals/slots", np.zeros((0, 2), np.int64))[:, 0]
    return {int(client): states.get(int(client), RESIDUALS)["lost"] for client in clients}


class StopAfter(Display):
    """Presses Ctrl-C when so many clients have replied."""

    def __init__(self, clients: int) -> None:
        super().__init__(None)
        self.left, self.before = clients, 0

    def client_done(self, done: int, total: int) -> None:
        self.left -= done - self.before
        self.before = done % total
        if self.left == 0:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("encoding", ENCODED)
def test_one_by_one_is_the_same_in_any_number_of_processes(encoding, tmp_path) -> None:
    alone = run(small(encoding, engine="sequential"), out=tmp_path / "alone")
    for workers in (2, 3):
        spread = run(small(encoding, engine="processes", workers=workers), out=tmp_path / str(workers))
        assert content(spread.run_dir) == content(alone.run_dir)
        assert kept(spread.run_dir) == kept(alone.run_dir)
    plain = run(small("float32", engine="sequential"), out=tmp_path / "plain")
    assert plain.summary["model_sha256"] != alone.summary["model_sha256"]
    ledgers = [pd.read_csv(result.run_dir / "ledger.csv") for result in (plain, alone)]
    npy = 128 * TENSORS + 4 * WEIGHTS
    assert (ledgers[0].bytes_up - ledgers[1].bytes_up).tolist() == [npy - ENCODED[encoding]] * 12
    assert ledgers[0].bytes_down.equals(ledgers[1].bytes_down)


@pytest.mark.parametrize("encoding", ENCODED)
def test_all_at_once_agrees_with_one_by_one_to_a_step_of_the_encoding(encoding, tmp_path) -> None:
    """A sum in another order may round to the next step."""
    runs = [run(small(encoding, engine=e, federation__rounds=1), out=tmp_path / e) for e in ("sequential", "batched")]
    plain = run(small("float32", engine="sequential", federation__rounds=1), out=tmp_path / "plain")
    for (name, alone), near in zip(plain.model.state_dict().items(), runs[1].model.state_dict().values(), strict=True):
        one = runs[0].model.state_dict()[name]
        step = {"float16": 2.0**-11, "int8": 2 * 0.5 / 127}[encoding]  # of weights below 1, and of moves below 0.5
        torch.testing.assert_close(near, one, rtol=0, atol=step)
        torch.testing.assert_close(one, alone, rtol=0, atol=step)


@pytest.mark.parametrize(
    ("encoding", "engine"),
    [("int8", "sequential"), ("int8", "processes"), ("int8", "batched"), ("float16", "batched")],
)
def test_a_stopped_run_goes_on_to_the_same_bytes(encoding, engine, tmp_path) -> None:
    experiment = small(encoding, engine=engine, federation__strategy="fedavgm")
    whole = run(experiment, out=tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(experiment, out=tmp_path / "cut", display=StopAfter(8))  # in round 3
    resumed = run(experiment, resume=tmp_path / "cut")
    assert content(tmp_path / "cut") == content(tmp_path / "whole")
    assert resumed.summary["bytes_up"] == whole.summary["bytes_up"]
    remembered = {name for name in kept(tmp_path / "cut") if name.startswith("residuals/")}
    taken_part = set(whole.clients.client) if encoding == "int8" else set()
    assert remembered == {f"residuals/{client}" for client in taken_part}
    assert kept(tmp_path / "cut") == kept(tmp_path / "whole")


def test_a_run_that_forgot_what_int8_lost_would_end_elsewhere(tmp_path, monkeypatch) -> None:
    """Else the test above could not fail."""
    experiment = small("int8", engine="sequential")
    whole = run(experiment, out=tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(experiment, out=tmp_path / "cut", display=StopAfter(8))
    monkeypatch.setattr(DiskStates, "get", lambda self, client, key: None)
    resumed = run(experiment, resume=tmp_path / "cut")
    assert resumed.summary["model_sha256"] != whole.summary["model_sha256"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_works_on_int8_and_ends_near_the_plain_run(strategy, tmp_path) -> None:
    settings = {"federation__strategy": strategy, "federation__rounds": 2, "engine": "batched", "workers": 1}
    settings |= {"training__proximal_mu": 0.1} if strategy == "fedprox" else {}
    settings |= {"federation__cohort": 6, "model__dropout": 0.0}
    plain = run(small("float32", **settings), out=tmp_path / "plain")
    encoded = run(small("int8", **settings), out=tmp_path / "encoded")
    assert encoded.metrics.failures.sum() == 0
    first, second = (result.metrics.test_loss.iloc[-1] for result in (plain, encoded))
    assert second == pytest.approx(first, rel=0.05)


def spoiled(update: ArrayRecord, **fields) -> ArrayRecord:
    """An update whose last tensor is another."""
    *_, name = update
    array = update[name]
    values = {"dtype": array.dtype, "shape": array.shape, "stype": array.stype, "data": array.data} | fields
    return ArrayRecord({**update, name: Array(**values)})


BAD = {
    "output.bias' is missing": lambda update: ArrayRecord(dict(list(update.items())[:-1])),
    "written as 'fedveil.float16'": lambda update: spoiled(update, stype="fedveil.float16"),
    "is 'float32' written as": lambda update: spoiled(update, dtype="float32"),
    "has the shape (2, 5), and the model's has (10,)": lambda update: spoiled(update, shape=(2, 5)),
    "has 13 bytes, and 14 make": lambda update: spoiled(update, data=update["output.bias"].data[:-1]),
    "is -1": lambda update: spoiled(update, data=struct.pack("<f10b", -1, *range(10))),
    "is nan": lambda update: spoiled(update, data=struct.pack("<f10b", np.nan, *range(10))),
    "is 'float32' written as 'numpy.ndarray'": lambda update: to_arrays({n: np.zeros(a.shape, "f4") for n, a in update.items()}),
}  # fmt: skip


@pytest.mark.parametrize("said", BAD)
def test_a_client_that_sends_what_is_no_int8_is_left_out_and_named(said, monkeypatch, tmp_path) -> None:
    answers = CohortGrid.answers

    def lying(self, messages: Sequence[Message], timeout: float | None = None) -> Iterator[tuple[int, Message]]:
        for i, reply in answers(self, messages, timeout):
            if messages[i].metadata.dst_node_id == 3 and messages[i].content["config"]["server-round"] == 2:
                reply.content[ARRAYS] = BAD[said](reply.content[ARRAYS])
            yield i, reply

    monkeypatch.setattr(CohortGrid, "answers", lying)
    result = run(small("int8", engine="sequential", federation__cohort=6, federation__rounds=3), out=tmp_path / "run")
    ledger = pd.read_csv(tmp_path / "run" / "ledger.csv")
    (failed,) = ledger[ledger.failure.notna()].itertuples()
    assert (failed.round, failed.client) == (2, 2)
    assert said in failed.failure
    assert result.metrics.failures.tolist()[1:] == [0, 1, 0]
    assert result.metrics.clients.tolist()[1:] == [6, 5, 6]


@pytest.mark.parametrize("engine", ["sequential", "batched"])
@pytest.mark.parametrize("encoding", ENCODED)
def test_training_that_diverges_ends_with_the_reason(encoding, engine, tmp_path) -> None:
    experiment = small(encoding, engine=engine, training__learning_rate=1e30, federation__rounds=2)
    with pytest.raises(TrainingError, match=r"round 1(.|\n)*diverged(.|\n)*smaller training.learning_rate"):
        run(experiment, out=tmp_path / "run")


def test_a_million_clients_keep_what_those_that_took_part_wrote(tmp_path) -> None:
    changes = {"communication.encoding": "int8", "federation.rounds": 2, "federation.cohort": 5}
    run(Experiment.preset("million").override(changes), out=tmp_path / "run")
    weights = sum(value.size for value in load_file(tmp_path / "run/model.safetensors").values())
    assert 5 < len(residuals(tmp_path / "run")) <= 10
    assert (tmp_path / "run" / CLIENTS / "residuals").stat().st_size <= 16 * 4 * weights


def test_flowers_simulation_remembers_what_int8_lost_before_it_and_in_it(tmp_path, monkeypatch) -> None:
    """Rounds 1 and 2 in this process, 3 and 4 on Ray."""
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")  # Ray keeps sockets there, whose paths must be short
    whole = run(small("int8", engine="sequential"), out=tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(small("int8", engine="sequential"), out=tmp_path / "cut", display=StopAfter(8))
    record = Record(tmp_path / "cut")
    federation = prepare(resolve(small("int8", engine="sequential")), record)
    assert federation.state.round == 2
    on_ray(federation, record, Hooks(lambda _row, _state: None, federation.evaluate), 1)
    assert record.sha256("model.safetensors") == whole.summary["model_sha256"]
    assert kept(tmp_path / "cut") == kept(tmp_path / "whole")
    assert federation.state.bytes_up == whole.summary["bytes_up"]
