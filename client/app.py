"""The Flower client of every experiment, in this process, in Flower's simulation, or on a machine of its own.

A message carries the global model under `arrays` and the round's settings under `config`. The run's configuration
carries the experiment as TOML, and the node's configuration the number of its partition. A client that must not use
what it received, or cannot protect its update, replies with an error that says why.
"""

from __future__ import annotations

import json
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedveil.client.learning.contribution import Contributions, Instructions, evaluation_asked, number
from fedveil.client.learning.local import score
from fedveil.client.learning.pipeline import contribute
from fedveil.client.learning.protection import receive
from fedveil.client.learning.replies import evaluation_reply, refusal, training_reply
from fedveil.client.learning.runtime import ClientRuntime, DataSource, client_runtime
from fedveil.client.learning.secagg import STAGES
from fedveil.client.learning.states import ClientStates, ContextStates
from fedveil.client.node.agreement import agree, agreed, countersign, digest_in, signs
from fedveil.client.node.answers import Answers
from fedveil.client.node.policy import Policy
from fedveil.core.errors import DataError, ProtectionError, SettingsError
from fedveil.core.settings.experiment import Experiment
from fedveil.core.wire.messages import (
    ARRAYS,
    ATTEMPT,
    BLOB,
    CLIENT,
    CONFIG,
    INBOX,
    MANIFEST,
    METRICS,
    ROUND,
    RUN,
    SCHEMA,
    SIGNATURES,
    WEIGHT,
)
from fedveil.datasets.own.local import schema
from fedveil.models.computing import repeatable
from fedveil.privacy.trust.manifest import UNSIGNED
from fedveil.privacy.trust.totals import EVALUATE, TRAIN

Part = TypeVar("Part", ArrayRecord, ConfigRecord)
REFUSED = (ProtectionError, SettingsError)  # refusals, which leave the client out of a round; other errors are faults
MOST_WORDS, LONGEST_WORDS = 10**6, 1 << 24  # of a vocabulary that a server sends, and its characters
DEPLOYED = 2  # runtimes that a client on a machine of its own keeps
log = logging.getLogger("flwr")  # where Flower shows what a node does

FindRuntime = Callable[[Context], ClientRuntime]


class Runtimes:
    """The runtimes of the experiments that a Flower process works for, made when a message first needs them.

    A process may stand for several nodes, each with its own folder of keys. Data that changed on disk is read again.
    """

    def __init__(self, most: int = 8, *, simulating: bool = False) -> None:
        """Keep at most `most` runtimes; simulating: noise comes from the seed, which a server knows.

        Only the code that starts a process may say so, and never a message: the process may stand for real clients.
        """
        self._most, self._simulating = most, simulating
        self._made: OrderedDict[tuple[Any, ...], ClientRuntime] = OrderedDict()

    def __call__(self, context: Context) -> ClientRuntime:
        """Return the runtime for a node.

        Raise ProtectionError where its owner's policy refuses the run's settings, or its data does not fit them.
        """
        node, settings, keys = context.node_config, str(context.run_config["experiment"]), keys_of(context)
        if not deployed(context):
            return self._find(settings, keys, None, UNSIGNED, repeats=True)
        policy = policy_of(context)
        policy.check(Experiment.received(settings))
        repeats = bool(context.run_config.get("reproducible"))
        policy.check_training(repeats=repeats)
        words = str(context.run_config.get("words", ""))
        if len(words) > LONGEST_WORDS or words.count("\n") >= MOST_WORDS:
            raise SettingsError(
                f"the run brings more than {MOST_WORDS:,} words, or {LONGEST_WORDS:,} characters of them"
            )
        own = DataSource(str(node["data"]), int(cast(int, node["partition-id"])), words)
        manifest = digest_in(context.state)
        try:
            found = self._find(settings, keys, own, manifest, policy, repeats=repeats)
        except DataError as error:
            raise ProtectionError(f"its data does not fit the run: {error}") from None
        policy.check(found.experiment)  # again, with the noise that privacy.epsilon asks for
        return found

    def _find(
        self,
        settings: str,
        keys: str,
        own: DataSource | None,
        manifest: bytes,
        policy: Policy | None = None,
        *,
        repeats: bool,
    ) -> ClientRuntime:
        about = settings, keys, own, own.state() if own else None, manifest, policy, repeats
        if about not in self._made:
            guard, most = ("off", None) if policy is None else (policy.leak_guard, policy.max_weights)
            self._made[about] = client_runtime(
                settings, keys, own, secret_noise=not self._simulating, secret_training=not repeats,
                leak_guard=guard, most_weights=most, manifest=manifest,
            )  # fmt: skip
        self._made.move_to_end(about)
        while len(self._made) > (self._most if own is None else DEPLOYED):
            self._made.popitem(last=False)
        return self._made[about]


def deployed(context: Context) -> bool:
    """Say whether this client is on a machine of its own, with a server of another party."""
    return "data" in context.node_config


def keys_of(context: Context) -> str:
    """Return the folder of this client's keys; a deployed client ignores one that the server names."""
    node = context.node_config
    return str(node.get("keys", "" if deployed(context) else context.run_config.get("keys", "")))


def policy_of(context: Context) -> Policy:
    """Read the policy of the owner of a deployed client; an empty policy where there is none."""
    path = str(context.node_config.get("policy", ""))
    return Policy.read(Path(path)) if path else Policy()


@dataclass(frozen=True)
class Request:
    """A message for one client, and what is needed to answer it.

    Properties raise ProtectionError where the server left them out.
    """

    message: Message
    context: Context
    find: FindRuntime

    @cached_property
    def runtime(self) -> ClientRuntime:
        """The runtime for this client, in a run to whose manifest it agreed."""
        if signs(self.context, self.keys):
            agreed(self.context, self.keys, self.config)
        return self.find(self.context)

    @property
    def keys(self) -> str:
        """The folder of this client's keys."""
        return keys_of(self.context)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The message's settings."""
        return dict(self._part(CONFIG, ConfigRecord))

    @property
    def client(self) -> int:
        """The client's number: that of the node's partition, unless the message names one of several clients."""
        own = self.context.node_config["partition-id"]
        return int(cast(int, own if deployed(self.context) else self.config.get(CLIENT, own)))

    @property
    def model(self) -> ArrayRecord:
        """The model as received."""
        return self._part(ARRAYS, ArrayRecord)

    @property
    def brought(self) -> dict[str, Any]:
        """The bytes that a message of secure aggregation carries for this client alone."""
        found = dict(self._part(INBOX, ConfigRecord))
        if any(not isinstance(value, bytes) for value in found.values()):
            raise ProtectionError("the server's message brings something else than bytes for this client")
        return found

    @property
    def states(self) -> ClientStates:
        """The store of what this client keeps between rounds."""
        states = self.runtime.states or ContextStates(self.context.state)
        return states if self.answers is None else self.answers.states(states, self.config)

    @cached_property
    def answers(self) -> Answers | None:
        """What this client's data has answered before; None where it keeps no ledger."""
        return Answers.of(self.context, policy_of(self.context).limits)

    def _part(self, key: str, kind: type[Part]) -> Part:
        found = self.message.content.get(key)
        if not isinstance(found, kind):
            raise ProtectionError(f"the server's message has no {kind.__name__} '{key}'")
        return found


def sign_manifest(request: Request) -> Message:
    """Sign the run's manifest, which tells nothing of this client's data."""
    context = request.context
    if not signs(context, request.keys):
        raise ProtectionError("this client has no keys to sign a manifest with")
    policy_of(context).check(Experiment.received(str(context.run_config["experiment"])))
    manifest, signature = countersign(context, request.keys, request.config)
    if request.answers is not None:
        request.answers.sign(manifest)
    return Message(RecordDict({CONFIG: ConfigRecord({SIGNATURES: signature})}), reply_to=request.message)


def hello(request: Request) -> Message:
    """Reply with the number of this node's partition, by which the server orders nodes.

    A deployed client adds the number of its examples and the schema of its data, once enough clients signed the run's
    manifest.
    """
    context, message = request.context, request.message
    client = int(cast(int, context.node_config["partition-id"]))
    if not deployed(context):
        return Message(RecordDict({METRICS: MetricRecord({CLIENT: client})}), reply_to=message)
    if signs(context, request.keys):
        agreement = agree(context, request.keys, request.config)
        if request.answers is not None:
            request.answers.agree(*agreement)
    runtime = request.runtime
    runtime.check_agreed(client)
    dataset = runtime.federated.dataset
    examples = int(runtime.federated.sizes(np.array([client]))[0])
    found = json.dumps(schema(dataset.task, dataset.words, dataset.columns))
    log.info("takes part with %d examples: %s", examples, found)
    weight = 1 if runtime.experiment.privacy.noisy else examples  # the number of examples tells of the data
    metrics = MetricRecord({CLIENT: client, WEIGHT: weight})
    if request.answers is not None:
        request.answers.hello(runtime.experiment, request.config, f"{weight} {found}".encode())
    return Message(RecordDict({METRICS: metrics, CONFIG: ConfigRecord({SCHEMA: found})}), reply_to=message)


def fit(request: Request) -> Message:
    """Contribute to a round: train the global model on this client's examples, and reply with the protected update."""
    started = time.perf_counter()
    runtime, client, states = request.runtime, request.client, request.states
    instructions = Instructions.read(request.config, runtime.experiment)
    answers, protected = request.answers, runtime.experiment.privacy.protected
    asked = None if answers is None else answers.question(TRAIN, instructions.round, request.config, request.model)

    def work() -> Message:
        given = receive(runtime, client, request.model, instructions.model_round, instructions.run, states)
        contributions = Contributions([client], instructions, given)
        if runtime.experiment.privacy.shows == "mean":
            contributions.brought = [request.brought]
        with repeatable(runtime.device):
            if protected and answers is not None and asked is not None:
                answers.contribute(asked, runtime, contributions, states)
            else:
                contribute(runtime, contributions, states)
        contributions.open_seconds = runtime.take_open_seconds(client)
        return training_reply(request.message, runtime, contributions, 0, time.perf_counter() - started)

    if protected or answers is None or asked is None:
        return work()
    return answers.once(asked, runtime.experiment, work, request.message)


def answer_stage(stage: str, request: Request) -> Message:
    """Answer a stage of secure aggregation before or after the update."""
    started = time.perf_counter()
    runtime, client, config = request.runtime, request.client, request.config
    runtime.check_agreed(client)
    for key in (ROUND, ATTEMPT):
        number(config, key)
    if not isinstance(config.get(RUN), bytes):
        raise ProtectionError("the server's message does not name its run")
    revealed = None if request.answers is None else request.answers.revealed
    blob = runtime.secagg.answer(stage, client, config, request.brought, request.states, revealed)
    metrics = MetricRecord({CLIENT: client, "seconds": time.perf_counter() - started})
    return Message(RecordDict({CONFIG: ConfigRecord({BLOB: blob}), METRICS: metrics}), reply_to=request.message)


def evaluate(request: Request) -> Message:
    """Evaluate the global model on the client's held-out part, and reply with counts that can be summed."""
    started = time.perf_counter()
    runtime, client, config = request.runtime, request.client, request.config
    answers, experiment = request.answers, runtime.experiment
    asked, run = evaluation_asked(config, experiment), config.get(RUN, b"")

    def work() -> Message:
        given = receive(runtime, client, request.model, asked, run, request.states)
        with repeatable(runtime.device):
            scores = score(runtime, client, given, held_out=True)
        return evaluation_reply(request.message, client, scores, time.perf_counter() - started)

    if answers is None:
        return work()
    return answers.once(answers.question(EVALUATE, asked, config, request.model), experiment, work, request.message)


def client_app(find: FindRuntime) -> ClientApp:
    """Make a Flower app of the client; `find` returns the runtime for a node.

    A refusal is a reply that says why, and no fault of the app.
    """
    app = ClientApp()
    handlers: list[tuple[Callable[..., Any], Callable[[Request], Message]]] = [
        (app.query(), hello), (app.query(MANIFEST), sign_manifest), (app.train(), fit), (app.evaluate(), evaluate),
        *((app.query(stage), partial(answer_stage, stage)) for stage in STAGES),
    ]  # fmt: skip
    for register, handler in handlers:
        register(_refusing(handler, find))
    return app


def _refusing(handler: Callable[[Request], Message], find: FindRuntime) -> Callable[[Message, Context], Message]:
    def answer(message: Message, context: Context) -> Message:
        try:
            return handler(Request(message, context, find))
        except REFUSED as error:
            return refusal(message, error, keys_of(context), deployed=deployed(context))

    return answer


app = client_app(Runtimes())  # the app of a process that Flower starts
