"""A Flower grid that computes a whole cohort: all clients of a round at once, or over worker processes.

The strategy sends and receives Flower messages as on any grid. Those of one model and one stage are taken
together, cut into jobs by a rule that does not know the workers, and answered with arrays that nobody serialises.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import numpy as np
from flwr.app import ConfigRecord, Message, MessageType, RecordDict

from fedveil.client.app import app, evaluation_reply, training_reply
from fedveil.client.work import Workplace
from fedveil.core.messages import ARRAYS, CONFIG, ROUND, from_arrays
from fedveil.models.batches import cut
from fedveil.simulations.engine.grid import InProcessGrid
from fedveil.simulations.engine.workers import Job, Workers

EVALUATED_AT_ONCE = 8  # clients a job: enough to hide what a job costs, few enough to share out


class CohortGrid(InProcessGrid):
    """Runs FedVeil's own client for all messages of a stage; any other message as `InProcessGrid` does."""

    def __init__(
        self,
        place: Workplace,
        workers: Workers,
        run_config: dict[str, Any],
        *,
        watch: Callable[[int, int], None] = lambda _done, _total: None,
    ) -> None:
        """`watch` is told how many of the messages at hand are done."""
        super().__init__(app, place.experiment.data.clients, run_config, watch=watch)
        self._place, self._workers, self._show = place, workers, watch
        self._row = 0  # of the results that the next client's weights go to
        self._numbers_in_model = sum(parameter.numel() for parameter in place.network.parameters())

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Train or evaluate the clients of the messages; raise as `Workers.run` does."""
        messages = self._number(messages)
        groups: dict[tuple[int, str], list[int]] = {}
        for i, message in enumerate(messages):
            groups.setdefault((id(message.content), message.metadata.message_type), []).append(i)
        replies: dict[int, Message] = {}
        rows = sum(message.metadata.message_type == MessageType.TRAIN for message in messages)
        if rows:
            self._workers.make_room(rows)
        self._row = 0
        for (_, kind), members in groups.items():
            some = [messages[i] for i in members]
            answer = {MessageType.TRAIN: self._train, MessageType.EVALUATE: self._evaluate}.get(kind)
            answers = super().send_and_receive(some) if answer is None else answer(some, len(replies), len(messages))
            replies |= dict(zip(members, answers, strict=True))
        return [replies[i] for i in range(len(messages))]

    def _train(self, messages: Sequence[Message], before: int, total: int) -> Iterable[Message]:
        """Replies to messages with one content: the same model and settings for all."""
        arrays, config = _open(messages[0].content)
        clients = np.array([message.metadata.dst_node_id - 1 for message in messages])
        jobs: list[Job] = []
        order: list[int] = []  # positions in `messages`, as their clients follow one another in the jobs
        for chunk in self._cut(clients):
            jobs.append(
                Job(
                    [int(k) for k in clients[chunk]],
                    int(config[ROUND]),
                    self._row + len(order),
                    float(config["learning-rate"]),
                    config.get("proximal-mu"),
                    bool(config.get("report-global-loss", False)),
                )
            )
            order += [int(i) for i in chunk]
        replies: dict[int, Message] = {}
        for job, outcome in self._workers.run(arrays, jobs):
            assert job.first is not None
            for j in range(len(job.clients)):
                weights = {name: rows[job.first + j] for name, rows in self._workers.results.items()}
                i = order[job.first + j - self._row]
                replies[i] = training_reply(
                    messages[i],
                    job.clients[j],
                    weights,
                    float(outcome.loss[j]),  # type: ignore[index]
                    int(outcome.examples[j]),  # type: ignore[index]
                    int(outcome.steps[j]),  # type: ignore[index]
                    outcome.global_loss[j] if outcome.global_loss else None,
                    outcome.seconds / len(job.clients),
                )
            self._show(before + len(replies), total)
        self._row += len(messages)
        return [replies[i] for i in range(len(messages))]

    def _cut(self, clients: np.ndarray) -> list[np.ndarray]:
        """Positions of the clients of each job."""
        if self._place.experiment.engine != "batched":
            return np.split(np.arange(len(clients)), len(clients))
        sizes = self._place.federated.sizes(clients)
        shape = self._place.federated.dataset.task.shape
        settings, device = self._place.experiment.training, self._place.device
        return cut(sizes, settings, self._numbers_in_model, math.prod(shape), device)

    def _evaluate(self, messages: Sequence[Message], before: int, total: int) -> Iterable[Message]:
        arrays, config = _open(messages[0].content)
        clients = [message.metadata.dst_node_id - 1 for message in messages]
        starts = range(0, len(clients), EVALUATED_AT_ONCE)
        jobs = [Job(clients[start : start + EVALUATED_AT_ONCE], int(config.get(ROUND, 0))) for start in starts]
        asked = dict(zip(clients, messages, strict=True))
        replies: dict[int, Message] = {}
        for job, outcome in self._workers.run(arrays, jobs):
            assert outcome.scores is not None
            for client, scores in zip(job.clients, outcome.scores, strict=True):
                replies[client] = evaluation_reply(asked[client], client, scores, outcome.seconds / len(job.clients))
            self._show(before + len(replies), total)
        return [replies[client] for client in clients]


def _open(content: RecordDict) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    return from_arrays(cast(Any, content[ARRAYS])), dict(cast(ConfigRecord, content[CONFIG]))
