"""Commands for separate machines: `fedveil server`, `client`, `submit`, `status`, `logs`, `stop`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from fedveil.core.errors import SettingsError
from fedveil.core.foreign import WORDS, legible, printable
from fedveil.options import AsJson, Assignments, DataDir, PresetOrFile, Quiet, experiment_of, use_data_dir

if TYPE_CHECKING:
    from fedveil.remote import Server

Keys = Annotated[Path | None, typer.Option(metavar="DIR", help="this party's folder of keys (fedveil keys new --host)")]
Insecure = Annotated[bool, typer.Option("--insecure", help="plain HTTP, and no keys: for trials on one machine")]
On = Annotated[str, typer.Option("--on", metavar="SERVER", help="the server's control, HOST or HOST:PORT")]


def _say(text: str) -> None:
    typer.echo(legible(text), err=True)


def _keys(keys: Path | None, insecure: bool, party: str) -> Path | None:
    if insecure and keys is not None:
        raise SettingsError("--insecure: speaks plain HTTP and uses no keys; leave out one of --keys and --insecure")
    if keys is None and not insecure:
        raise SettingsError(
            f"--keys: name the {party}'s folder of keys, which `fedveil keys new DIR --host NAME --clients N` makes; or --insecure "
            "for a trial on one machine"
        )
    if keys is not None and not keys.is_dir():
        raise SettingsError(f"--keys {keys}: there is no such folder")
    return keys


def server(
    keys: Keys = None,
    state: Annotated[Path, typer.Option(metavar="DIR", help="everything the server keeps: runs, logs")] = Path("state"),
    host: Annotated[str, typer.Option(help="the address that clients reach")] = "0.0.0.0",
    port: Annotated[int, typer.Option(min=1, max=65535, help="the port that clients reach")] = 9092,
    control: Annotated[int, typer.Option(min=1, max=65535, help="port of `fedveil submit`, on loopback alone")] = 9093,
    max_update: Annotated[
        float, typer.Option(min=0.001, metavar="MIB", help="most that a client may send for one message")
    ] = 512.0,
    insecure: Insecure = False,
) -> None:
    """Serve clients on other machines: Flower's SuperLink on loopback, behind a gateway that lets registered clients in.

    It runs until Ctrl-C or SIGTERM. Started again on its --state, it goes on with the runs it was working on.
    """
    from fedveil.server.serving.serve import Options, serve

    if control == port:
        raise SettingsError(f"--control {control}: is the port that clients reach; give it another")
    options = Options(_keys(keys, insecure, "server"), state, host, port, control, max_update)
    serve(options, _say, _draw)


def _draw(folder: Path) -> None:
    """Draw the plots of a record."""
    from fedveil.core.record.record import Record
    from fedveil.simulations.plots import draw_record

    draw_record(Record(folder))


def client(
    address: Annotated[str, typer.Option("--server", metavar="HOST:PORT", help="where the server is")],
    data: Annotated[
        str,
        typer.Option(
            metavar="SOURCE",
            help="a CSV, an .npz, a folder of images; or DATASET:PARTITION/OF for trials, as in sms:2/5",
        ),
    ],
    keys: Keys = None,
    policy: Annotated[
        Path | None, typer.Option(metavar="FILE.toml", help="what this client refuses, whatever the server asks")
    ] = None,
    ledger: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="what this data has answered, over all servers; in your data folder without it"
        ),
    ] = None,
    state: Annotated[Path | None, typer.Option(metavar="DIR", help="its logs; client-N without it")] = None,
    number: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="with --insecure and data of its own: which client it is")
    ] = None,
    data_dir: Annotated[Path | None, typer.Option("--data-dir", help="folder that holds mnist/, sms/, enron/")] = None,
    insecure: Insecure = False,
) -> None:
    """Take part in a server's runs with the data on this machine, until Ctrl-C or SIGTERM.

    What leaves this machine: its updates (protected, where the run says so), and counts and losses. The data does not.
    """
    from fedveil.client.node.greeting import Address
    from fedveil.client.node.join import Options, client_number, join

    use_data_dir(data_dir)
    found = _keys(keys, insecure, "client")
    if number is not None and not insecure:
        raise SettingsError(f"--number {number}: a client's keys say which it is; leave it out")
    options = Options(Address.parse(address), data, found, policy, Path(), None if number is None else number - 1)
    state = state or Path(f"client-{client_number(options) + 1}")
    join(replace(options, state=state, ledger=ledger), _say)


def status(
    on: On = "localhost",
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Show a server's state: its clients, its runs, and whom it refused."""
    from rich.table import Table

    from fedveil.remote import Server

    told = Server(on).ask("/status")
    if as_json:
        typer.echo(json.dumps(told))
        return
    console = Console()
    server = f"server   FedVeil {told['fedveil']}, up {told['up_seconds']:.0f} s, state {told['state']}"
    console.print(legible(server), highlight=False, markup=False, soft_wrap=True)
    clients = Table("client", "address", "connected", "starts", "last seen", box=None, pad_edge=False)
    for one in sorted(told["clients"], key=lambda one: (one["client"] is None, one["client"])):
        name = "?" if one["client"] is None else f"client-{one['client'] + 1}"
        seen = f"{one['seen_seconds_ago']:.0f} s ago"
        clients.add_row(name, _plain(one["address"]), "yes" if one["connected"] else "no", str(one["starts"]), seen)
    console.print(clients if told["clients"] else "no client has joined yet")
    runs = Table("run", "status", "round", "score", "time", box=None, pad_edge=False)
    for one in told["runs"]:
        score = next((f"{key.replace('_', ' ')} {value:.4f}" for key, value in _by_rank(one["scores"])), "")
        seconds = "" if one["seconds"] is None else f"{one['seconds']:.0f} s"
        runs.add_row(_plain(one["run"]), _plain(one["status"]), f"{one['round']}/{one['rounds']}", score, seconds)
    console.print(runs if told["runs"] else "no runs yet")
    for one in told["refused"]:
        who = "a stranger" if one["client"] is None else f"client-{one['client'] + 1}"
        reason = printable(one["reason"], WORDS)
        console.print(f"refused  {who}: {reason}", highlight=False, markup=False, soft_wrap=True)


def _plain(words: str) -> Text:
    """Return a server's words as a cell in which nothing is markup."""
    return Text(printable(str(words), WORDS))


def _by_rank(scores: dict[str, float]) -> list[tuple[str, float]]:
    """Sort scores: accuracy before loss, on test data before clients' own."""
    ranks = ("test_accuracy", "validation_accuracy", "test_loss", "validation_loss", "train_loss")
    return sorted(scores.items(), key=lambda score: ranks.index(score[0]) if score[0] in ranks else len(ranks))


def logs(
    run: Annotated[str, typer.Argument(metavar="RUN", help="a run's name, see `fedveil status`")],
    on: On = "localhost",
    follow: Annotated[bool, typer.Option("--follow", help="go on until the run ends")] = False,
) -> None:
    """Show what a run on a server said."""
    from fedveil.remote import Server

    for line in Server(on).log(run, follow):
        typer.echo(line)


def stop(
    run: Annotated[str, typer.Argument(metavar="RUN", help="a run's name, see `fedveil status`")],
    on: On = "localhost",
) -> None:
    """Stop a run on a server; what it kept stays, and it can go on later."""
    from fedveil.remote import Server

    Server(on).ask(f"/runs/{run}/stop", {})
    typer.echo(f"{run} stops; go on with: fedveil resume {run} --on {on}")


def submit(
    preset: PresetOrFile = "digits",
    on: On = "localhost",
    assignments: Assignments = None,
    seed: Annotated[int | None, typer.Option(help="of the choices that are no secret")] = None,
    device: Annotated[str | None, typer.Option(help="cpu (auto is cpu) or cuda")] = None,
    data_dir: DataDir = None,
    reproducible: Annotated[
        bool,
        typer.Option(
            "--reproducible",
            help="training repeats from the seed, where each client's policy allows it: for comparisons",
        ),
    ] = False,
    show: Annotated[bool, typer.Option("--show", help="print the resolved settings as TOML, and run nothing")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Run an experiment on a `fedveil server`, with its clients, and show it as `fedveil run` shows one here.

    The record is on the server's machine; Ctrl-C leaves the run going.
    """
    use_data_dir(data_dir)
    experiment = experiment_of(preset, assignments, seed, device=device)
    if show:
        typer.echo(experiment.toml(), nl=False)
        return
    from fedveil.core.settings import legacy
    from fedveil.core.settings.experiment import parse_assignments
    from fedveil.remote import Server

    console = None if quiet else Console(stderr=as_json)
    remote = Server(on)
    asked = set(legacy.renamed(parse_assignments(assignments or [])))
    run = remote.start(experiment, lambda text: _print(console, text), asked, reproducible=reproducible)
    _follow(remote, on, run, 0, console, as_json)


def resume_on(on: str, run: str, as_json: bool, quiet: bool) -> None:
    """Resume a stopped run on a server, and show it: `fedveil resume RUN --on SERVER`."""
    from fedveil.remote import Server

    remote = Server(on)
    _follow(remote, on, run, remote.resume(run), None if quiet else Console(stderr=as_json), as_json)


def _follow(remote: Server, on: str, run: str, said: int, console: Console | None, as_json: bool) -> None:
    """Show a run until it ends, without the first `said` bytes of its log."""
    from fedveil.simulations.display import summary_text

    _print(console, f"run      {run} on {on} (fedveil logs, fedveil stop)")
    try:
        summary = remote.follow(run, lambda text: _print(console, text), said)
    except KeyboardInterrupt:  # the view ends, and nothing failed
        typer.echo(f"{run} goes on on the server; end it with: fedveil stop {run} --on {on}", err=True)
        raise typer.Exit(130) from None
    if as_json:
        typer.echo(json.dumps(summary))
    else:
        _print(console, summary_text(SimpleNamespace(summary=summary)))  # type: ignore[arg-type]


def _print(console: Console | None, text: str) -> None:
    if console:
        console.print(legible(text), highlight=False, soft_wrap=True, markup=False)
