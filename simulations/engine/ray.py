"""The engine on Flower's Simulation Runtime: clients run in the processes of a Ray cluster.

Flower's runtime runs on another thread, and its `ServerApp` lends the grid to the round loop, which stays on the
caller's thread, so that errors and Ctrl-C are raised there as on every other engine.
"""

from __future__ import annotations

import importlib.util
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any, cast

from flwr.app import ConfigRecord, Context, Error, Message, MessageType
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from joblib import cpu_count

from fedveil.client.app import Runtimes, client_app
from fedveil.client.learning.pipeline import durable_keys
from fedveil.client.learning.runtime import ClientRuntime
from fedveil.client.learning.states import ClientStates, ContextStates, StateKey, lend, take_back
from fedveil.core.errors import FedveilError, Interrupted, SettingsError, TrainingError
from fedveil.core.places import where
from fedveil.core.record.record import Record
from fedveil.core.wire.flower import ErrorCode
from fedveil.core.wire.messages import CLIENT, CONFIG
from fedveil.server.federation import Federation, federate
from fedveil.server.nodes import ClientGrid, WrappedGrid
from fedveil.server.rounds.context import Hooks

POLL = 0.02  # seconds between polls for replies
LOOK = 1.0  # seconds between looks at Ray's machines
# errors by which FedVeil's client answers; all others are Flower's, for a process that did not answer
ANSWERED = (ErrorCode.CLIENT_APP_RAISED_EXCEPTION, ErrorCode.MOD_FAILED_PRECONDITION)

app = client_app(Runtimes(simulating=True))  # made anew in each of Ray's processes


def check_ray(workers: int | None) -> None:
    """Raise SettingsError where Ray is not installed, or cannot have `workers` processors."""
    if importlib.util.find_spec("ray") is None:
        raise SettingsError(
            "engine = 'ray': needs Ray, which is not installed here: pip install -c constraints.txt '.[ray]' in the checkout; or use engine = 'auto'"
        )
    if workers is not None and "RAY_ADDRESS" in os.environ:
        raise SettingsError(
            f"workers = {workers}: has no effect with RAY_ADDRESS set; the cluster there says how many processors it has"
        )
    if workers is not None and workers > cpu_count():
        raise SettingsError(f"workers = {workers}: this machine has {cpu_count()} processors for Ray to use")


def run_on_ray(
    federation: Federation,
    record: Record,
    hooks: Hooks,
    runtime: ClientRuntime,
    *,
    stop: Callable[[], bool] = lambda: False,
    client_done: Callable[[int, int], None] = lambda _done, _total: None,
) -> None:
    """Run the remaining rounds on Flower's Simulation Runtime, and leave no process of it behind.

    Ray uses `workers` processors of this machine, as the experiment sets them, each for one client at a time. Without
    that setting it uses all of this machine, or of the cluster that RAY_ADDRESS names.
    runtime: the clients', with the store of their states
    stop: asked while clients work; client_done: called with the number of messages that are answered, and of all
    Raises what `check_ray` and `federate` raise; FedveilError where Ray cannot start or breaks down.
    """
    experiment = federation.experiment
    check_ray(experiment.workers)
    # a node for each client of a round: Flower gives a node one message at a time
    nodes = min(experiment.data.clients, max(experiment.federation.cohort, experiment.evaluation.cohort or 1))
    config = {"experiment": experiment.toml(), "keys": str(Path(runtime.keys).resolve()) if runtime.keys else ""}
    kept = durable_keys(runtime)
    client = _Client(config, kept)
    with _runtime(client, nodes, experiment.workers, federation.device.type == "cuda") as flower:
        assert runtime.states is not None  # a simulation's clients keep their state in one store
        lent = _LentGrid(flower, stop, client_done, runtime.states, kept)
        federate(federation, ClientGrid(lent, experiment.data.clients, timeout=600.0), record, hooks)


class _Runtime:
    """Flower's runtime on a thread: `grids` gets the grid when it is up and None when it is down; `error` says why."""

    def __init__(self) -> None:
        self.grids: SimpleQueue[Grid | None] = SimpleQueue()
        self.finished = threading.Event()
        self.error: BaseException | None = None
        self.grid: Grid


@contextmanager
def _runtime(client: ClientApp, nodes: int, workers: int | None, gpu: bool) -> Iterator[_Runtime]:
    """Start Flower's Simulation Runtime for the block, and shut it and Ray down afterwards."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no message leaves a machine unless a user sends it
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else Ray warns that this will be its default
    import ray
    from flwr.simulation import run_simulation

    runtime, server = _Runtime(), ServerApp()

    @server.main()
    def lend(grid: Grid, context: Context) -> None:
        runtime.grids.put(grid)
        runtime.finished.wait()

    def serve() -> None:
        try:
            run_simulation(server, client, nodes, backend_config=_backend(workers, gpu))
        except BaseException as error:
            runtime.error = error
        runtime.grids.put(None)

    python_path = os.environ.get("PYTHONPATH")  # Flower puts this process' `sys.path` there for Ray's processes
    thread = threading.Thread(target=serve, name="flower-runtime")
    thread.start()
    try:
        runtime.grid = runtime.grids.get() or _down(runtime)
        yield runtime
    finally:
        runtime.finished.set()
        thread.join()
        ray.shutdown()
        if python_path is None:
            os.environ.pop("PYTHONPATH", None)
        else:
            os.environ["PYTHONPATH"] = python_path


def _down(runtime: _Runtime) -> Any:
    error = runtime.error
    why = error.__cause__ or error if error else "it stopped"
    raise FedveilError(f"Flower's simulation runtime failed: {type(why).__name__}: {why}") from error


def _backend(workers: int | None, gpu: bool) -> dict[str, Any]:
    """Return settings for Ray: a processor for each client at work, and a share of the GPUs where they are used."""
    start: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    resources = {"num_cpus": 1, "num_gpus": 0.0}
    if workers is not None:
        start["num_cpus"] = workers
    if gpu:
        import torch

        count = workers or os.cpu_count() or 1
        resources["num_gpus"] = int(1e4 * min(1.0, torch.cuda.device_count() / count)) / 1e4  # Ray keeps 4 digits
    return {"init_args": start, "client_resources": resources}


class _Client(ClientApp):
    """FedVeil's client app in a Ray process, with the run config that Flower's Python interface gives to no client."""

    def __init__(self, config: dict[str, Any], keys: Sequence[StateKey]) -> None:
        """`keys`: those of the states that come with a message and go back with its reply."""
        super().__init__()
        self._config, self._keys = config, keys

    def __call__(self, message: Message, context: Context) -> Message:
        inner = Context(context.run_id, context.node_id, context.node_config, context.state, self._config)
        states = ContextStates(inner.state)
        trains = message.metadata.message_type == MessageType.TRAIN
        if trains:
            take_back(message.content, _client(message), self._keys, states)
        try:
            reply = app(message, inner)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}{where(error)}"
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)
        if trains and reply.has_content():
            take_back(inner.state, _client(message), self._keys, ContextStates(reply.content))
        context.state = inner.state
        return reply


def _client(message: Message) -> int:
    """Return the client that a message is for, whichever node runs it."""
    return int(cast(int, cast(ConfigRecord, message.content[CONFIG])[CLIENT]))


class _LentGrid(WrappedGrid):
    """Flower's grid, asked in such a way that a stop, a failing client and a dead runtime are noticed.

    The clients' states stay in this process, where a checkpoint can hold them, and travel with the messages, as the
    state of a node does in Flower.
    """

    def __init__(
        self,
        runtime: _Runtime,
        stop: Callable[[], bool],
        client_done: Callable[[int, int], None],
        states: ClientStates,
        keys: Sequence[StateKey],
    ) -> None:
        super().__init__(runtime.grid)
        self._runtime, self._states, self._keys = runtime, states, keys
        self._stop, self._client_done = stop, client_done

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Send messages, return the replies (`timeout`: seconds); raise what `answers` raises."""
        return [reply for _, reply in self.answers(list(messages), timeout)]

    def answers(self, messages: Sequence[Message], timeout: float | None = None) -> Iterator[tuple[int, Message]]:
        """Yield what `send_and_receive` returns, each reply as it arrives, with the position of its message.

        Raise TrainingError where a client's code failed, or a process of Ray's was lost. That is no drop-out: Flower keeps
        a dead process in its pool, where it fails at once and so takes most of the messages that follow.
        """
        for message in messages:
            if message.metadata.message_type == MessageType.TRAIN:
                lend(self._states, _client(message), self._keys, message.content)
        waiting = {sent: i for i, sent in enumerate(self._grid.push_messages(messages))}
        deadline = time.monotonic() + (float("inf") if timeout is None else timeout)
        look = 0.0
        while waiting and time.monotonic() < deadline:
            if self._stop():
                raise Interrupted("stopped")
            if not self._runtime.grids.empty():
                _down(self._runtime)
            if time.monotonic() > look:
                self._check_machines()
                look = time.monotonic() + LOOK
            for reply in self._grid.pull_messages(list(waiting)):
                index = waiting.pop(reply.metadata.reply_to_message_id)
                if reply.has_error() and reply.error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION:
                    raise TrainingError(f"client {_client(messages[index])} failed: {reply.error.reason}")
                if reply.has_error() and reply.error.code not in ANSWERED:
                    self._check_machines()  # a lost machine says more than its processes
                    raise _lost(_process(reply.error.reason or ""))
                trains = messages[index].metadata.message_type == MessageType.TRAIN
                if trains and reply.has_content():
                    take_back(reply.content, _client(messages[index]), self._keys, self._states)
                yield index, reply
                self._client_done(len(messages) - len(waiting), len(messages))
            time.sleep(POLL)

    def _check_machines(self) -> None:
        """Raise TrainingError where a machine of Ray's cluster is gone."""
        import ray

        if not ray.is_initialized():
            return  # Flower's runtime starts it after the first messages
        for node in ray.nodes():  # type: ignore[no-untyped-call]
            if not node["Alive"]:
                why = node.get("DeathReasonMessage") or "it no longer answers"
                raise _lost(
                    f"the machine {node['NodeManagerAddress']}, with its raylet {node['NodeID'][:8]} ({why.strip()})"
                )


def _process(reason: str) -> str:
    """Describe a lost process by Ray's account of it."""
    said = dict(re.findall(r"^\s*(pid|ip): (\S+)", reason, re.MULTILINE))
    why = re.search(r"(?:died|dead) because (.*?)(?:\.|$)", reason, re.MULTILINE)
    told = why[1] if why else reason.strip().partition("\n")[0][:200]
    who = f"the process {said['pid']} on {said.get('ip', 'this machine')}" if "pid" in said else "a process"
    return f"{who} ({told})"


def _lost(what: str) -> TrainingError:
    return TrainingError(
        f"Ray lost {what}; that is no drop-out of a client, so the run ends here; `fedveil resume` goes on from the last round"
    )
