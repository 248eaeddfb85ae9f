"""`fedveil client`: runs and supervises Flower's SuperNode, the relay and the trainer."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

from fedveil.client.node.greeting import Address, Unreachable, find_proxy, greet, skew
from fedveil.client.node.ledger import ledger_path, source_name
from fedveil.client.node.policy import Policy
from fedveil.client.node.relay import Relay
from fedveil.client.node.trainer import ClientProfile, TrainerReply, TrainerRequest, command
from fedveil.core.errors import DeploymentError, SettingsError
from fedveil.core.proxies import spare_loopback, through
from fedveil.core.subprocesses import Child, free_port, log_file, wait_for
from fedveil.datasets.own.local import parse_source
from fedveil.privacy.trust.key_folders import check_client_folder
from fedveil.privacy.trust.ledger import Ledger

STARTING = 120.0  # seconds that a process may take to start
WAITS = (1.0, 2.0, 2.0, 2.0, 5.0, 10.0, 20.0)  # seconds between attempts, the last for all further ones
CHECK = 10.0  # seconds between greetings, by which client and server know that the other is there
QUIET = 60.0  # seconds after which a SuperNode that does not call a reachable server is started again
SKEW = 3.0  # seconds that the clocks may disagree without a warning; Flower's node authentication allows 5


@dataclass(frozen=True)
class Options:
    """The options of `fedveil client`.

    keys: the client's folder of keys; None for plain HTTP and no protection that needs keys
    state: the folder of its logs; ledger: the file of its data's privacy ledger, None for the one in the user's folder
    number: of a client without keys, counted from 0
    """

    server: Address
    data: str
    keys: Path | None
    policy: Path | None
    state: Path
    number: int | None = None
    ledger: Path | None = None


def join(options: Options, say: Callable[[str], None]) -> None:
    """Take part in a server's runs until SIGTERM or Ctrl-C.

    say: receives messages for people
    Raise FedveilError where the client cannot take part.
    """
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        # in another thread, since the main thread may hold the event's lock at this moment
        signal.signal(number, lambda _signal, _frame: threading.Thread(target=stopping.set).start())
    find_proxy(options.server, options.keys)  # refuse one that cannot be used while it is still to be seen
    spare_loopback(os.environ)  # SuperNode, relay and trainer talk on loopback
    client = client_number(options)
    source = parse_source(options.data)
    if source.path is not None and not source.path.exists():
        raise SettingsError(f"--data {options.data}: there is no such file or folder")
    if options.policy is not None:
        Policy.read(options.policy)
    ledger = (options.ledger or ledger_path(options.data)).absolute()
    Ledger.open(ledger, source_name(options.data)).close()  # one that cannot be used is said here, and not in a round
    options.state.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not _greeted(options, client, say, stopping):
        return
    say(f"ledger   {ledger}")
    profile = ClientProfile(
        client,
        options.data,
        str(options.keys.absolute()) if options.keys else "",
        str(options.policy.absolute()) if options.policy else "",
        str(ledger),
    )
    with tempfile.TemporaryDirectory(prefix="fedveil-") as folder:  # mode 0700
        _Parts(options, profile, Path(folder), say, stopping).supervise()
    say("stopped")


def client_number(options: Options) -> int:
    """Return the client's number, from 0: that of its key or, without keys, of its partition or option.

    Raise SettingsError where data and keys are of different clients, or where nothing gives a number.
    """
    source = parse_source(options.data)
    if options.keys is not None:
        client = check_client_folder(options.keys, options.server.host)
        if source.path is None and source.partition != client + 1:
            raise SettingsError(
                f"--data {options.data}: is the data of client {source.partition}, and the keys in {options.keys} are of "
                f"client {client + 1}; give {source.dataset}:{client + 1}/{source.of}"
            )
        return client
    if source.path is None:
        return source.partition - 1
    if options.number is None:
        raise SettingsError("--insecure: a client without keys and with data of its own needs a --number, 1, 2, 3, ...")
    return options.number


def _greeted(options: Options, client: int, say: Callable[[str], None], stopping: threading.Event) -> bool:
    """Wait until the server knows this client; return False where the user stops the wait first.

    Raise DeploymentError where the server never will.
    """
    attempt = 0
    while not stopping.is_set():
        try:
            told = greet(options.server, options.keys)
        except Unreachable as error:
            pause = WAITS[min(attempt, len(WAITS) - 1)]
            say(f"{error}; trying again in {pause:g} s")
            attempt += 1
            stopping.wait(pause)
            continue
        if options.keys is not None and told["client"] != client:
            raise DeploymentError(
                f"the server has this key as client {told['client'] + 1}, and registry.json as {client + 1}"
            )
        ahead = skew(told)
        if abs(ahead) > SKEW:
            say(
                f"warning  this machine's clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the server's; "
                "more than 5 s ahead, or 300 s behind, and the server refuses this client"
            )
        proxy = find_proxy(options.server, options.keys)
        way = f" through the proxy {proxy}" if proxy else "" if options.keys else " (--insecure: plain HTTP)"
        say(f"joined   {options.server} as client {client + 1}{way}")
        return True
    return False


class _Parts:
    """The processes of a client. Each is started again when it ends, and none outlives this process."""

    def __init__(
        self,
        options: Options,
        profile: ClientProfile,
        folder: Path,
        say: Callable[[str], None],
        stopping: threading.Event,
    ) -> None:
        self._options, self._profile, self._folder = options, profile, folder
        self._say, self._stopping = say, stopping
        self._log = log_file("client", options.state / "client.log")
        self._trainer: Child | None = None
        self._line: Connection | None = None
        self._turn = threading.Lock()
        self._secret = secrets.token_hex(32).encode()
        self._secret_file = folder / "secret"
        with open(os.open(self._secret_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(self._secret)

    def supervise(self) -> None:
        """Keep the processes running until the client is stopped."""
        node: Child | None = None
        relaying: threading.Thread | None = None
        failures = 0
        try:
            self._start_trainer()
            while not self._stopping.is_set():
                started = time.monotonic()
                port = free_port()
                node = self._start_node(port)
                ended = threading.Event()
                relay = Relay(f"127.0.0.1:{port}", self._secret, self._ask, self._tell)
                relaying = threading.Thread(target=relay.work, args=(lambda e=ended: not e.is_set(),), name="relay")
                relaying.start()
                self._watch(node, relaying)
                ended.set()
                relaying.join(timeout=5)
                if self._stopping.is_set():
                    break
                words = next((line for line in reversed(node.tail) if "rror" in line or "ailed" in line), "")
                if "409" in words:
                    words = "another client with these keys is connected"
                node.stop()
                failures = 0 if time.monotonic() - started > 60 else failures + 1
                pause = WAITS[min(failures, len(WAITS) - 1)]
                self._say(f"Flower's SuperNode ended ({node.ended()}); starting it again in {pause:g} s {words}")
                self._stopping.wait(pause)
        finally:
            if self._line is not None:
                self._line.close()
            if node is not None:
                node.stop()
            if self._trainer is not None:
                self._trainer.stop()
            if relaying is not None:
                relaying.join(timeout=5)

    def _watch(self, node: Child, relaying: threading.Thread) -> None:
        """Return when the SuperNode or the relay ends, or the client is stopped.

        Say when the server cannot be reached, and when it is back.
        """
        started = time.monotonic()
        lost, next_check = False, started + CHECK
        while node.running and relaying.is_alive() and not self._stopping.wait(0.2):
            if self._trainer is not None and not self._trainer.running:
                self._renew_trainer()
            if time.monotonic() < next_check:
                continue
            try:
                told = greet(self._options.server, self._options.keys)
                if told["quiet"] > QUIET and time.monotonic() - started > QUIET:
                    self._log.info("the SuperNode has not called the server for %.0f s", told["quiet"])
                    return
                if lost:
                    self._say(f"{self._options.server} is there again")
                lost = False
            except DeploymentError as error:
                if not lost:
                    self._say(f"{error}; the client goes on trying")
                lost = True
            next_check = time.monotonic() + CHECK

    def _start_node(self, port: int) -> Child:
        options = self._options
        arguments = [
            "flower-supernode",
            *("--superlink", str(options.server), "--isolation", "process"),
            *("--host", "127.0.0.1", "--port", str(port)),
            *("--superexec-auth-secret-file", str(self._secret_file)),
        ]
        if options.keys is None:
            arguments.append("--insecure")
        else:
            arguments += ["--root-certificates", str(options.keys / "ca.pem")]
            arguments += ["--auth-supernode-private-key", str(options.keys / "identity.key")]
        around = {
            "FLWR_HOME": str((options.state / "flower").absolute()),
            **through(find_proxy(options.server, options.keys)),
        }
        child = Child("flower-supernode", arguments, options.state / "supernode.log", around)

        def listens() -> bool:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                return True
            return False

        wait_for(listens, child, STARTING, "Flower's SuperNode")
        return child

    def _start_trainer(self) -> None:
        ours, theirs = Pipe()
        with theirs:
            descriptor = theirs.fileno()
            self._trainer = Child(
                "trainer",
                command(descriptor, self._profile),
                self._options.state / "trainer.log",
                {"FLWR_LOG_LEVEL": "WARNING"},
                pass_fds=(descriptor,),
            )
        self._line = ours

        def ready() -> bool:
            return ours.poll(0) and ours.recv() == "ready"

        wait_for(ready, self._trainer, STARTING, "the trainer")

    def _renew_trainer(self) -> None:
        """Start another trainer in place of one that died."""
        assert self._trainer is not None
        assert self._line is not None
        how = self._trainer.ended()
        with self._turn:  # a request in progress fails first
            self._line.close()
            self._say(f"the trainer died ({how}); starting another")
            self._start_trainer()

    def _tell(self, text: str) -> None:
        """Show a message to the operator of this client, and log it."""
        self._say(text)
        self._log.info(text)

    def _ask(self, request: TrainerRequest) -> TrainerReply:
        """Let the trainer answer; raise DeploymentError where it dies."""
        with self._turn:
            assert self._line is not None
            try:
                self._line.send(request)
                return self._line.recv()  # type: ignore[no-any-return]
            except (EOFError, OSError):
                raise DeploymentError("the client's trainer died over this message; another is started") from None
