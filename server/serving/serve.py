"""`fedveil server`: runs and supervises Flower's SuperLink on a Unix socket, the gateway and the control server."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path

import httpx

from fedveil.core.errors import DeploymentError, SettingsError
from fedveil.core.proxies import spare_loopback
from fedveil.core.record.record import alone
from fedveil.core.subprocesses import adopt_orphans, allow_open_files, check_port, end_orphans, log_file
from fedveil.privacy.trust.key_folders import check_server_folder, load_registry
from fedveil.server.serving.control_server import ControlServer
from fedveil.server.serving.listener import Door, Listener
from fedveil.server.serving.node_gateway import NodeGateway
from fedveil.server.serving.superlink import register_nodes, start_superlink
from fedveil.server.serving.tokens import token_path

HOST = "127.0.0.1"


@dataclass(frozen=True)
class Options:
    """The options of `fedveil server`.

    keys: the server's folder of keys; None where any client may join over plain HTTP
    host, port: where clients reach it; control: the port on loopback for its own machine's orders
    state: the folder of everything that it keeps; max_update: MiB that a client may send for one message
    """

    keys: Path | None
    state: Path
    host: str = "0.0.0.0"
    port: int = 9092
    control: int = 9093
    max_update: float = 512.0


def serve(options: Options, say: Callable[[str], None], finish: Callable[[Path], None]) -> None:
    """Serve until SIGTERM or Ctrl-C; raise FedveilError where the server cannot start, or the SuperLink ends.

    say: receives messages for people; finish: receives the folder of every complete record
    """
    if options.keys is not None:
        check_server_folder(options.keys)
    check_port(options.host, options.port, "--port")
    check_port(HOST, options.control, "--control")
    try:
        options.state.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"--state {options.state}: {error.strerror}") from None
    spare_loopback(os.environ)
    allow_open_files()
    adopt_orphans()
    # the socket's folder has mode 0700, and is not in the state, since a socket's path has at most 107 bytes
    with alone(options.state, "a server with this state"), tempfile.TemporaryDirectory(prefix="fedveil-") as private:
        asyncio.run(_serve(options, Path(private) / "superlink", say, finish))


async def _serve(options: Options, socket: Path, say: Callable[[str], None], finish: Callable[[Path], None]) -> None:
    keys, state, logs = options.keys, options.state, options.state / "logs"
    log = log_file("server", logs / "server.log")
    errors = getLogger("uvicorn.error")
    errors.handlers, errors.propagate = [*log.handlers], False
    errors.setLevel("ERROR")
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    registry = {} if keys is None else dict(load_registry(keys) or {})
    database = state / "superlink.db"
    # write nothing outside the state: Flower unpacks apps, and Matplotlib stores its list of fonts
    os.environ["FLWR_HOME"] = str((state / "flower").absolute())
    os.environ.setdefault("MPLCONFIGDIR", str((state / "matplotlib").absolute()))
    database.touch(mode=0o600)
    database.chmod(0o600)  # it holds messages
    link = start_superlink(socket, database, keys is not None, logs / "superlink.log")
    try:
        nodes = register_nodes(link, registry) if keys is not None else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        way = httpx.AsyncHTTPTransport(uds=str(link.path), limits=limits)
        async with httpx.AsyncClient(base_url="http://superlink", transport=way, timeout=60) as passed_on:
            numbers = None if keys is None else {public: client for client, public in registry.items()}
            ids = {client: node for node, client in nodes.items()}
            refusals = log_file("gateway", logs / "gateway.log")
            front, back = Door(refusals), Door(log)
            gateway = NodeGateway(passed_on, numbers, ids, int(options.max_update * 2**20), refusals, vouch=front.vouch)
            url = f"http://{HOST}:{options.control}"
            control = ControlServer(state, keys, link, gateway, nodes, url, finish, log, vouch=back.vouch)
            tls = () if keys is None else (keys / "server.pem", keys / "server.key")
            outside = Listener(gateway.app, options.host, options.port, front, *tls)
            inside = Listener(control.app, HOST, options.control, back)
            tasks = [asyncio.create_task(part) for part in (outside.serve(), inside.serve(), control.watch())]
            try:
                while not (outside.started and inside.started):
                    for task in tasks:
                        if task.done():
                            task.result()
                            raise DeploymentError(f"the server ended while it started; see {logs}")
                    await asyncio.sleep(0.02)
                for line in _greeting(options, len(registry)):
                    say(line)
                await control.go_on()
                while not stopping.is_set() and link.child.running:
                    with suppress(TimeoutError):
                        await asyncio.wait_for(stopping.wait(), 0.5)
                if not stopping.is_set():
                    words = "\n  ".join(list(link.child.tail)[-8:])
                    raise DeploymentError(
                        f"Flower's SuperLink ended ({link.child.ended()}); its last words:\n  {words}"
                    )
                say("stopping; runs go on when the server is started again on its state")
            finally:
                tasks[2].cancel()
                outside.should_exit = inside.should_exit = True
                await asyncio.gather(*tasks, return_exceptions=True)
    finally:
        await asyncio.to_thread(link.child.stop)
        await asyncio.to_thread(end_orphans)  # Flower's processes of runs


def _greeting(options: Options, clients: int) -> Iterator[str]:
    if options.keys is None:
        yield (
            "WARNING  --insecure: no TLS, and whoever reaches the port may join and see the models; for trials on one "
            "machine, or inside a network that you trust"
        )
    joined = f"{clients} registered clients" if options.keys else "any client"
    yield f"clients  {options.host}:{options.port}, {'TLS' if options.keys else 'plain HTTP'}, {joined}"
    yield f"control  {HOST}:{options.control}, for who can read its token (fedveil submit PRESET --on localhost)"
    yield f"state    {options.state.absolute()} (runs/, logs/, {token_path(options.state).name}); process {os.getpid()}"
