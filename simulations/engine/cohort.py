"""A Flower grid that computes the cohort of a round at once, or over worker processes.

The strategy sends and receives Flower messages as on any grid. Messages of one model and one stage are grouped, cut
into chunks that do not depend on the workers, and answered by the client's steps (`client/learning/pipeline.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, cast

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType

from fedveil.client.app import client_app
from fedveil.client.learning.contribution import (
    Contributions,
    Instructions,
    Parameters,
    evaluation_asked,
    join,
    split,
)
from fedveil.client.learning.pipeline import Step, Where, execute, load, steps_of, store
from fedveil.client.learning.protection import receive
from fedveil.client.learning.replies import evaluation_reply, refusal, training_reply
from fedveil.client.learning.runtime import ClientRuntime
from fedveil.core.errors import ProtectionError
from fedveil.core.wire.messages import ARRAYS, CONFIG, INBOX, RUN
from fedveil.models.local.batches import cut
from fedveil.simulations.engine.grid import InProcessGrid
from fedveil.simulations.engine.workers import Job, Workers

EVALUATED_AT_ONCE = 8  # clients in a job: enough to hide the cost of a job, few enough to share out
Chunk = tuple[int, Contributions]  # with the row of the first client's weights


class CohortGrid(InProcessGrid):
    """A grid that runs FedVeil's client for all messages of a stage, and other messages as `InProcessGrid` does."""

    def __init__(
        self,
        runtime: ClientRuntime,
        workers: Workers,
        run_config: dict[str, Any],
        *,
        watch: Callable[[int, int], None] = lambda _done, _total: None,
    ) -> None:
        """`watch`: called with the number of messages that are done, and of all."""
        app = client_app(lambda _context: runtime)
        super().__init__(app, runtime.experiment.data.clients, run_config, watch=watch)
        assert runtime.states is not None  # a simulation's clients keep their state in one store
        self._runtime, self._workers, self._show, self._states_of_all = runtime, workers, watch, runtime.states
        self._row = 0  # of the results, for the next client's weights
        self._numbers_in_model = sum(parameter.numel() for parameter in runtime.network.parameters())

    def answers(self, messages: Sequence[Message], timeout: float | None = None) -> Iterator[tuple[int, Message]]:
        """Yield each reply with the position of its message, as it is made; raise what `Workers.run` raises."""
        messages = self._number(messages)
        groups: dict[tuple[int, int, str], list[int]] = {}
        for i, message in enumerate(messages):
            # by model and stage, whatever else a message brings for its client alone
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
        """Yield the replies to messages with one model and the same instructions, as each is made."""
        runtime, config = self._runtime, dict(cast(ConfigRecord, messages[0].content[CONFIG]))
        try:
            instructions = Instructions.read(config, runtime.experiment)
        except ProtectionError as error:
            yield from ((i, refusal(message, error, runtime.keys)) for i, message in enumerate(messages))
            return
        given, refused = self._receive(messages, instructions.model_round, instructions.run)
        yield from refused
        if given is None:
            return
        able = [i for i in range(len(messages)) if i not in dict(refused)]
        clients = np.array([_client(messages[i]) for i in able])
        open_seconds = runtime.take_open_seconds(int(clients[0])) / len(able)
        chunks: list[Chunk] = []
        for chunk in self._cut(clients, instructions.round):
            positions = [able[i] for i in chunk]
            made = Contributions(
                [int(k) for k in clients[chunk]], instructions, given, positions=positions, open_seconds=open_seconds
            )
            if runtime.experiment.privacy.shows == "mean":
                made.brought = [dict(cast(ConfigRecord, messages[i].content[INBOX])) for i in positions]
            chunks.append((self._row, made))
            self._row += len(positions)
        for _, made in self._contribute(chunks, given):
            for k, i in enumerate(made.positions):
                yield i, training_reply(messages[i], runtime, made, k, made.seconds / len(made.clients))

    def _contribute(self, chunks: Sequence[Chunk], given: Parameters) -> Iterator[Chunk]:
        """Do the client's steps for all chunks, each where it may run; yield each chunk when it is done."""
        steps = steps_of(self._runtime)
        stream: Iterator[Chunk] = iter(chunks)
        start = 0
        for where, some in groupby(steps, key=lambda step: step.where):
            end = start + len(list(some))
            stream = self._execute(where, (start, end), steps[start:end], stream, given)
            start = end
        return stream

    def _execute(
        self, where: Where, span: tuple[int, int], steps: Sequence[Step], chunks: Iterator[Chunk], given: Parameters
    ) -> Iterator[Chunk]:
        """Do consecutive steps that run in one place; `span`: the first of the runtime's steps, one past the last."""
        runtime, states = self._runtime, self._states_of_all
        if where == "anywhere":
            waiting = dict(chunks)
            for made in waiting.values():
                load(steps, made, states)
            jobs = [Job(replace(made, given={}, weights={}), first, span) for first, made in waiting.items()]
            for job, outcome in self._workers.run(given, jobs):
                assert outcome.contributions is not None  # it is a job of steps
                done = replace(
                    outcome.contributions, given=given, weights=self._rows(job.first, len(job.contributions.clients))
                )
                done.seconds += outcome.seconds
                store(steps, done, states)
                yield job.first, done
        elif where == "home":
            for first, made in chunks:
                execute(runtime, steps, made, states)
                yield first, made
        else:
            parts = sorted(chunks, key=lambda chunk: chunk[0])
            all_made = [made for _, made in parts]
            whole = join(all_made, self._rows(parts[0][0], sum(len(made.clients) for made in all_made)))
            execute(runtime, steps, whole, states)
            split(whole, all_made)
            yield from parts

    def _rows(self, first: int, number: int) -> Parameters:
        """Return the weights of `number` clients, from row `first` on."""
        return {name: rows[first : first + number] for name, rows in self._workers.results.items()}

    def _receive(
        self, messages: Sequence[Message], number: int, run: bytes
    ) -> tuple[Parameters | None, list[tuple[int, Message]]]:
        """Return the messages' model, that of round `number`, and the refusals of clients that must not use it."""
        record = cast(ArrayRecord, messages[0].content[ARRAYS])
        given, refused = None, []
        for i, message in enumerate(messages):
            try:
                given = receive(self._runtime, _client(message), record, number, run, self._states_of_all)
            except ProtectionError as error:
                refused.append((i, refusal(message, error, self._runtime.keys)))
        return given, refused

    def _cut(self, clients: np.ndarray, number: int) -> list[np.ndarray]:
        """Return the positions of the clients in each chunk of round `number`."""
        runtime = self._runtime
        if runtime.experiment.engine != "batched":
            return np.split(np.arange(len(clients)), len(clients))
        sizes = runtime.federated.sizes(clients)
        numbers = runtime.federated.dataset.task.numbers
        limits = runtime.room.limits(number, runtime.device) if runtime.device.type == "cuda" else None
        return cut(sizes, runtime.experiment.training, self._numbers_in_model, numbers, limits)

    def _evaluate(self, messages: Sequence[Message]) -> Iterator[tuple[int, Message]]:
        config = dict(cast(ConfigRecord, messages[0].content[CONFIG]))
        try:
            number = evaluation_asked(config, self._runtime.experiment)
        except ProtectionError as error:
            yield from ((i, refusal(message, error, self._runtime.keys)) for i, message in enumerate(messages))
            return
        run = config.get(RUN, b"")
        given, refused = self._receive(messages, number, cast(bytes, run))
        yield from refused
        if given is None:
            return
        able = [i for i in range(len(messages)) if i not in dict(refused)]
        instructions = Instructions(number, 0.0, None, False, b"", 0, {})
        jobs = []
        for start in range(0, len(able), EVALUATED_AT_ONCE):
            positions = able[start : start + EVALUATED_AT_ONCE]
            clients = [_client(messages[i]) for i in positions]
            jobs.append(Job(Contributions(clients, instructions, {}, positions=positions)))
        for job, outcome in self._workers.run(given, jobs):
            asked = job.contributions
            for i, client, scores in zip(asked.positions, asked.clients, outcome.scores, strict=True):
                yield i, evaluation_reply(messages[i], client, scores, outcome.seconds / len(asked.clients))


def _client(message: Message) -> int:
    return message.metadata.dst_node_id - 1
