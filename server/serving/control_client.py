"""The connection from a run's process to the control server of its machine: what happened, and how the run ended."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, cast

import httpx

from fedveil.core.errors import Interrupted


@dataclass
class NodeEvents:
    """The control server's answer to a poll.

    stop: the run is to stop
    arrived, lost: ids of messages whose replies have arrived, or never will
    clients: by node; online: connected nodes; starts: of each node; silent: nodes that no longer call
    refused: clients that were refused, and why
    deaf: no node at all is heard
    """

    stop: bool = False
    arrived: set[str] = field(default_factory=set)
    lost: set[str] = field(default_factory=set)
    clients: dict[int, int] = field(default_factory=dict)
    online: set[int] = field(default_factory=set)
    starts: dict[int, int] = field(default_factory=dict)
    silent: set[int] = field(default_factory=set)
    refused: list[tuple[int | None, str]] = field(default_factory=list)
    deaf: bool = False


class ControlClient:
    """The connection from a run's process to the server's control interface at `url`, with the run's own token."""

    def __init__(self, url: str, token: str) -> None:
        headers = {"authorization": f"Bearer {token}"}
        self._client = httpx.Client(base_url=url, timeout=30, trust_env=False, headers=headers)  # on loopback
        self._since = 0

    def poll(self, wake: Iterable[int] = (), waiting: Iterable[str] = (), hold: float = 0.0) -> NodeEvents:
        """Ask for events; raise Interrupted where the run is to stop.

        wake: nodes with new messages; waiting: ids of messages without a reply; hold: seconds that the answer may wait
        for one
        """
        told = self._post(
            "/poll",
            {"wake": [str(node) for node in wake], "waiting": list(waiting), "since": self._since, "hold": hold},
        )
        self._since = told["since"]
        if told["stop"]:
            raise Interrupted("the run was stopped")
        return NodeEvents(
            told["stop"],
            set(told["arrived"]),
            set(told["lost"]),
            {int(node): client for node, client in told["clients"].items()},
            {int(node) for node in told["online"]},
            {int(node): starts for node, starts in told["starts"].items()},
            {int(node) for node in told["silent"]},
            [(client, why) for client, why in told["refused"]],
            told["deaf"],
        )

    def result(self, status: str, result: dict[str, Any]) -> None:
        """Report how the run ended."""
        self._post("/result", {"status": status, "result": result})

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = self._client.post(str(self._client.base_url).rstrip("/") + path, json=body)
        answer.raise_for_status()
        return cast("dict[str, Any]", answer.json())
