"""The output of `python -m benchmarks deployment`: tables for a terminal, and the section of docs/performance.md."""

from __future__ import annotations

from rich.console import RenderableType

from benchmarks.contest import Measures
from benchmarks.deployment import BARE_ROUNDS, PARTS, ROUNDS, SAID
from benchmarks.report import Grid, short, tables, tables_section, verdict


def table(found: Measures) -> RenderableType:
    """Return tables of all rows, and of which targets are reached, for a terminal."""
    return tables(grids(found), found["notes"])


def section(found: Measures, around: Measures, repeats: int) -> str:
    """Return the measured section of the page as Markdown."""
    machine, versions = around["machine"], around["versions"]
    opening = (
        f"Measured on {around['date'][:10]} with `{' '.join(around['command'])}` on {machine['cores']} cores of {machine['processor']}, "
        f"{', '.join(f'{name} {version}' for name, version in versions.items())}; {found['clients']} clients; the median of "
        f"{repeats} runs of {ROUNDS - 2} rounds of FedVeil and {BARE_ROUNDS - 1} of Flower, least to most in brackets."
    )  # fmt: skip
    return tables_section(opening, grids(found), found["notes"])


def grids(found: Measures) -> list[Grid]:
    """Return all tables."""
    rows = found["rows"]
    return [
        ("Seconds a round", ("job", "FedVeil", "bare Flower", "Flower / FedVeil"), [
            [row["job"], _time(row, ""), _time(row, "bare_"), f"{row['speedup']:.1f}x"] for row in rows
        ]),
        ("Where they go, medians", ("job", "", *PARTS), [
            [row["job"], name, *(f"{row[f'{prefix}parts_s'][part]:.2f}" for part in PARTS)]
            for row in rows for prefix, name in (("", "FedVeil"), ("bare_", "bare Flower"))
        ]),
        (
            "kB a client and round on the wire, TLS and HTTP in them, and as the run's ledger counts them",
            ("job", "up", "ledger", "down", "ledger", "wire / ledger", "calls", "new connections"),
            [_bytes(row) for row in rows],
        ),
        ("Memory after these rounds, MB", ("job", "server", "a client", "bare: server", "bare: a client"), [
            [row["job"], *(f"{row[key]:,.0f}" for key in ("server_mb", "client_mb", "bare_server_mb", "bare_client_mb"))]
            for row in rows
        ]),
        ("What is to be reached", ("job", "figure", "at most", "found", "reached"), [
            [target["job"], SAID[target["quantity"]], f"{target['most']:g}", *verdict(target)]
            for target in found["targets"]
        ]),
    ]  # fmt: skip


def _time(row: Measures, prefix: str) -> str:
    least, most = row[f"{prefix}round_s_range"]
    return f"{short(row[f'{prefix}round_s'])} [{short(least)} to {short(most)}]"


def _bytes(row: Measures) -> list[str]:
    sizes = (f"{row[key] / 1e3:,.1f}" for key in ("wire_up", "payload_up", "wire_down", "payload_down"))
    return [row["job"], *sizes, f"{row['wire_ratio']:.3f}", f"{row['calls']:.1f}", f"{row['connections']:.1f}"]
