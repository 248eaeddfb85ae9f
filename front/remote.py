"""The command line's client of a running server, on the server's machine or through an SSH tunnel."""

from __future__ import annotations

import os
import re
import time
import tomllib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, cast

import httpx

from fedveil.core.errors import (
    DataError,
    DeploymentError,
    FedveilError,
    Interrupted,
    ProtectionError,
    SettingsError,
    TrainingError,
)
from fedveil.core.foreign import legible, printable, reading
from fedveil.core.settings import legacy
from fedveil.core.settings.choice import ProtectionChoice
from fedveil.core.settings.experiment import Experiment
from fedveil.core.settings.keys import values
from fedveil.core.settings.sections import Privacy
from fedveil.server.serving.tokens import TOKEN_FILE, new_token, proof, read_token, same

PORT = 9093
FOLLOW = 0.3  # seconds between polls of a run


class Server:
    """The control interface of a server at HOST or HOST:PORT."""

    def __init__(self, words: str) -> None:
        found = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^:\s/\[\]]+)(?::(\d{1,5}))?", words)
        if found is None:
            raise SettingsError(f"--on {words}: must be HOST or HOST:PORT, as in localhost:{PORT}")
        host, port = found[1], found[2] or str(PORT)
        self._words, self._url = words, f"http://{host}:{port}"
        self._port = int(port)
        # orders travel in plain HTTP, on loopback or through a tunnel: never through a proxy
        self._client = httpx.Client(base_url=self._url, timeout=60, trust_env=False)

    def ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the server's answer; raise DeploymentError where none comes, or the error that the server tells."""
        if "authorization" not in self._client.headers:
            self._client.headers["authorization"] = f"Bearer {self._token()}"
        return self._ask(path, body)

    def _token(self) -> str:
        """Return the server's token, from the file that the environment names, or from its own on this machine."""
        if named := os.environ.get(TOKEN_FILE):
            try:
                found = read_token(Path(named).expanduser())
            except OSError as error:
                raise SettingsError(f"{TOKEN_FILE}={named}: {error.strerror}") from None
            if not found:
                raise SettingsError(f"{TOKEN_FILE}={named}: holds no token; name a copy of the server's control.token")
            return found
        nonce = new_token()
        told = self._ask(f"/?nonce={nonce}")
        path, shown = Path(str(told.get("token", ""))), str(told.get("proof", ""))
        where = f"this server's token, {printable(str(path), 200)} on its machine"
        try:
            found = read_token(path) if path.is_file() else ""
        except OSError as error:
            raise DeploymentError(
                f"{self._words}: {where}, cannot be read ({error.strerror}); give orders as the user that the server runs as, or "
                f"name a copy with {TOKEN_FILE}=FILE"
            ) from None
        if not found:
            raise DeploymentError(
                f"{self._words}: orders need {where}; copy it to this one, and name it with {TOKEN_FILE}=FILE"
            )
        # another program on this port would be sent the token else
        if not same(shown, proof(found, self._port, nonce)):
            raise DeploymentError(
                f"{self._words}: what answers there does not know {where}: another program, or another server through a "
                f"tunnel, whose token {TOKEN_FILE}=FILE names"
            )
        return found

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        try:
            answer = self._client.get(path) if body is None else self._client.post(path, json=body)
        except httpx.TransportError as error:
            raise DeploymentError(
                f"{self._url}: no server answers there ({error}); orders are given on the machine of `fedveil server`, or through "
                f"an SSH tunnel to it: ssh -L {PORT}:localhost:{PORT} HOST"
            ) from None
        with reading(lambda _: DeploymentError(f"{self._url}: what answers there is no FedVeil server's control port")):
            told = cast("dict[str, Any]", answer.json())
        if answer.status_code >= 400 and "error" in told:
            kinds: dict[int, type[FedveilError]] = {2: SettingsError}
            raise kinds.get(told.get("exit_code", 1), DeploymentError)(legible(str(told["error"])))
        return told

    def start(
        self,
        experiment: Experiment,
        say: Callable[[str], None],
        asked: Collection[str] = (),
        *,
        reproducible: bool = False,
    ) -> str:
        """Start a run of an experiment on the server; return its name.

        asked: dotted keys of the settings that were asked for by name, which are never overruled
        reproducible: ask clients for training that repeats from the seed
        """
        agreed = self.ask("/status")["agreed"]
        if agreed:
            experiment = as_agreed(
                experiment, Privacy(**legacy.read({"privacy": tomllib.loads(agreed)})["privacy"]), say, asked
            )
        order = {"experiment": experiment.toml(), "words": vocabulary(experiment), "reproducible": reproducible}
        return printable(str(self.ask("/runs", order)["run"]), 200)

    def resume(self, run: str) -> int:
        """Resume a stopped run; return the length of its log before, in bytes."""
        said = int(self.ask(f"/runs/{run}/log")["offset"])
        self.ask(f"/runs/{run}/resume", {})
        return said

    def follow(self, run: str, say: Callable[[str], None], said: int = 0) -> dict[str, Any]:
        """Pass each line of a run's log to `say` until the run ends; return its summary.

        said: bytes of the log to leave out
        Raises Interrupted where the run was stopped, TrainingError where it failed.
        """
        for line in self.log(run, following=True, said=said):
            say(line)
        told = self.ask(f"/runs/{run}")
        if told["status"] != "done":
            raise _failure(told, self._words)
        return cast("dict[str, Any]", told["result"])

    def log(self, run: str, following: bool, said: int = 0) -> Iterator[str]:
        """Yield the lines of a run's log after the first `said` bytes; where `following`, until the run ends."""
        offset = said
        while True:
            ended = self.ask(f"/runs/{run}")["status"] != "running"
            while (part := self.ask(f"/runs/{run}/log?offset={offset}"))["text"]:
                offset = part["offset"]
                for line in part["text"].splitlines():
                    yield legible(line).split(" ", 2)[-1]  # without date and time
            if ended or not following:
                return
            time.sleep(FOLLOW)


def _failure(told: dict[str, Any], server: str) -> FedveilError:
    """Return the error of a run that ended before it was done."""
    reason = legible(str(told["result"].get("error", ""))) if told["result"] else ""
    if told["status"] == "stopped":
        return Interrupted(f"{told['run']}: {reason}\n  go on with: fedveil resume {told['run']} --on {server}")
    return TrainingError(f"{told['run']}: {reason}\n  kept on the server in {told['record']}")


def as_agreed(
    experiment: Experiment, agreed: Privacy, say: Callable[[str], None], asked: Collection[str] = ()
) -> Experiment:
    """Return the experiment with the `[privacy]` that the federation's keys are for; clients refuse any other.

    A setting with its default value is taken for one that nobody asked for, unless `asked` has its key.
    Raise ProtectionError where the experiment asks for something else.
    """
    protection = experiment.privacy.protection.name
    default = values(Privacy(protection=ProtectionChoice(protection))) | {"protection": "none"}
    wanted = values(agreed)
    for name, value in values(experiment.privacy).items():
        unsaid = () if f"privacy.{name}" in asked else (default.get(name),)
        if value not in (wanted.get(name), *unsaid):
            raise ProtectionError(
                f"privacy.{name} = {value!r}: this federation's keys were made for {wanted.get(name)!r}, and its clients take part "
                "in no other run; leave it out, or make other keys (fedveil keys new)"
            )
    if experiment.privacy != agreed:
        say(f"privacy  {agreed.protection}, as agreed when the federation's keys were made")
    return Experiment(**{**experiment.model_dump(exclude_none=True), "privacy": agreed.model_dump(exclude_none=True)})


def vocabulary(experiment: Experiment) -> str:
    """Return the words that a run sends to its clients, a line each; empty where they need none.

    Raise DataError where the data that they come from are not on this machine.
    """
    from fedveil.datasets.federated import load
    from fedveil.datasets.text import read_vocabulary

    data = experiment.data
    if data.vocabulary == "hashed":
        return ""
    if data.vocabulary != "train":
        return "\n".join(read_vocabulary(Path(data.vocabulary).expanduser()))
    uses = data.dataset.declaration.uses
    if data.path is None and not data.dataset.is_own and ("vocabulary" not in uses or "path" in uses):
        return ""
    try:
        words = load(data, experiment.seed).dataset.words
    except DataError as error:
        raise DataError(
            f"data.vocabulary = 'train': the words come from {data.dataset}, which cannot be had on this machine, and clients need "
            f"them; put it here, or take data.vocabulary = 'hashed'\n  {error}"
        ) from None
    return "\n".join(words) if words else ""
