"""`fedveil ledger`: what a client's data has answered so far, from the ledger on the client's own machine."""

from __future__ import annotations

import json
import math
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from fedveil.core.errors import SettingsError
from fedveil.options import AsJson

if TYPE_CHECKING:
    from fedveil.privacy.trust.ledger import Ledger

KINDS = {
    "hello": "greetings",
    "train": "updates",
    "loss": "losses of a model",
    "evaluate": "evaluations",
    "open": "decrypted aggregates",
    "confirm": "lists of survivors signed",
    "reveal": "sums unmasked",
    "sign": "manifests signed",
    "agree": "manifests agreed to",
    "forged": "runs left, as their server forged an aggregate",
}


def ledger(
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="a ledger; all in your data folder without it")
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", metavar="SOURCE", help="that of this data, as `fedveil client` names it")
    ] = None,
    manifest: Annotated[
        str | None, typer.Option("--manifest", metavar="RUN", help="print what this run's clients signed, and who did")
    ] = None,
    delta: Annotated[float, typer.Option(help="of epsilon")] = 1e-5,
    as_json: AsJson = False,
) -> None:
    """Show what a client's data has answered so far, over all runs and servers: on the client's own machine."""
    found = _find(file, data)
    if not 0 < delta < 1:
        raise SettingsError(f"--delta {delta:g}: must be between 0 and 1")
    if manifest is not None:
        _show_manifest(found, manifest, as_json=as_json)
        return
    told = [_told(each, delta) for each in found]
    if as_json:
        typer.echo(json.dumps({"ledgers": told}))
        return
    console = Console()
    for each in told:
        _show(console, each, delta)


def _find(file: Path | None, data: str | None) -> list[Ledger]:
    """Open the ledgers that are asked for; raise SettingsError where there is none."""
    from fedveil.client.node.ledger import ledger_path, source_name
    from fedveil.privacy.trust.journal import source_of
    from fedveil.privacy.trust.ledger import Ledger

    if file is not None and data is not None:
        raise SettingsError(f"--data {data}: and a file, {file}; leave out one of the two")
    if data is not None:
        file = ledger_path(data)
    paths = sorted(ledger_path("digits:1/1").parent.glob("*.ledger")) if file is None else [file]
    if not paths or not paths[0].exists():
        where = f"{ledger_path('digits:1/1').parent}" if file is None else f"{file}"
        raise SettingsError(f"{where}: there is no ledger; `fedveil client` makes one, and says where, when it joins")
    return [Ledger.open(path, source_of(path) if data is None else source_name(data)) for path in paths]


def _told(ledger: Ledger, delta: float) -> dict[str, Any]:
    """Return what a ledger adds up to."""
    totals = ledger.totals()
    entries = ledger.entries()
    epsilon = totals.epsilon(delta)
    return {
        "file": str(ledger.path),
        "data": ledger.source,
        "answers": {kind: totals.answers[kind] for kind in KINDS},
        "runs": len({entry.run for entry in entries}),
        "epsilon": epsilon if math.isfinite(epsilon) else None,
        "delta": delta,
        "without_noise": totals.exact,
        "cohorts": [len(cohort) for cohort in totals.cohorts],
        "first": entries[0].at if entries else None,
        "last": entries[-1].at if entries else None,
    }


def _show(console: Console, told: dict[str, Any], delta: float) -> None:
    from rich.table import Table

    console.print(f"ledger   {told['file']}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"data     {told['data']}", highlight=False, markup=False, soft_wrap=True)
    table = Table("answers", "", box=None, pad_edge=False)
    for kind, words in KINDS.items():
        if told["answers"][kind]:
            table.add_row(words, f"{told['answers'][kind]:,}")
    console.print(table if told["last"] else "no answer yet")
    if told["last"]:
        when = f"{datetime.fromtimestamp(told['first']):%Y-%m-%d %H:%M} to {datetime.fromtimestamp(told['last']):%Y-%m-%d %H:%M}"
        console.print(f"runs     {told['runs']:,}, from {when}", highlight=False)
    if told["cohorts"]:
        console.print(
            f"cohorts  {len(told['cohorts']):,}, the smallest of {min(told['cohorts']):,} clients", highlight=False
        )
    if told["without_noise"]:
        console.print(
            f"epsilon  none: {told['without_noise']:,} answers had no noise of this client's own", highlight=False
        )
    else:
        console.print(f"epsilon  {told['epsilon']:.3g} at delta {delta:g}, by this client's own noise", highlight=False)


def _show_manifest(ledgers: list[Ledger], run: str, *, as_json: bool) -> None:
    """Print a run's manifest and who signed it; raise SettingsError where no ledger has it.

    run: the start of its id, or of the fingerprint that client and server show of its manifest
    """
    from fedveil.privacy.homomorphic.keys import fingerprint

    archived = [one for ledger in ledgers for one in ledger.manifests()]
    shown = {one.run: fingerprint(sha256(one.manifest).digest()) for one in archived}
    found = [one for one in archived if one.run.hex().startswith(run.lower()) or shown[one.run].startswith(run.lower())]
    if len({one.run for one in found}) != 1:
        known = ", ".join(f"{one.hex()} (manifest {words})" for one, words in sorted(shown.items())[-5:]) or "none"
        raise SettingsError(
            f"--manifest {run}: names {'several runs' if found else 'no run'} of this ledger; it has: {known}"
        )
    newest = max(found, key=lambda one: one.when)
    who = [f"client-{client + 1}" for client in newest.signatures]
    if as_json:
        signatures = {str(client): one.hex() for client, one in newest.signatures.items()}
        typer.echo(json.dumps({
            "run": newest.run.hex(), "manifest": newest.manifest.decode(), "signed": who, "signatures": signatures,
            "when": newest.when,
        }))  # fmt: skip
        return
    typer.echo(newest.manifest.decode(), nl=False)
    typer.echo(f"signed by {', '.join(who)}; agreed to on {datetime.fromtimestamp(newest.when):%Y-%m-%d %H:%M}")
