"""Orders to a server: where it is, what is agreed, which words travel, and what its errors become here."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
import typer

from fedveil import machines
from fedveil.core.errors import DataError, DeploymentError, Interrupted, ProtectionError, SettingsError, TrainingError
from fedveil.core.settings.experiment import Experiment
from fedveil.core.settings.sections import Privacy
from fedveil.remote import Server, as_agreed, vocabulary


@pytest.mark.parametrize(
    ("words", "url"),
    [
        ("localhost", "http://localhost:9093"),
        ("localhost:1234", "http://localhost:1234"),
        ("10.0.0.1", "http://10.0.0.1:9093"),
        ("[::1]", "http://[::1]:9093"),
        ("[::1]:77", "http://[::1]:77"),
    ],
)
def test_a_server_is_a_host_with_or_without_a_port(words, url) -> None:
    assert Server(words)._url == url


@pytest.mark.parametrize("words", ["localhost:http", "localhost:", "::1:x"])
def test_what_is_no_address_is_refused(words) -> None:
    with pytest.raises(SettingsError, match="must be HOST or HOST:PORT"):
        Server(words)


def test_no_server_is_said_with_the_way_to_one() -> None:
    with pytest.raises(DeploymentError, match=r"no server answers there.*SSH tunnel"):
        Server("127.0.0.1:1").ask("/status")


def answering(status: int, body: Any) -> Server:
    """A server that answers every call alike."""
    server = Server("localhost")
    content = body if isinstance(body, str) else json.dumps(body)
    handler = httpx.MockTransport(lambda _request: httpx.Response(status, text=content))
    headers = {"authorization": "Bearer none"}  # it has found its token
    server._client = httpx.Client(base_url="http://localhost:9093", transport=handler, headers=headers)
    return server


def test_what_is_no_fedveil_server_is_named() -> None:
    with pytest.raises(DeploymentError, match="no FedVeil server's control port"):
        answering(200, "<html>hello</html>").ask("/status")


@pytest.mark.parametrize(("code", "kind"), [(2, SettingsError), (1, DeploymentError)])
def test_the_servers_errors_are_raised_here_as_what_they_are(code, kind) -> None:
    with pytest.raises(kind, match="epochs"):
        answering(400, {"error": "epochs: must be 1", "exit_code": code}).ask("/runs", {})


@pytest.mark.parametrize(("status", "kind"), [("failed", TrainingError), ("stopped", Interrupted)])
def test_a_run_that_is_not_done_raises_why(status, kind) -> None:
    told = {"run": "r", "status": status, "result": {"error": "too few"}, "record": "/r", "text": "", "offset": 0}
    with pytest.raises(kind, match="too few"):
        answering(200, told).follow("r", lambda _line: None)


def test_the_agreed_privacy_is_taken_over_and_said() -> None:
    said: list[str] = []
    agreed = Privacy(protection={"name": "bfv", "min_clients": 4})
    experiment = as_agreed(Experiment.preset("digits"), agreed, said.append)
    assert experiment.privacy == agreed
    assert said == ["privacy  bfv, as agreed when the federation's keys were made"]
    said.clear()
    assert as_agreed(experiment, agreed, said.append) == experiment
    assert said == []


def test_another_privacy_than_the_agreed_one_is_refused_by_its_name() -> None:
    asked = Experiment.preset("digits").override({"privacy.protection": "ckks"})
    with pytest.raises(
        ProtectionError, match=r"privacy.protection = 'ckks': this federation's keys were made for 'bfv'"
    ):
        as_agreed(asked, Privacy(protection="bfv"), print)


@pytest.mark.parametrize("agreed", ["secagg", "ckks", "bfv"])
def test_a_protection_that_was_asked_for_by_name_is_not_overruled_in_silence(agreed) -> None:
    asked = Experiment.preset("digits").override({"privacy.protection": "none"})
    with pytest.raises(ProtectionError, match=f"'none': this federation's keys were made for '{agreed}'"):
        as_agreed(asked, Privacy(protection=agreed), print, {"privacy.protection"})
    with pytest.raises(ProtectionError, match=r"privacy.protection.min_clients = 3"):
        as_agreed(
            Experiment.preset("digits").override({"privacy.protection": agreed}),
            Privacy(protection={"name": agreed, "min_clients": 4}), print, {"privacy.protection.min_clients"},
        )  # fmt: skip


def test_settings_that_cannot_work_with_the_agreed_privacy_are_refused() -> None:
    asked = Experiment.preset("digits").override({"federation.strategy": "fedmedian"})
    with pytest.raises(SettingsError):
        as_agreed(asked, Privacy(protection="bfv"), print)


def test_words_travel_where_clients_need_them() -> None:
    spam = Experiment.preset("spam-demo")
    words = vocabulary(spam).split("\n")
    assert words[:2] == ["<padding>", "<unknown>"]
    assert len(words) > 100
    assert vocabulary(spam.override({"data.vocabulary": "hashed"})) == ""
    assert vocabulary(Experiment.preset("digits")) == ""


def test_words_of_a_file_travel_too(tmp_path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("free\nwin\n")
    experiment = Experiment.preset("spam-demo").override({"data.vocabulary": str(path)})
    assert vocabulary(experiment) == "<padding>\n<unknown>\nfree\nwin"


def test_words_that_cannot_be_had_are_an_error_that_names_the_way_out(monkeypatch) -> None:
    from fedveil.datasets import federated

    def missing(*_given: Any) -> None:
        raise DataError("sms: not here")

    monkeypatch.setattr(federated, "load", missing)
    with pytest.raises(DataError, match=r"take data\.vocabulary = 'hashed'"):
        vocabulary(Experiment.preset("sms-lstm"))


def test_ctrl_c_ends_the_view_of_a_run_and_is_no_error(capsys) -> None:
    class Followed:
        def follow(self, *_given: Any) -> Any:
            raise KeyboardInterrupt

    with pytest.raises(typer.Exit) as ended:
        machines._follow(Followed(), "localhost", "r", 0, None, False)  # type: ignore[arg-type]
    assert ended.value.exit_code == 130
    assert capsys.readouterr().err == "r goes on on the server; end it with: fedveil stop r --on localhost\n"
