"""Updates that a registered client must not send: refused, counted, named by its number; the round goes on with the others."""

from __future__ import annotations

import math
import os
import ssl
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest
from deployment.federations import PORT, Federation, Run, federated
from flwr.proto.message_pb2 import PushObjectRequest
from helpers.machines import END

from fedveil.client.node import greeting

LIMIT = 8.0  # MiB that a client may send for one message
# What client 3 does to its update, and what the record says of it.
REFUSED = {
    "not finite": "not finite",
    "infinite": "not finite",
    "loss not finite": "diverged",
    "other shape": "has the shape (15, 64)",
    "float64": "float64",
    "objects": "is no float32 array of shape",
    "truncated": "bytes",
    "empty": "is no float32 array of shape",
    "other encoding": "communication.encoding = 'float32'",
    "no weights": "no weights",
    "no metrics": "no number",
    "no examples": "where a whole number from 1 belongs",
    "another client": "calls itself client",
    "cut parcel": "no parcel of FedVeil: Error while deserializing",
    "noise": "no parcel of FedVeil",
    "no parcel": "its message is no parcel of FedVeil",
}


@pytest.fixture(scope="module")
def federation(folder: Path) -> Iterator[Federation]:
    with federated(folder) as made:
        made.start("--max-update", str(LIMIT))
        yield made


@pytest.fixture(scope="module")
def run(federation: Federation) -> Iterator[Run]:
    """A run in whose second round client 3 begins to misbehave, each round in another way, and which then goes on."""
    federation.tell(3, dict(enumerate(REFUSED, start=2)))
    settings = {"federation.rounds": 9999, "federation.quorum": 2, "federation.deadline": 60}
    started = federation.order(settings)
    started.gets_to(len(REFUSED) + 2)
    yield started
    if started.status == "running":
        started.stop()


@pytest.mark.parametrize("deed", REFUSED)
def test_an_update_that_is_wrong_is_refused_and_named_and_the_round_goes_on(run: Run, deed: str) -> None:
    number = list(REFUSED).index(deed) + 2
    assert run.clients(number) == [1, 2]
    assert REFUSED[deed] in run.failure(number, 3)
    assert f"warning: round {number}: client-3: {run.failure(number, 3).splitlines()[0]}" in run.log
    row = run.table("metrics.csv")[number]
    assert (row["clients"], row["failures"]) == ("2", "1")
    assert math.isfinite(float(row["test_loss"]))


def test_a_client_that_stops_lying_counts_again(run: Run) -> None:
    assert run.clients(1) == [1, 2, 3]
    assert run.clients(len(REFUSED) + 2) == [1, 2, 3]
    run.counted_once()


def test_an_update_larger_than_the_server_allows_is_refused_and_the_client_named(
    federation: Federation, run: Run
) -> None:
    before = run.round
    federation.tell(3, {0: "large"})
    run.says("client-3 was refused: an update of more than 8 MiB")
    number = next(n for n in range(before + 1, run.round + 2) if n > run.round or 3 not in run.clients(n))
    run.gets_to(number)
    assert run.clients(number) == [1, 2]
    assert run.failure(number, 3)
    again = run.counts(3, after=number)
    assert run.clients(again) == [1, 2, 3]
    run.counted_once()


def most_memory(process: int) -> int:
    """The most bytes that a process ever held."""
    status = Path(f"/proc/{process}/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


@pytest.mark.parametrize("length", [{}, {"Content-Length": str(1 << 30)}], ids=["of unknown length", "declared"])
def test_a_gigabyte_in_one_call_is_refused_before_the_server_holds_it(
    federation: Federation, run: Run, length: dict[str, str]
) -> None:
    assert federation.server is not None
    keys, host = federation.keys / "client-3", federation.hosts[3]
    trust = ssl.create_default_context(cafile=str(keys / "ca.pem"))
    before = most_memory(federation.server.process.pid)
    sent = 0

    def gigabyte() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(1024):
            sent += 1 << 20
            yield bytes(1 << 20)

    def push() -> int:
        url = f"https://{federation.at.address}:{PORT}/v1/fleet/push-object"
        try:
            headers = greeting._signed(keys / "identity.key", datetime.now(UTC)) | length
            return httpx.post(url, content=gigabyte(), headers=headers, verify=trust, timeout=END).status_code
        except (httpx.WriteError, httpx.RemoteProtocolError):  # closed while this still sent
            return 413

    assert host.call(push) in (411, 413)
    assert sent < 256 << 20  # refused by its headers, whatever is on the way
    assert most_memory(federation.server.process.pid) < before + (100 << 20)
    number = run.round
    run.gets_to(number + 2)


def test_a_gigabyte_in_pieces_is_refused_before_the_server_keeps_it(federation: Federation, run: Run) -> None:
    keys, host = federation.keys / "client-3", federation.hosts[3]
    trust = ssl.create_default_context(cafile=str(keys / "ca.pem"))
    disk = federation.state / "superlink.db"
    before = disk.stat().st_size

    def push() -> list[int]:
        piece = PushObjectRequest(object_id="0" * 64, object_content=os.urandom(4 << 20)).SerializeToString()
        url = f"https://{federation.at.address}:{PORT}/v1/fleet/push-object"
        with httpx.Client(verify=trust, timeout=END) as line:
            return [
                line.post(
                    url, content=piece, headers=greeting._signed(keys / "identity.key", datetime.now(UTC))
                ).status_code
                for _ in range(8)
            ]

    answers = host.call(push)
    assert 200 not in answers[2:]
    assert 413 in answers
    assert disk.stat().st_size < before + (16 << 20)
    number = run.round
    run.gets_to(number + 2)
