"""A deployed round's figures: parts add up along the client that comes last, bytes and memory are counted whole."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import claims.deployed as deployed_claims
import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from benchmarks import bench, deployment, deployment_report, report
from benchmarks.bare_app import BareRun
from benchmarks.deployed import Deployed, round_ends
from benchmarks.deployment import CLIENTS, JOBS, PARTS, bare_figures, figures, judge, own_parts, side_by_side
from benchmarks.memory import Watch
from benchmarks.party import ARRIVED, CALL, PUSHED, RECEIVED, TRAINED, Note
from benchmarks.peers import flower_app
from benchmarks.traffic import Meter
from fedveil.core.errors import FedveilError, SettingsError
from fedveil.core.examples import Task
from fedveil.core.randomness import Stream
from fedveil.models.networks.build import build

SECONDS = st.floats(0.001, 100)


def round_notes(begin: float, spent: list[list[float]], push: float) -> list[Note]:
    """Notes of a round in which each client takes so long to have, to train and to send."""
    notes = [Note(begin + push, PUSHED, -1)]
    for client, seconds in enumerate(spent):
        when = begin + push
        for what, part in zip((RECEIVED, TRAINED, ARRIVED), seconds, strict=True):
            when += part
            notes.append(Note(when, what, client))
    return sorted(notes, key=lambda note: note.when)


@given(st.lists(st.lists(SECONDS, min_size=3, max_size=3), min_size=1, max_size=5), SECONDS, SECONDS)
def test_the_parts_of_a_round_are_those_of_the_client_that_comes_last_and_add_up(spent, push, rest) -> None:
    slowest = max(spent, key=sum)
    end = 1000 + push + sum(slowest) + rest
    parts = own_parts(round_notes(1000.0, spent, push), 1000.0, end)
    assert tuple(parts) == PARTS
    assert sum(parts.values()) == pytest.approx(end - 1000)
    dispatch, training, upload = slowest
    assert list(parts.values()) == pytest.approx([push, dispatch, 0, training, upload, rest], abs=1e-6)


def test_a_client_that_has_its_message_before_all_lie_ready_waits_for_nothing() -> None:
    notes = [Note(1.0, RECEIVED, 0), Note(2.0, PUSHED, -1), Note(3.0, TRAINED, 0), Note(4.0, ARRIVED, 0)]
    assert own_parts(notes, 0.0, 5.0) == {
        "push": 1,
        "dispatch": 0,
        "start": 0,
        "training": 2,
        "upload": 1,
        "aggregation": 1,
    }


@pytest.mark.parametrize("missing", [PUSHED, RECEIVED, TRAINED, ARRIVED])
def test_a_round_of_which_a_note_is_missing_is_refused(missing) -> None:
    notes = [note for note in round_notes(0.0, [[1.0, 1.0, 1.0]], 1.0) if note.what != missing]
    with pytest.raises(FedveilError, match="nothing tells what happened"):
        own_parts(notes, 0.0, 10.0)


@given(st.floats(0, 4e9), st.sampled_from([PUSHED, CALL, ARRIVED, RECEIVED, TRAINED]), st.integers(-1, 1000))
def test_a_note_is_read_as_it_was_written(when, what, client) -> None:
    assert Note.parse(str(Note(when, what, client))) == Note(when, what, client)


def bare_round(begin: float, *spent: float) -> dict[str, float]:
    times = begin + np.cumsum(spent)
    return dict(zip(("pushed", "started", "ready", "trained", "gathered", "end"), times, strict=True)) | {
        "replies": CLIENTS
    }


def test_a_bare_run_counts_its_rounds_after_the_first() -> None:
    rounds = [bare_round(0, 9, 9, 9, 9, 9, 9), bare_round(54, 1, 2, 3, 4, 5, 6), bare_round(75, 1, 2, 5, 4, 5, 6)]
    found = bare_figures(BareRun(rounds, {"server": 100.0, "client-1": 20.0, "client-2": 30.0}))
    assert found["round_s"] == 22
    assert found["parts_s"] == dict(zip(PARTS, (1, 2, 4, 4, 5, 6), strict=True))
    assert (found["server_mb"], found["client_mb"]) == (100, 30)
    rounds[1]["replies"] = CLIENTS - 1
    with pytest.raises(FedveilError, match=r"lost a client: \[3, 2, 3\] replied"):
        bare_figures(BareRun(rounds, {}))


def run_of(rounds: int, each: float = 2.0) -> Deployed:
    """A run whose rounds take `each` seconds, and that sends 110 bytes up and 220 down where the ledger has 100 and 200."""
    spent = [[0.2, 0.5 + 0.1 * client, 0.3] for client in range(CLIENTS)]
    notes = [note for number in range(rounds) for note in round_notes(number * each, spent, 0.1)]
    notes += [Note(number * each + 0.01 * i, CALL, -1) for number in range(rounds) for i in range(30)]
    names = [(str(number), str(client)) for number in range(1, rounds + 1) for client in range(CLIENTS)]

    def wire(begin: float, end: float) -> tuple[int, int, int]:
        messages = round((end - begin) / each) * CLIENTS
        return 110 * messages, 220 * messages, 2 * messages

    return Deployed(
        {number: number * each for number in range(rounds + 1)},
        sorted(notes, key=lambda note: note.when),
        [{"round": number, "client": client, "bytes_up": "100", "bytes_down": "200"} for number, client in names],
        [{"round": number, "client": client, "stage": "train", "examples": "479"} for number, client in names],
        wire,
        lambda until: {"server": 100 + until, **{f"client-{k + 1}": 10.0 * k + until for k in range(CLIENTS)}},
    )


def test_the_first_round_and_the_last_are_not_counted() -> None:
    found = figures(run_of(5))
    assert found["round_s"] == 2
    assert found["parts_s"] == pytest.approx(dict(zip(PARTS, (0.1, 0.2, 0, 0.7, 0.3, 0.7), strict=True)))
    assert [found[key] for key in ("wire_up", "payload_up", "wire_down", "payload_down")] == [110, 100, 220, 200]
    assert found["wire_ratio"] == pytest.approx(1.1)
    assert (found["calls"], found["connections"]) == (10, 2)
    assert (found["server_mb"], found["client_mb"]) == (108, 28)  # when the last round that counts was whole


def test_the_log_of_a_run_tells_when_rounds_were_whole(tmp_path) -> None:
    log = tmp_path / "run.log"
    log.write_text(
        "2026-11-21 12:00:00,250 client-1 takes part with 479 examples\n"
        "2026-11-21 12:00:01,500 round 0/12  test_accuracy 0.1\n"
        "2026-11-21 12:00:03,750 round 1/12  train_loss 2 test_accuracy 0.5\n"
        "2026-11-21 12:00:04,000 warning: round 2: client-3: its connection was lost\n"
        "2026-11-21 12:00:06,125 round 2/12  \n"
    )
    start = datetime(2026, 11, 21, 12).timestamp()
    assert round_ends(log) == {0: start + 1.5, 1: start + 3.75, 2: start + 6.125}


@given(st.lists(st.tuples(st.integers(1, 300_000), st.integers(1, 300_000)), min_size=1, max_size=4))
def test_a_meter_counts_every_byte_both_ways(sizes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            for asked, given_back in sizes:
                connection, _ = server.accept()
                with connection:
                    left = asked
                    while left:
                        left -= len(connection.recv(65536))
                    connection.sendall(bytes(given_back))

        thread = threading.Thread(target=answer)
        thread.start()
        begin = time.time()
        with Meter(server.getsockname()[1]) as meter:
            for asked, given_back in sizes:
                with socket.create_connection(("127.0.0.1", meter.port)) as client:
                    client.sendall(bytes(asked))
                    answered = 0
                    while piece := client.recv(65536):
                        answered += len(piece)
                    assert answered == given_back
            thread.join()
        ups, downs = zip(*sizes, strict=True)
        assert meter.between(begin, time.time()) == (sum(ups), sum(downs), len(sizes))
        assert meter.between(0, begin) == (0, 0, 0)


def test_a_meter_before_nobody_closes_the_connection() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with Meter(port) as meter, socket.create_connection(("127.0.0.1", meter.port)) as client:
        assert client.recv(1) == b""


def test_memory_counts_what_a_process_started_and_keeps_the_peak() -> None:
    grandchild = "import time; held = bytearray(60_000_000); del held; time.sleep(30)"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}])"
    with subprocess.Popen([sys.executable, "-c", child], start_new_session=True) as process:
        try:
            with Watch({"one": process.pid}) as watch:
                deadline = time.monotonic() + 60
                while watch.peaks_mb()["one"] < 60:
                    assert time.monotonic() < deadline, watch.peaks_mb()
                    time.sleep(0.05)
            assert watch.peaks_mb()["one"] < 200
            assert watch.peaks_mb(until=0) == {"one": 0}
        finally:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.preset)
def test_the_bare_app_trains_a_network_as_large_as_the_presets(job) -> None:
    classes = ("ham", "spam") if job.bare["model"] == "lstm" else tuple("0123456789")
    task = Task("text", (64,), classes, 4000) if job.bare["model"] == "lstm" else Task("images", (1, 8, 8), classes)
    sizes = [
        sum(weight.numel() for weight in network.parameters())
        for network in (build(task, job.experiment.model, Stream(0)), flower_app.network(dict(job.bare)))
    ]
    assert sizes[0] == sizes[1]
    assert (job.experiment.training.epochs, job.experiment.training.batch_size) == (
        job.bare["epochs"],
        job.bare["batch_size"],
    )


def test_the_bare_app_says_when_it_was_started_and_trained() -> None:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    threads = torch.get_num_threads()
    job = {**JOBS[0].bare, "examples": 30}
    arrays = ArrayRecord(flower_app.network(job).state_dict())
    content = RecordDict({"arrays": arrays, "config": ConfigRecord({"job": json.dumps(job)})})
    context = Context(1, 1, {"partition-id": 0}, RecordDict(), {})
    begin = time.time()
    try:
        reply = flower_app.train(Message(content, dst_node_id=1, message_type="train"), context)
    finally:
        torch.set_num_threads(threads)
    told = reply.content["metrics"]
    assert told["num-examples"] == 30
    assert told["started"] < begin <= told["ready"] < told["trained"] <= time.time()
    before, after = (record.to_torch_state_dict() for record in (arrays, reply.content["arrays"]))
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)


@pytest.fixture
def found() -> dict:
    """A measurement of digits without that of sms-lstm, as where its data is not there."""
    own = [figures(run_of(5, each)) for each in (2.0, 4.0, 3.0)]
    rounds = [bare_round(54 * i, *(6 * [9])) for i in range(3)]
    bare = [bare_figures(BareRun(rounds, {"server": 100.0, "client-1": 20.0}))] * 3
    row = side_by_side("digits", own, bare)
    return {
        "job": "deployment",
        "clients": CLIENTS,
        "rows": [row],
        "targets": judge({"digits": row}),
        "notes": ["sms-lstm: not measured"],
    }


def test_runs_stand_side_by_side_and_targets_are_judged(found) -> None:
    (row,) = found["rows"]
    assert (row["round_s"], row["round_s_range"], row["bare_round_s"], row["speedup"]) == (3, [2, 4], 54, 18)
    assert row["parts_s"]["aggregation"] == pytest.approx(1.7)
    judged = {(target["job"], target["quantity"]): target["reached"] for target in found["targets"]}
    assert judged == {
        ("digits", "round_s"): True, ("digits", "wire_ratio"): True, ("sms-lstm", "round_s"): None,
        ("sms-lstm", "wire_ratio"): None,
    }  # fmt: skip
    assert judge({"digits": {"round_s": 3.01}})[0]["reached"] is False


def test_the_table_and_the_page_say_it(found, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(deployment, "measure", lambda *_: found)
    page = tmp_path / "performance.md"
    page.write_text("before\n<!-- deployment -->\nold\n<!-- end of deployment -->\nafter\n")
    bench.bench(["deployment"], settings={}, peers={}, repeats=3, as_json=True, write=page)
    printed = json.loads(capsys.readouterr().out)
    assert {"rows", "targets", "clients", "machine", "command", "date", "repeats"} <= set(printed)
    written = page.read_text()
    assert "old" not in written
    assert "| digits | 3 [2 to 4] | 54 [54 to 54] | 18.0x |" in written
    assert "| digits | FedVeil | 0.10 | 0.20 | 0.00 | 0.70 | 0.30 | 1.70 |" in written
    assert "| digits | 0.1 | 0.1 | 0.2 | 0.2 | 1.100 | 10.0 | 2.0 |" in written
    assert "| sms-lstm | seconds a round | 3 | not measured |  |" in written
    assert "- sms-lstm: not measured" in written
    text = io.StringIO()
    Console(file=text, width=200).print(deployment_report.table(found))
    assert "bytes on the wire, of the ledger's" in text.getvalue()


def test_settings_of_an_engine_are_refused(tmp_path) -> None:
    with pytest.raises(SettingsError, match="--workers: deployed clients are processes of their own"):
        bench.bench(["deployment"], settings={"workers": 2}, peers={})


def test_the_documented_page_can_be_measured_again() -> None:
    report.check_page(Path(__file__).parents[2] / "docs" / "performance.md", "deployment")


def test_a_claim_of_many_clients_asks_for_whole_rounds_and_settled_memory() -> None:
    run = run_of(4)
    many = deployed_claims.judge(run, CLIENTS, 4)
    assert (many.whole, many.seconds, many.server_mb, many.client_mb) == (4, 2, 108, 28)
    assert (many.server_growth_mb, many.client_growth_mb) == (4, 4)  # a megabyte a second, from round 2
    assert many.holds
    for changed in (
        [row for row in run.clients if (row["round"], row["client"]) != ("3", "1")],
        [*run.clients, run.clients[-1]],
    ):
        lacking = SimpleNamespace(clients=changed, memory=run.memory, ends=run.ends)
        assert deployed_claims.judge(lacking, CLIENTS, 4).whole == 3
        assert not deployed_claims.judge(lacking, CLIENTS, 4).holds
    growing = SimpleNamespace(
        clients=run.clients, ends=run.ends, memory=lambda until: dict.fromkeys(("server", "client-1"), 20 * until)
    )
    assert not deployed_claims.judge(growing, CLIENTS, 4).holds


@pytest.mark.long
def test_five_clients_on_one_machine_are_in_every_round() -> None:
    many = deployed_claims.measure(clients=5, rounds=3)
    assert many.holds, many
