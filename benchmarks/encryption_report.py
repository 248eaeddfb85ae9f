"""What `fedveil bench encryption` says: tables for a terminal, and the section of docs/performance.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from fedveil.benchmarks.encryption import DROP_OUTS, MANY, SAID
from fedveil.benchmarks.remote import Measures
from fedveil.benchmarks.report import markdown, short

Grid = tuple[str, Sequence[str], list[list[str]]]  # title, headings, rows


def table(found: Measures) -> RenderableType:
    """All rows, and which targets are reached."""
    shown: list[Any] = []
    for title, headings, rows in grids(found, spread=False):
        grid = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for i, heading in enumerate(headings):
            grid.add_column(heading, justify="left" if i == 0 else "right")
        for row in rows:
            grid.add_row(*row)
        shown += [grid, ""]
    return Group(*shown, *found["notes"])


def section(found: Measures, around: Measures, repeats: int) -> str:
    """The measured part of the page, Markdown."""
    machine, versions = around["machine"], {**around["versions"], **found["versions"]}
    lines = [
        f"Measured on {around['date'][:10]} with `{' '.join(around['command'])}` on one core of {machine['processor']}, "
        f"{', '.join(f'{name} {version}' for name, version in versions.items())}; the median of {repeats} runs, least to most in "
        "brackets. Times are CPU time."
    ]  # fmt: skip
    for title, headings, rows in grids(found, spread=True):
        lines += ["", f"{title}:", "", *markdown(headings, rows)]
    return "\n".join([*lines, *(["", *(f"- {note}" for note in found["notes"])] if found["notes"] else [])])


def grids(found: Measures, *, spread: bool) -> list[Grid]:
    """All tables; spread: with the least and the most of the runs."""
    return [
        _ways(found, spread),
        _masked(found),
        *([_whole(found)] if found["whole_runs"] else []),
        ("What is to be reached", ("row", "figure", "at most", "found", "reached"), [
            [target["row"], SAID[target["quantity"]], f"{target['most']:g}", *_verdict(target)]
            for target in found["targets"]
        ]),
    ]  # fmt: skip


def _ways(found: Measures, spread: bool) -> Grid:
    clients = found["clients"]
    headings = (
        "way", "upload, B a parameter", "download", "client, ms a round", "of naive's", "server, ms a client", "of naive's",
        "of it once a round, ms", "largest error", f"server's memory, MB, {clients} clients", f"{MANY} clients",
    )  # fmt: skip
    rows = []
    for row in found["ways"]:

        def time(key: str, row: Measures = row) -> str:
            least, most = (value * 1e3 for value in row[f"{key}_range"])
            return short(row[key] * 1e3) + (f" [{short(least)} to {short(most)}]" if spread else "")

        many = row["memory_many_mb"]
        rows.append([
            row["way"], f"{row['upload']:.2f}", f"{row['download']:.2f}", time("client_s"), f"{row['client_ratio']:.3f}",
            time("server_s"), f"{row['server_ratio']:.3f}", short(row["once_s"] * 1e3), f"{row['error']:.1e}",
            f"{row['memory_mb']:,.1f}",
            f"about {row['memory_mb'] * MANY / clients:,.0f}, held" if many is None else f"{many:,.1f}",
        ])  # fmt: skip
    return f"{found['parameters']:,} parameters, {clients} clients", headings, rows


def _masked(found: Measures) -> Grid:
    masked = found["secagg"]
    headings = (
        "secure aggregation", "upload, B a parameter", "of plain's", "and shares, kB", "client, ms a round",
        "server, ms a round", f"with {DROP_OUTS:.0%} dropped out", "largest error",
    )  # fmt: skip
    rows = [
        [
            name, f"{4 * row['masked_ratio']:.2f}", f"{row['masked_ratio']:.3f}", f"{row['other_bytes'] / 1e3:.1f}",
            short(row["client_s"] * 1e3), short(row["round_s"] * 1e3), short(row["server_dropped_s"] * 1e3),
            f"{row['error']:.1e}",
        ]
        for name, row in (("FedVeil", masked["fedveil"]), ("Flower's SecAgg+", masked["flower"]))
    ]  # fmt: skip
    title = (
        f"{masked['parameters']:,} parameters, {masked['clients']} clients, each secret in {masked['shares']} shares of which "
        f"{masked['threshold']} give it back"
    )
    return title, headings, rows


def _whole(found: Measures) -> Grid:
    headings = ("whole runs", "plain, ms a client", "protected", "added", "times")
    rows = [
        [
            row["job"],
            short(row["plain_ms"]),
            short(row["protected_ms"]),
            short(row["added_ms"]),
            f"{row['times']:.3f}",
        ]
        for row in found["whole_runs"]
    ]
    return "Whole runs in one process, CPU time of a client's round and its share of the server's", headings, rows


def _verdict(target: Measures) -> list[str]:
    if target["found"] is None:
        return ["not measured", ""]
    return [f"{target['found']:.3g}", "yes" if target["reached"] else "no"]
