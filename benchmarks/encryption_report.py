"""The output of `python -m benchmarks encryption`: tables for a terminal, and the section of docs/performance.md."""

from __future__ import annotations

from rich.console import RenderableType

from benchmarks.contest import Measures
from benchmarks.encryption import DROP_OUTS, LATTICES, SAID
from benchmarks.report import Grid, short, tables, tables_section, verdict


def table(found: Measures) -> RenderableType:
    """Return tables of all rows, and of which targets are reached, for a terminal."""
    return tables(grids(found, spread=False), found["notes"])


def section(found: Measures, around: Measures, repeats: int) -> str:
    """Return the measured section of the page as Markdown."""
    machine, versions = around["machine"], {**around["versions"], **found["versions"]}
    opening = (
        f"Measured on {around['date'][:10]} with `{' '.join(around['command'])}` on one core of {machine['processor']}, "
        f"{', '.join(f'{name} {version}' for name, version in versions.items())}; the median of {repeats} runs, least to most in "
        "brackets. Times are CPU time."
    )  # fmt: skip
    return tables_section(opening, grids(found, spread=True), found["notes"])


def grids(found: Measures, *, spread: bool) -> list[Grid]:
    """Return all tables; `spread`: with the least and the most of the runs."""
    return [
        _costs(found, spread),
        _authentication(found),
        _errors(found),
        _masked(found),
        *([_whole(found)] if found["whole_runs"] else []),
        ("What is to be reached", ("row", "figure", "at most", "found", "reached"), [
            [target["row"], SAID[target["quantity"]], f"{target['most']:g}", *verdict(target)]
            for target in found["targets"]
        ]),
    ]  # fmt: skip


def _costs(found: Measures, spread: bool) -> Grid:
    headings = ("way", "up", "down", "client, ms", "of naive's", "server, ms", "of naive's", "once, ms")
    rows = []
    for row in found["ways"]:

        def time(key: str, row: Measures = row) -> str:
            least, most = (value * 1e3 for value in row[f"{key}_range"])
            return short(row[key] * 1e3) + (f" [{short(least)} to {short(most)}]" if spread else "")

        rows.append([
            row["way"], f"{row['upload']:.2f}", f"{row['download']:.2f}", time("client_s"), f"{row['client_ratio']:.3f}",
            time("server_s"), f"{row['server_ratio']:.3f}", short(row["once_s"] * 1e3),
        ])  # fmt: skip
    title = (
        f"{found['parameters']:,} parameters, {found['clients']} clients: bytes a parameter, CPU of a client's round, of the "
        "server a client, and what of that it does once a round"
    )
    return title, headings, rows


def _authentication(found: Measures) -> Grid:
    headings = (
        "way", "own seeds expanded, ms", "products, ms", "pads, ms", "check of a sum, ms", "of the client's other CPU",
        "server, ms a client", "bytes a ciphertext",
    )  # fmt: skip
    parts = ("expand_s", "products_s", "pads_s", "check_s")
    rows = [
        [
            row["way"], *(short(row[part] * 1e3) for part in parts), f"{row['authentication']:.3f}",
            short(row["tags_s"] * 1e3), f"{row['tag_bytes']:.0f}",
        ]
        for row in found["ways"] if row["way"] in LATTICES
    ]  # fmt: skip
    return "Authentication, in the times above: its parts, and its share", headings, rows


def _errors(found: Measures) -> Grid:
    clients = found["clients"]
    rows = []
    for row in found["ways"]:
        many = row["memory_many_mb"]
        rows.append([
            row["way"], f"{row['error']:.1e}", f"{row['memory_mb']:,.1f}",
            f"{row['memory_each_mb']:.0f} more a client" if many is None else f"{many:,.1f}",
        ])  # fmt: skip
    headings = ("way", "largest error", f"{clients} clients", f"{found['many']} clients")
    return "The error of the mean, and the server's memory in MB", headings, rows


def _masked(found: Measures) -> Grid:
    masked = found["secagg"]
    headings = (
        "secure aggregation", "up", "of plain's", "shares, kB", "client, ms", "server, ms", f"{DROP_OUTS:.0%} drop out, ms",
        "largest error",
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
        f"{masked['threshold']} give it back: bytes a parameter, other bytes a client, CPU of a client's round and of the server's"
    )
    return title, headings, rows


def _whole(found: Measures) -> Grid:
    headings = ("run", "plain, ms", "protected, ms", "added, ms", "times")
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
    return "Whole runs: CPU of a client's round and its share of the server's", headings, rows
