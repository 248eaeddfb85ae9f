"""Commands for keys: `fedveil keys new`, `renew`, `show`, `open`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedveil.core.errors import SettingsError
from fedveil.core.foreign import legible

app = typer.Typer(help="Make, compare and use the keys of protected runs.", no_args_is_help=True)


@app.command("new")
def new(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="a new folder; it gets a folder for each party")],
    clients: Annotated[int, typer.Option(metavar="N", min=1, help="parties that train")] = 1,
    host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="the server's DNS name or IP address: makes its certificate, and its authority; repeatable",
        ),
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="what the keys are for, as in privacy.protection=bfv (ckks without it)"
        ),
    ] = None,
) -> None:
    """Make new keys: DIR/server without any secret of clients, DIR/client-1, DIR/client-2, ... with the clients' own.

    They serve all runs of a federation; another federation needs its own. Bring each client its folder by a way you
    trust, never through the server. With --host the parties may be on separate machines, over TLS, and DIR/operator has
    what signs the server's certificates.
    """
    from fedveil.core.settings.experiment import Experiment, parse_assignments
    from fedveil.privacy.homomorphic.keys import fingerprint, write_keys
    from fedveil.privacy.plan import make_lattice
    from fedveil.privacy.trust.certificates import CERTIFICATE
    from fedveil.privacy.trust.key_folders import describe, new_parties

    settings = {"privacy.protection": "ckks", **parse_assignments(assignments or [])}
    unfit = [key for key in settings if not key.startswith("privacy.")]
    if unfit:
        raise SettingsError(f"--set {unfit[0]}: keys depend on settings of [privacy] alone")
    privacy = Experiment().override(settings).privacy
    lattice = make_lattice(privacy) if privacy.shows == "sum" else None
    key_id = write_keys(folder, lattice, clients, new_parties(clients, privacy, host or []))
    if lattice:
        typer.echo(
            f"key      {fingerprint(key_id)}  ({privacy.protection}, degree {lattice.degree}; both sides show this)"
        )
    secret = (
        "its TLS key, mode 0600, and no secret of clients: bring it to the server's machine" if host else "no secret"
    )
    typer.echo(f"server   {folder / 'server'}  ({secret})")
    if host:
        typer.echo(f"         {describe(folder / 'server' / CERTIFICATE)[0]}")
    names = "client-1" if clients == 1 else f"client-1 to client-{clients}"
    typer.echo(f"clients  {folder / names}  (secret: mode 0600; bring each to its machine by a way you trust)")
    if host:
        typer.echo(
            f"operator {folder / 'operator'}  (ca.key signs the server's certificates: it stays with you, offline, and goes to no "
            "other machine)"
        )


@app.command("renew")
def renew(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="what `fedveil keys new` made, with operator/ and server/")
    ],
) -> None:
    """Make a new certificate for the server, with a new key and the same names; clients need nothing new."""
    from fedveil.privacy.trust.certificates import CERTIFICATE, CERTIFICATE_KEY, certificate_words
    from fedveil.privacy.trust.key_folders import renew_certificate

    words = certificate_words(renew_certificate(folder))
    server = folder / "server"
    typer.echo(f"server   {words}")
    typer.echo(
        f"         bring {server / CERTIFICATE} and {server / CERTIFICATE_KEY} to the server, and restart it there"
    )


@app.command("show")
def show(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="a file that `fedveil keys new` wrote, or a folder of them")
    ],
) -> None:
    """Show what keys and certificates are, for people to compare: fingerprints, names, dates; nothing of a key itself."""
    from fedveil.privacy.trust.key_folders import describe

    for line in describe(path):
        typer.echo(legible(line))


@app.command("open")
def open_model(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="the record of a run under ckks or bfv")],
    keys: Annotated[Path, typer.Option(metavar="DIR", help="a client's folder of keys")],
    out: Annotated[Path | None, typer.Option(help="where to; RUN/model.safetensors without it")] = None,
    unauthenticated: Annotated[
        bool,
        typer.Option(
            "--unauthenticated", help="a record of FedVeil 0.1.0: nothing shows that its server told the truth"
        ),
    ] = False,
) -> None:
    """Decrypt the final model, which a server kept as a ciphertext, with a client's key, and write it, mode 0600.

    It must be a sum of what clients sent, which the key shows; nothing that the record names is imported or run.
    """
    import logging

    from fedveil.simulations.holder import open_record

    logging.getLogger("flwr").setLevel(logging.WARNING)
    typer.echo(f"model    {open_record(folder, keys, out, unauthenticated=unauthenticated)}")
