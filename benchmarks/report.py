"""The output of `python -m benchmarks`: tables for a terminal, and the sections of docs/performance.md."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from benchmarks.contest import PEERS, Measures
from benchmarks.stages import NAMES
from fedveil.core.errors import SettingsError
from fedveil.core.record.record import write_atomically

Grid = tuple[str, Sequence[str], Sequence[Sequence[str]]]  # title, headings, rows

PICTURE = "images/growth.png"  # beside the page
HEADINGS = (
    "job", "FedVeil", "bare loop", "FedVeil / bare", "bare, by autograd", "FedVeil / that", "floor",
    "Flower", "Flower / FedVeil", "pfl", "pfl / FedVeil",
)  # fmt: skip


def surroundings(command: Sequence[str]) -> Measures:
    """Return the machine, the versions, the date and the command."""
    packages = ("fedveil", "torch", "numpy", "flwr")
    return {
        "machine": {"processor": _processor(), "cores": os.cpu_count(), "platform": platform.platform()},
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}},
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": list(command),
    }


def _processor() -> str:
    """Return the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def table(rows: Sequence[Measures], notes: Sequence[str]) -> RenderableType:
    """Return tables of each job's milliseconds a client, first round and memory, with notes, for a terminal."""
    speed = Table(title="ms a client, whole rounds", title_justify="left", box=None, pad_edge=False)
    other = Table(title="first round done, s", title_justify="left", box=None, pad_edge=False)
    for i, heading in enumerate(HEADINGS):
        speed.add_column(
            heading.replace("FedVeil / ", "ours/").replace(" / FedVeil", "/ours"),
            overflow="fold",
            justify="left" if i == 0 else "right",
        )
    for i, heading in enumerate(("job", "FedVeil", *PEERS, "memory, MB", "engine", "model")):
        other.add_column(heading, overflow="fold", justify="left" if i in (0, 5, 6) else "right")
    for row in rows:
        speed.add_row(*_cells(row))
        other.add_row(*_starts(row), row["model_sha256"][:12])
    return Group(speed, "", other, *_notes(rows, notes))


def tables(grids: Sequence[Grid], notes: Sequence[str]) -> RenderableType:
    """Return tables for a terminal, with notes below them."""
    shown: list[RenderableType] = []
    for title, headings, rows in grids:
        grid = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for i, heading in enumerate(headings):
            grid.add_column(heading, overflow="fold", justify="left" if i == 0 else "right")
        for row in rows:
            grid.add_row(*row)
        shown += [grid, ""]
    return Group(*shown, *notes)


def tables_section(opening: str, grids: Sequence[Grid], notes: Sequence[str]) -> str:
    """Return tables for a page as Markdown, between an opening and notes."""
    lines = [opening]
    for title, headings, rows in grids:
        lines += ["", f"{title}:", "", *markdown(headings, rows)]
    return "\n".join([*lines, *(["", *(f"- {note}" for note in notes)] if notes else [])])


def verdict(target: Measures) -> list[str]:
    """Return what was found of a target, and whether it is reached."""
    if target["found"] is None:
        return ["not measured", ""]
    return [f"{target['found']:.4g}", "yes" if target["reached"] else "no"]


def growth_table(rows: Sequence[Measures]) -> RenderableType:
    """Return a table of time and memory at each point."""
    grid = Table(box=None, pad_edge=False)
    for heading in ("population", "cohort", "ms a round", "ms a client", "first round, s", "memory, MB", "engine"):
        grid.add_column(heading, overflow="fold", justify="right")
    for row in rows:
        grid.add_row(*_point(row))
    return grid


def jobs_section(rows: Sequence[Measures], notes: Sequence[str], around: Measures, repeats: int) -> str:
    """Return the page's section about the jobs as Markdown."""
    machine = around["machine"]
    versions = {**around["versions"], **_peer_versions(rows)}
    engines = ", ".join(f"{row['job']} {row['engine']}" for row in rows)
    rate = max(row["gflops"] for row in rows)
    lines = [
        f"Measured on {around['date'][:10]} with `{' '.join(around['command'])}` on {machine['cores']} cores of {machine['processor']} "
        f"({rate:.0f} GFLOP/s in a product of 1024 x 1024 matrices), "
        f"{', '.join(f'{name} {version}' for name, version in versions.items())}; the median of {repeats} runs, least to most in "
        f"brackets. Engines that `auto` picked, or that were asked for: {engines}.",
        "",
        *markdown(HEADINGS, [_cells(row, spread=True) for row in rows]),
        "",
        "The first round done, in seconds from the start of the process, and the most memory FedVeil took:",
        "",
        *markdown(("job", "FedVeil", *PEERS, "memory, MB", "engine"), [_starts(row) for row in rows]),
        "",
        "Where FedVeil's time goes, in milliseconds a client, from a run of its own with a clock around each stage:",
        "",
        *markdown(("job", *NAMES), [[row["job"], *(f"{row['stages_ms'][name]:.3f}" for name in NAMES)] for row in rows]),
    ]  # fmt: skip
    said = _notes(rows, notes)
    return "\n".join([*lines, *(["", *(f"- {note}" for note in said)] if said else [])])


def growth_section(rows: Sequence[Measures], around: Measures) -> str:
    """Return the page's section about growth as Markdown."""
    headings = ("population", "cohort", "ms a round", "ms a client", "first round, s", "memory, MB", "engine")
    machine = around["machine"]
    return "\n".join([
        f"Measured on {around['date'][:10]} with `{' '.join(around['command'])}` on {machine['cores']} cores of {machine['processor']}.",
        "",
        f"![Time and memory by cohort and by population]({PICTURE})",
        "",
        *markdown(headings, [_point(row) for row in rows]),
    ])  # fmt: skip


def check_page(path: Path, name: str) -> None:
    """Raise SettingsError where `path` is no page with a section `name`."""
    begin, end = _marks(name)
    text = path.read_text("utf-8") if path.is_file() else ""
    if not 0 <= text.find(begin) < text.find(end):
        raise SettingsError(
            f"--write {path}: must be a page with the lines {begin} and {end}, as docs/performance.md has"
        )


def write_section(path: Path, name: str, text: str) -> None:
    """Replace the section `name` of a page: the text between its marks."""
    begin, end = _marks(name)
    before, _, rest = path.read_text("utf-8").partition(begin)
    after = rest.partition(end)[2]
    write_atomically(path, f"{before}{begin}\n{text}\n{end}{after}".encode())


def _marks(name: str) -> tuple[str, str]:
    return f"<!-- {name} -->", f"<!-- end of {name} -->"


def _cells(row: Measures, *, spread: bool = False) -> list[str]:
    """Return a job's row under HEADINGS."""

    def time(prefix: str) -> str:
        value = row[f"{prefix}ms_per_client"]
        if value is None:
            return "not measured"
        least, most = row[f"{prefix}ms_per_client_range"]
        more = f" ({row[f'{prefix}variant']})" if prefix else ""
        return short(value) + (f" [{short(least)} to {short(most)}]{more}" if spread else "")

    def times(key: str) -> str:
        return "" if row[key] is None else f"{row[key]:.1f}x"

    usual = statistics.median(row["variants"].get("bare autograd", [0.0]))
    return [
        row["job"], time(""), time("bare_"), f"{row['times_bare']:.2f}",
        short(usual) if usual else "", f"{row['ms_per_client'] / usual:.2f}" if usual else "",
        short(row["floor_ms_per_client"]), time("flower_"), times("flower_speedup"), time("pfl_"), times("pfl_speedup"),
    ]  # fmt: skip


def _starts(row: Measures) -> list[str]:
    firsts = [row[f"{prefix}first_round_s"] for prefix in ("", *(f"{peer}_" for peer in PEERS))]
    return [
        row["job"],
        *("" if value is None else f"{value:.1f}" for value in firsts),
        f"{row['memory_mb']:,.0f}",
        row["engine"],
    ]


def _point(row: Measures) -> list[str]:
    return [
        f"{row['population']:,}", f"{row['cohort']:,}", short(row["ms_per_round"]), short(row["ms_per_client"]),
        f"{row['first_round_s']:.1f}", f"{row['memory_mb']:,.0f}", row["engine"],
    ]  # fmt: skip


def short(value: float) -> str:
    """Write a number with three significant digits, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _notes(rows: Sequence[Measures], notes: Sequence[str]) -> list[str]:
    return list(dict.fromkeys([*notes, *(note for row in rows for note in row["notes"])]))


def _peer_versions(rows: Sequence[Measures]) -> dict[str, Any]:
    return {f"{peer} (peer)": row[f"{peer}_version"] for row in rows for peer in PEERS if row[f"{peer}_version"]}


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a table's lines."""
    return [f"| {' | '.join(cells)} |" for cells in (headings, ["---"] * len(headings), *rows)]
