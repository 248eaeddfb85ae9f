"""What protection costs: every row comes out of real processes with its bytes and errors, and targets are judged by it."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from benchmarks import bench, encryption, encryption_report, report, whole_runs
from benchmarks.own_ways import SharedMaskClient, SharedMaskServer
from benchmarks.peers import flower_secagg, tenseal_ways
from benchmarks.remote import AUTHENTICATION, Remote, cohort
from fedveil.core.settings.sections import Privacy
from fedveil.privacy.homomorphic import wire
from fedveil.privacy.plan import make_plan
from fedveil.privacy.secagg import vectors as masked

SIZE, CLIENTS, MANY = 20_000, 3, 5
MASKED_SIZE, MASKED_CLIENTS = 600, 12
HEADER = wire.HEADER.size + 4  # and the checksum
SUM = HEADER + 28 * CLIENTS  # and who is in it


@pytest.fixture(scope="module")
def found() -> dict:
    """A whole measurement, small, without the runs of MNIST."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encryption, "PARAMETERS", SIZE)
        patch.setattr(encryption, "CLIENTS", CLIENTS)
        patch.setattr(encryption, "MANY", MANY)
        patch.setattr(encryption, "MASKED_PARAMETERS", MASKED_SIZE)
        patch.setattr(encryption, "MASKED_CLIENTS", MASKED_CLIENTS)
        patch.setattr(whole_runs, "measure", lambda *_: ([], ["whole runs: left out"]))
        return encryption.measure({}, 1)


@pytest.fixture
def rows(found) -> dict[str, dict]:
    return {row["way"]: row for row in found["ways"]}


def chunks(numbers: int) -> int:
    """Ciphertexts of a vector, of which each holds so many numbers of ours."""
    return -(-SIZE // (numbers - 2))


def test_every_way_is_measured(found, rows) -> None:
    assert list(rows) == list(encryption.WAYS)
    assert json.loads(json.dumps(found)) == found
    for way, row in rows.items():
        assert min(row["client_s"], row["server_s"], row["once_s"]) > 0, way
        assert row["memory_mb"] >= 0, way
        assert (row["memory_many_mb"] is None) == (way == "naive"), way
        parts = [row[part] for part in AUTHENTICATION]
        assert (None in parts) == (way not in encryption.LATTICES), way
        if way in encryption.LATTICES:
            assert 0 < sum(parts[:-1]) < row["client_s"], way
            assert row["authentication"] == pytest.approx(sum(parts[:-1]) / (row["client_s"] - sum(parts[:-1])))
            assert row["tag_bytes"] == (14 if way == "bfv" else 15)
    assert rows["naive"]["client_ratio"] == rows["naive"]["server_ratio"] == 1
    assert found["ms_per_client"] == rows["ckks"]["client_s"] * 1e3


@pytest.mark.parametrize(
    ("way", "up", "down"),
    [
        ("plain", 4 * SIZE, 4 * SIZE),
        ("shared-mask", 4 * SIZE, 4 * SIZE),
        ("ckks", HEADER + chunks(4096) * (64 + 5 * 4096 + 15), SUM + chunks(4096) * (2 * 5 * 4096 + 15)),
        ("ckks, public API", HEADER + chunks(2048) * (2 * 5 * 4096 + 15), SUM + chunks(2048) * (2 * 5 * 4096 + 15)),
        ("bfv", HEADER + chunks(8192) * (64 + 7 * 4096 + 14), SUM + chunks(8192) * (2 * 7 * 4096 + 14)),
    ],
)
def test_bytes_are_what_the_formats_say(rows, way, up, down) -> None:
    assert (rows[way]["upload_bytes"], rows[way]["download_bytes"]) == (up, down)
    assert rows[way]["upload"] == up / SIZE


def test_the_bytes_of_others_are_what_was_published_of_them(rows) -> None:
    slots = 4096
    whole = slots * -(-SIZE // slots)
    by_layer = sum(slots * -(-(part.stop - part.start) // slots) for part in tenseal_ways.layers(SIZE))
    assert rows["naive"]["upload_bytes"] == pytest.approx(81.2 * whole, rel=0.02)
    assert rows["flare"]["upload_bytes"] == pytest.approx(57.6 * by_layer, rel=0.02)
    assert rows["flare"]["download_bytes"] == pytest.approx(32.2 * by_layer, rel=0.02)


@pytest.mark.parametrize("way", ["shared-mask", "ckks", "ckks, public API", "bfv", "secagg"])
def test_errors_are_of_the_grid_and_no_more(rows, way) -> None:
    protection = {"shared-mask": "secagg", "ckks, public API": "ckks"}.get(way, way)
    rounding = make_plan(Privacy(protection=protection), CLIENTS).rounding
    assert 0 < rows[way]["error"] <= CLIENTS * rounding + 1e-7  # and float32's own


def test_errors_of_others_are_small(rows) -> None:
    assert 0 < rows["plain"]["error"] < 1e-7
    assert 0 < rows["naive"]["error"] < 1e-6
    assert 0 < rows["flare"]["error"] < 1e-6


def test_naive_holds_every_ciphertext(rows) -> None:
    ciphertext = 2 * 3 * 8192 * 8  # three primes
    upload = -(-SIZE // 4096) * ciphertext / 1e6
    assert rows["naive"]["memory_mb"] > CLIENTS * upload
    assert 0.5 * upload < rows["naive"]["memory_each_mb"] < 3 * upload  # memory comes in larger pieces


def test_secure_aggregation_stands_beside_flowers(found) -> None:
    own, flower = found["secagg"]["fedveil"], found["secagg"]["flower"]
    assert own["masked_bytes"] == masked.BEFORE + 4 * (2 + MASKED_SIZE)
    assert own["upload_bytes"] == own["masked_bytes"] + own["other_bytes"]
    assert flower["masked_bytes"] == pytest.approx(8 * (1 + MASKED_SIZE), abs=300)  # int64, and NumPy's headers
    assert 0 < own["error"] < 1e-6
    assert 0 < flower["error"] < 1e-3
    for row in (own, flower):
        assert min(row["client_s"], row["round_s"], row["server_dropped_s"], row["other_bytes"]) > 0


def test_targets_are_judged_by_what_was_found(found, rows) -> None:
    judged = {(target["row"], target["quantity"]): target for target in found["targets"]}
    assert len(judged) == len(encryption.TARGETS)
    assert judged["bfv", "upload"] == {
        "row": "bfv", "quantity": "upload", "most": 3.7, "found": rows["bfv"]["upload"], "reached": False
    }  # fmt: skip  # so small a vector does not fill its last ciphertext
    assert judged["ckks", "upload"]["reached"] is True
    assert judged[encryption.MASKED_ROW, "masked_ratio"]["found"] == found["secagg"]["fedveil"]["masked_ratio"]
    assert judged[encryption.SHORT_ROW, "added_ms"]["reached"] is None


def test_the_table_and_the_page_say_it(found, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(encryption, "measure", lambda *_: found)
    page = tmp_path / "performance.md"
    page.write_text("before\n<!-- encryption -->\nold\n<!-- end of encryption -->\nafter\n")
    bench.bench(["encryption"], settings={}, peers={}, repeats=1, as_json=True, write=page)
    printed = json.loads(capsys.readouterr().out)
    assert {"ms_per_client", "naive_ms_per_client", "flare_ms_per_client", "machine", "command", "date"} <= set(printed)
    assert "tenseal" in printed["versions"]
    written = page.read_text()
    assert written.startswith("before\n<!-- encryption -->\nMeasured on ")
    assert "old" not in written
    for row in found["ways"]:
        assert f"\n| {row['way']} | {row['upload']:.2f} | {row['download']:.2f} | " in written
    assert "| bfv | upload, bytes a parameter | 3.7 | " in written
    assert "- whole runs: left out" in written
    text = io.StringIO()
    Console(file=text, width=300).print(encryption_report.table(found))
    assert "Flower's SecAgg+" in text.getvalue()
    assert "not measured" in text.getvalue()


def test_the_documented_page_can_be_measured_again() -> None:
    report.check_page(Path(__file__).parents[2] / "docs" / "performance.md", "encryption")


def test_whole_runs_take_the_short_run_off_the_long_one(monkeypatch) -> None:
    cost = {"none": 0.005, whole_runs.PROTECTION: 0.012}  # seconds a client
    monkeypatch.setattr(
        whole_runs,
        "_cpu_seconds",
        lambda job, protection, rounds, settings: 3.0 + rounds * whole_runs.COHORT * cost[protection],
    )
    rows, notes = whole_runs.measure({}, 2)
    assert notes == []
    assert [row["job"] for row in rows] == [encryption.SHORT_ROW, encryption.LONG_ROW]
    for row in rows:
        assert row["plain_ms"] == pytest.approx(5)
        assert row["added_ms"] == pytest.approx(7)
        assert row["times"] == pytest.approx(2.4)
    text = encryption_report._whole({"whole_runs": rows})
    assert text[2][0] == [encryption.SHORT_ROW, "5", "12", "7", "2.400"]


def test_a_run_that_fails_is_a_note_and_one_that_does_not_takes_time(monkeypatch) -> None:
    monkeypatch.setattr(whole_runs, "JOBS", (whole_runs.Job("no-such-preset", 1, (1, 2)),))
    rows, (note,) = whole_runs.measure({}, 1)
    assert rows == []
    assert note.startswith("no-such-preset, 1 local epochs, bfv: not measured: ")
    assert whole_runs._cpu_seconds(whole_runs.Job("digits", 1, (1, 2)), "none", 1, {}) > 0


def test_a_remote_server_counts_memory_and_reads_files_itself(tmp_path) -> None:
    (tmp_path / "upload").write_bytes(bytes(40_000_000))
    server = Remote(bytearray, 8)
    assert bytes(server.call("copy")) == bytes(8)
    assert server.grown_mb < 10
    server.call("extend", tmp_path / "upload")
    assert 80 <= server.grown_mb < 200  # the upload, and what holds it
    assert {name: len(times) for name, times in server.seconds.items()} == {"copy": 1, "extend": 1}
    server.close()


@pytest.mark.parametrize(
    ("client", "server"),
    [
        (tenseal_ways.NaiveClient, tenseal_ways.NaiveServer),
        (tenseal_ways.FlareClient, tenseal_ways.FlareServer),
    ],
    ids=["naive", "flare"],
)
def test_the_servers_of_others_hold_no_secret(client, server, tmp_path) -> None:
    client(tmp_path, 10, 2)
    context = server(tmp_path, 10, 2)._context
    assert not context.has_secret_key()


def test_layers_cut_a_vector_without_gaps() -> None:
    assert sum(tenseal_ways.LAYERS) == 1_000_000
    for size in (1_000_000, 55_050, 17):
        parts = tenseal_ways.layers(size)
        assert np.array_equal(np.concatenate([np.arange(size)[part] for part in parts]), np.arange(size))


def test_the_shared_mask_leaves_the_server_noise(tmp_path) -> None:
    weights, examples = cohort(2000, 4)
    client, server = SharedMaskClient(tmp_path, 2000, 4), SharedMaskServer(tmp_path, 2000, 4)
    for number in range(4):
        server.add(client.protect(weights[number], number, examples[number], sum(examples)), number, 1, 1)
    held = np.frombuffer(server.total(), np.int32) / 2**31
    assert abs(held.std() - 3**-0.5) < 0.05  # uniform over the ring; weights of 0.05 would be 0.008
    mean = client.open(server.total(), 4, sum(examples))
    assert np.allclose(mean, np.average(weights, axis=0, weights=examples), atol=1e-6)


def test_flowers_protocol_gives_the_mean_of_those_who_stay() -> None:
    weights, examples = cohort(50, 9)
    protocol = flower_secagg.Protocol(weights, examples, 5, 3)
    for neighbours in protocol.neighbours:
        assert len(neighbours) == 5
    for dropped in (set(), {4}):
        there = [client for client in range(9) if client not in dropped]
        mean, _, _ = protocol.total(dropped)
        expected = np.average([weights[k] for k in there], axis=0, weights=[examples[k] for k in there])
        assert np.abs(mean - expected).max() < 1e-4
