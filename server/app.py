"""The Flower server of every experiment that runs under Flower's own runtimes (`flwr run .`).

The run's configuration carries the experiment: a preset's name, or all settings as TOML. The record of the run goes to
runs/ under `output` of the run's configuration, or under the folder that the server runs in.
"""

from __future__ import annotations

import logging
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedveil.core.record.record import Record
from fedveil.core.settings.experiment import Experiment
from fedveil.core.subprocesses import log_file
from fedveil.server.checkpoint import MODEL, SEALED_MODEL, State
from fedveil.server.exchange import Row
from fedveil.server.federation import federate, prepare, resolve
from fedveil.server.nodes import ClientGrid
from fedveil.server.rounds.context import Hooks
from fedveil.server.serving.deployed import run_deployed
from fedveil.server.summary import scores_line

app = ServerApp()
log = logging.getLogger("flwr")


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the experiment that the run's configuration names, over the connected nodes."""
    if context.run_config.get("control"):
        _run_deployed(grid, context)
        return
    experiment = resolve(Experiment.find(str(context.run_config["experiment"])))
    experiment = experiment.override({"engine": "sequential", "workers": None})  # one message at a time
    federation = prepare(experiment)
    keys = str(context.run_config.get("keys", ""))
    # DIR/server on a machine that holds all parties' folders, else DIR itself
    federation.protect(_server_folder(Path(keys)) if keys else None)
    if federation.protection is not None:
        log.info("privacy %s %s", experiment.privacy.protection, federation.protection.words)
    clients = ClientGrid(grid, experiment.data.clients)
    output = str(context.run_config.get("output", ""))
    record = Record.create(federation.experiment, Path(output) if output else None)

    def watch(row: Row, state: State) -> None:
        log.info("round %d/%d  %s", row["round"], experiment.federation.rounds, scores_line(row, state))

    # the server cannot read an encrypted model: clients evaluate it, and a holder of the key opens model.sealed
    lattices = experiment.privacy.shows == "sum"
    evaluate = None if lattices else federation.evaluate
    federate(federation, clients, record, Hooks(watch, evaluate, log.warning, secret=True))
    log.info("model_sha256 %s", record.sha256(SEALED_MODEL if lattices else MODEL))
    log.info("record %s", record.folder.resolve())


def _run_deployed(grid: Grid, context: Context) -> None:
    """Run an experiment that `fedveil server` started, with a log file beside its record's folder."""
    record = Path(str(context.run_config["record"]))
    words = log_file(record.name, record.parent.parent / "logs" / f"{record.name}.log")
    run_deployed(grid, context.run_config, words.info)


def _server_folder(keys: Path) -> Path:
    """Return the server's folder of keys."""
    if not (keys / "server").is_dir():
        return keys
    if any(keys.glob("client-*")):
        log.warning("%s holds the keys of all parties: this tests the protocol, and protects from nobody", keys)
    return keys / "server"
