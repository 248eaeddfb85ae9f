"""A Flower grid that computes a whole cohort: all clients of a round at once, or over worker processes.

The strategy sends and receives Flower messages as on any grid. Those of one model and one stage are taken
together, cut into jobs by a rule that does not know the workers, and answered with arrays that nobody serialises.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, cast

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict

from fedveil.client.app import app, costs, evaluation_reply, refusal, training_reply
from fedveil.client.guard import guard
from fedveil.client.masked import seal_cohort
from fedveil.client.protect import Sealed, Seen, Witness
from fedveil.client.work import Workplace
from fedveil.core.errors import ProtectionError
from fedveil.core.messages import ARRAYS, CONFIG, INBOX, REFERENCE, ROUND, RUN, from_arrays, to_sealed, write_update
from fedveil.models.batches import cut
from fedveil.simulations.engine.grid import InProcessGrid
from fedveil.simulations.engine.workers import Job, Outcome, Workers

# position, client, weights, examples, and what makes its reply of the masked update
Waiting = tuple[int, int, dict[str, np.ndarray], int, Callable[[Sealed | ProtectionError], Message]]
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
        witness: Witness | None = None,
        residuals: dict[int, np.ndarray] | None = None,
    ) -> None:
        """`watch` is told how many of the messages at hand are done; `witness` sees what clients made, in the clear.

        residuals: as `InProcessGrid` has them
        """
        super().__init__(app, place.experiment.data.clients, run_config, watch=watch, residuals=residuals)
        self._place, self._workers, self._show, self._witness = place, workers, watch, witness
        self._seen: Seen | None = None  # the newest aggregate that clients of this process used
        self._row = 0  # of the results that the next client's weights go to
        self._numbers_in_model = sum(parameter.numel() for parameter in place.network.parameters())

    def answers(self, messages: Sequence[Message], timeout: float | None = None) -> Iterator[tuple[int, Message]]:
        """Train or evaluate the clients of the messages; raise as `Workers.run` does."""
        messages = self._number(messages)
        groups: dict[tuple[int, int, str], list[int]] = {}
        for i, message in enumerate(messages):
            # those of one model and one stage, whatever else a message brings for its client alone
            arrays, config = (id(message.content.get(key, message)) for key in (ARRAYS, CONFIG))
            groups.setdefault((arrays, config, message.metadata.message_type), []).append(i)
        rows = sum(message.metadata.message_type == MessageType.TRAIN for message in messages)
        if rows:
            self._workers.make_room(rows)
        self._row = 0
        done = 0
        for (*_, kind), members in groups.items():
            some = [messages[i] for i in members]
            if kind == MessageType.TRAIN:
                found = self._train(some)
            elif kind == MessageType.EVALUATE:
                found = self._evaluate(some)
            else:
                found = super().answers(some)
            for i, reply in found:
                yield members[i], reply
                done += 1
                self._show(done, len(messages))

    def _train(self, messages: Sequence[Message]) -> Iterator[tuple[int, Message]]:
        """Replies to messages with one model and one set of settings, as each is made."""
        clients = np.array([message.metadata.dst_node_id - 1 for message in messages])
        config: dict[str, Any] = dict(cast(ConfigRecord, messages[0].content[CONFIG]))
        try:
            arrays = self._receive(messages[0], config, int(config[ROUND]) - 1)
        except ProtectionError as error:
            yield from ((i, refusal(message, error, self._place.keys)) for i, message in enumerate(messages))
            return
        open_seconds = self._place.take_open_seconds(int(clients[0])) / len(messages)
        jobs: list[Job] = []
        order: list[int] = []  # positions in `messages`, as their clients follow one another in the jobs
        encrypted = self._place.experiment.privacy.shows == "sum"
        for chunk in self._cut(clients):
            jobs.append(
                Job(
                    [int(k) for k in clients[chunk]],
                    int(config[ROUND]),
                    self._row + len(order),
                    float(config["learning-rate"]),
                    config.get("proximal-mu"),
                    bool(config.get("report-global-loss", False)),
                    int(config[REFERENCE]) if encrypted else None,
                    config.get(RUN, b""),
                )
            )
            order += [int(i) for i in chunk]
        masked = self._place.experiment.privacy.shows == "mean"
        waiting: list[Waiting] = []  # for the last of the cohort: each pair's mask is made once for both
        first = self._row
        self._row += len(messages)
        for job, outcome in self._workers.run(arrays, jobs):
            assert job.first is not None
            for j, client in enumerate(job.clients):
                i = order[job.first + j - first]
                weights = {name: rows[job.first + j] for name, rows in self._workers.results.items()}
                examples = int(outcome.examples[j])  # type: ignore[index]
                if self._witness is not None:
                    self._witness.saw(client, weights, examples)
                make = partial(
                    self._reply,
                    messages[i],
                    client,
                    outcome,
                    j,
                    outcome.seconds / len(job.clients),
                    open_seconds,
                )
                if masked:
                    waiting.append((i, client, weights, examples, make))
                else:
                    yield i, make(outcome.sealed[j] if outcome.sealed else self._write(client, weights, arrays))
        if waiting:
            yield from self._mask(messages, waiting, config, arrays)

    def _reply(
        self,
        message: Message,
        client: int,
        outcome: Outcome,
        j: int,
        seconds: float,
        open_seconds: float,
        update: Sealed | ArrayRecord | ProtectionError,
    ) -> Message:
        """The reply of the j-th client of a job."""
        if isinstance(update, ProtectionError):
            return refusal(message, update, self._place.keys)
        protection = self._place.experiment.privacy.protection.name
        sealed = update if isinstance(update, Sealed) else None
        return training_reply(
            message,
            client,
            to_sealed(update.blob, protection) if isinstance(update, Sealed) else update,
            None if outcome.loss is None else float(outcome.loss[j]),
            int(outcome.examples[j]),  # type: ignore[index]
            None if outcome.steps is None else int(outcome.steps[j]),
            outcome.global_loss[j] if outcome.global_loss else None,
            seconds,
            costs(sealed, open_seconds),
        )

    def _write(
        self, client: int, weights: dict[str, np.ndarray], given: dict[str, np.ndarray]
    ) -> ArrayRecord | ProtectionError:
        """A client's update in the clear, or why it cannot be written, which is no reason to stop the others."""
        encoding = self._place.experiment.communication.encoding
        try:
            guard(self._place, client, given, weights)
            update, lost = write_update(weights, given, encoding, self._residuals.get(client))
        except ProtectionError as error:
            return error
        if lost is not None:
            self._residuals[client] = lost
        return update

    def _mask(
        self,
        messages: Sequence[Message],
        waiting: Sequence[Waiting],
        config: dict[str, Any],
        given: dict[str, np.ndarray],
    ) -> Iterator[tuple[int, Message]]:
        """Mask the updates of the whole cohort at once."""
        members = []
        for i, client, weights, examples, _ in waiting:
            state = self._states.setdefault(client + 1, RecordDict())
            members.append((client, weights, examples, cast(ConfigRecord, messages[i].content[INBOX]), state))
        sealed = seal_cohort(self._place.masked, members, config, given, self._place.keys)
        for (i, *_, make), update in zip(waiting, sealed, strict=True):
            yield i, make(update)

    def _receive(self, message: Message, config: dict[str, Any], number: int) -> dict[str, np.ndarray]:
        """The model of a message, which is that of round `number`, decrypted once for all clients of this process."""
        record = cast(ArrayRecord, message.content[ARRAYS])
        side = self._place.lattice(message.metadata.dst_node_id - 1)
        if side is None:
            return from_arrays(record)
        given, self._seen = side.receive(record, config.get(RUN, b""), number, self._seen)
        return given

    def _cut(self, clients: np.ndarray) -> list[np.ndarray]:
        """Positions of the clients of each job."""
        if self._place.experiment.engine != "batched":
            return np.split(np.arange(len(clients)), len(clients))
        sizes = self._place.federated.sizes(clients)
        shape = self._place.federated.dataset.task.shape
        settings, device = self._place.experiment.training, self._place.device
        return cut(sizes, settings, self._numbers_in_model, math.prod(shape), device)

    def _evaluate(self, messages: Sequence[Message]) -> Iterator[tuple[int, Message]]:
        config: dict[str, Any] = dict(cast(ConfigRecord, messages[0].content[CONFIG]))
        try:
            arrays = self._receive(messages[0], config, int(config.get(ROUND, 0)))
        except ProtectionError as error:
            yield from ((i, refusal(message, error, self._place.keys)) for i, message in enumerate(messages))
            return
        clients = [message.metadata.dst_node_id - 1 for message in messages]
        starts = range(0, len(clients), EVALUATED_AT_ONCE)
        jobs = [Job(clients[start : start + EVALUATED_AT_ONCE], int(config.get(ROUND, 0))) for start in starts]
        position = {client: i for i, client in enumerate(clients)}
        for job, outcome in self._workers.run(arrays, jobs):
            assert outcome.scores is not None
            for client, scores in zip(job.clients, outcome.scores, strict=True):
                i = position[client]
                yield i, evaluation_reply(messages[i], client, scores, outcome.seconds / len(job.clients))
