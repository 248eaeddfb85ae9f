"""The terminal output of `fedveil attack`: what was recovered beside the truth, and scores beside guessing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from fedveil.core.examples import Examples
from fedveil.datasets.text import UNKNOWN
from fedveil.datasets.tokens import joined, space
from fedveil.simulations.attacks.lab.lab import Outcome, Shown
from fedveil.simulations.attacks.lab.observers import OBSERVERS
from fedveil.simulations.attacks.lab.scoring import matched, sentence_of, words_of

LINES, TEXTS = 3, 4  # trials shown in a terminal, and of each so many texts
LABEL = 9  # characters of a line before what it tells
FOUND, MISSED, WRONG = "green", "bright_black", "red"
NAMES = {
    "recall": "recall", "precision": "precision", "f1": "F1", "of_one": "precision, of one client", "exact": "all right", "counted": "counted right", "rouge_l": "ROUGE-L",
    "psnr": "PSNR, dB", "median": "median, dB", "least": "least, dB", "accuracy": "accuracy", "auc": "AUC",
    "tpr_at_1_fpr": "TPR at 1 % FPR", "cosine": "cosine", "relative_error": "relative error",
}  # fmt: skip


def named(metric: str) -> str:
    """Return the name of a metric for people."""
    if metric.startswith("above_"):
        return f"share above {metric.removeprefix('above_')} dB"
    return NAMES.get(metric, metric)


@contextmanager
def progress(console: Console | None, name: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar of trials within the block; yield the function that moves it to (done, total)."""
    if console is None or not console.is_terminal:
        yield lambda _done, _all: None
        return
    columns = (TextColumn("attack {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=max(done, total))


def show(outcome: Outcome, console: Console) -> None:
    """The threat model, some answers, and the scores."""
    own = "".join(f", {key} = {value}" for key, value in outcome.settings.items())
    console.print(f"attack   {outcome.attack} on {outcome.experiment.name}{own}", highlight=False, markup=False)
    console.print(f"observer {OBSERVERS[outcome.observer].knows}", highlight=False, markup=False, soft_wrap=True)
    if outcome.refused:
        console.print(
            f"refused  {outcome.refused}: what is left is guessing", highlight=False, markup=False, soft_wrap=True
        )
    if outcome.warning:
        console.print(f"warning  {outcome.warning}", highlight=False, markup=False, soft_wrap=True)
    for shown in outcome.shown[:LINES] if outcome.refused is None else []:
        for line in lines(outcome.recovers, shown):
            console.print(line, soft_wrap=True)
    console.print(scores_table(outcome))


def scores_table(outcome: Outcome) -> Table:
    """Return a table of each metric beside guessing."""
    grid = Table(box=None, pad_edge=False)
    for heading in ("score", "attack", "guessing"):
        grid.add_column(heading, justify="left" if heading == "score" else "right")
    reached, guessed = outcome.mean(), outcome.mean(baseline=True)
    for metric, value in reached.items():
        grid.add_row(named(metric), f"{value:.3f}", f"{guessed[metric]:.3f}")
    grid.add_row("trials", str(len(outcome.scores)), "")
    return grid


def lines(recovers: str, shown: Shown) -> list[Text]:
    """Describe one trial for people: the truth, what was read of it, and what was not, each on a line that says so."""
    known, truth, found = shown.trial.known, shown.trial.truth, shown.found
    if recovers in ("words", "sentence"):
        return [_sent(truth.examples, known.words), *_read(recovers, truth.examples, found, known.words)]
    if recovers == "images":
        decibels = [value for _, value in matched(np.asarray(found), truth.examples.features)]
        return [Text("  images " + "  ".join("none" if value < 0 else f"{value:.0f} dB" for value in decibels[:16]))]
    if recovers == "labels":
        wanted_counts = np.bincount(truth.examples.labels, minlength=len(known.task.classes))
        return [Text(f"  labels {_counts(wanted_counts, known.task.classes)}"),
                Text(f"  read   {_counts(np.asarray(found), known.task.classes)}")]  # fmt: skip
    return []


def _sent(examples: Examples, words: tuple[str, ...] | None) -> Text:
    sent = texts(examples, words)
    more = f" | and {len(sent) - TEXTS} more" if len(sent) > TEXTS else ""
    return Text("  sent   " + " | ".join(sent[:TEXTS]) + more)


def _read(recovers: str, examples: Examples, found: Any, words: tuple[str, ...] | None) -> list[Text]:
    """Return what was read rightly, read wrongly, and missed: no line mixes them, as a pipe or a log has no colours."""
    if recovers == "sentence":
        wanted = sentence_of(examples)
        places = [i < len(wanted) and wanted[i] == word for i, word in enumerate(found)]
        read, before = Text("  read   "), ""
        for word, right in zip(found, places, strict=True):
            spelled = _spell(word, words)
            read.append(space(before, spelled) + spelled, FOUND if right else WRONG)
            before = spelled
        return [read, Text(f"  right  {sum(places)} of {len(wanted)} words in their place")]
    held = words_of(examples)
    told = [word for word in found if word > UNKNOWN]
    parts = {
        "read": (FOUND, [word for word in told if word in held]),
        "wrong": (WRONG, [word for word in told if word not in held]),
        "missed": (MISSED, [word for word in held if word not in found]),
    }
    answer = []
    for label, (style, ids) in parts.items():
        line = Text(f"  {label:<7}")
        for word in ids:
            line.append(_spell(word, words) + " ", style)
        if label == "read" and not ids:
            line.append("nothing")
        if ids or label == "read":
            answer.append(line)
    return answer


def _spell(word: int, words: tuple[str, ...] | None) -> str:
    return words[word] if words is not None and word < len(words) else f"#{word}"


def _counts(counts: np.ndarray, classes: tuple[str, ...]) -> str:
    return ", ".join(f"{count} x {name}" for count, name in zip(counts, classes, strict=True) if count)


def texts(examples: Examples, words: tuple[str, ...] | None) -> list[str]:
    """Write texts as the clients' networks got them, with ids for words where the vocabulary is hashed."""

    def spell(row: Any) -> str:
        ids = [int(word) for word in row if word]
        return joined("…" if word == UNKNOWN else words[word] if words is not None else f"#{word}" for word in ids)

    return [spell(row) for row in examples.features]
