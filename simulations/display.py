"""The progress of a run for people: a line for each round, and a live bar on a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fedveil.core.catalog import PROTECTIONS
from fedveil.core.examples import Examples, Task
from fedveil.datasets.dataset import DataSet
from fedveil.privacy.dp.accounting.expectation import expectation
from fedveil.privacy.dp.accounting.guarantee import epsilons, mechanism, name_of, planned
from fedveil.privacy.dp.examples import own_multiplier
from fedveil.server.summary import READERS, guarantee_lines, guessing, megabytes, scores_line

if TYPE_CHECKING:
    from fedveil.core.record.record import Record
    from fedveil.server.checkpoint import State
    from fedveil.server.exchange import Row
    from fedveil.server.federation import Federation
    from fedveil.simulations.result import Result


class Display:
    """The display of a run on a console; without a console it shows nothing."""

    def __init__(self, console: Console | None) -> None:
        self._console = console
        self._progress: Progress | None = None
        self._cohort = 1
        self._rounds = 1

    @contextmanager
    def live(self, federation: Federation, record: Record, engine: str) -> Iterator[None]:
        """Show progress until the end of the block; `engine` says how clients are computed, and why."""
        experiment, state = federation.experiment, federation.state
        self._rounds, self._cohort = experiment.federation.rounds, experiment.federation.cohort
        if self._console is None:
            yield
            return
        self._console.print(describe(federation, engine), highlight=False, soft_wrap=True, markup=False)
        self._console.print(f"record   {record.folder}", highlight=False, soft_wrap=True, markup=False)
        if state.stopped or state.round == self._rounds:
            self._console.print("finished already: no round is left to run", highlight=False)
        if not self._console.is_terminal:
            yield
            return
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        with self._progress:
            # the bar counts clients, so that it moves within a round too
            self._task = self._progress.add_task(
                "round", total=self._rounds * self._cohort, completed=state.round * self._cohort
            )
            self._start(state.round)
            yield
        self._progress = None

    def _start(self, whole: int) -> None:
        """Show that the round after `whole` complete rounds begins."""
        self._before = whole * self._cohort
        if self._progress is not None:
            number = min(whole + 1, self._rounds)
            self._progress.update(self._task, description=f"round {number}/{self._rounds}", completed=self._before)

    def client_done(self, done: int, total: int) -> None:
        """Show that `done` messages are answered, first of training, then of evaluation where clients evaluate."""
        if self._progress is not None:
            now = self._before + min(done, self._cohort)
            # evaluation counts from 1 again: the bar stays where training left it
            self._progress.update(self._task, completed=max(now, self._progress.tasks[0].completed))
        del total

    def round_done(self, row: Row, state: State) -> None:
        """Show the scores of a complete round."""
        if self._console is not None:
            line = f"round {row['round']}/{self._rounds}  {scores_line(row, state)}"
            self._console.print(line, highlight=False, soft_wrap=True, markup=False)
        self._start(state.round)

    def warn(self, text: str) -> None:
        """Show a warning about what went wrong and was left out."""
        if self._console is not None:
            self._console.print(f"warning  {text}", highlight=False, soft_wrap=True, markup=False)


def describe(federation: Federation, engine: str) -> str:
    """Describe what is about to run: data, what its files lost, notes on it, model, engine and protection, a line each."""
    e = federation.experiment
    federated = federation.federated
    data = federated.dataset
    parameters = sum(value.numel() for value in federation.network.parameters())
    made_up = " (made-up data)" if data.made_up else ""
    least, most = federated.extremes()
    held = f"{len(data.train):,} training and " if isinstance(data.train, Examples) else ""
    scaled = f"scale    {data.scaling.rule}\n" if data.scaling else ""
    notes = scaled + "".join(f"note     {note}\n" for note in data.notes)
    return (
        f"data     {data.name}{made_up}: {held}{len(data.test):,} test examples, "
        f"{_labels(data.task)}; {e.data.partition} over {e.data.clients:,} clients "
        f"of {least:,} to {most:,} examples\n{files_line(data)}{notes}"
        f"model    {e.model.name}, {parameters:,} parameters; {e.federation.strategy}, "
        f"{e.federation.cohort:,} clients a round, {count(e.federation.rounds, 'round')}; seed {e.seed}\n"
        f"engine   {e.engine} on {federation.device.type}, {engine}"
        + protection_line(federation)
        + noise_lines(federation, parameters)
    )


def files_line(data: DataSet) -> str:
    """Say in a line what of a user's files was left out or changed; empty where nothing was."""
    return f"files    {'; '.join(data.files)}\n" if data.files else ""


def _labels(task: Task) -> str:
    """Describe what is predicted."""
    if task.predicts == "next_token":
        return f"next of {task.labels:,} word ids"
    of = f" (precision, recall and F1 are of '{task.classes[1]}')" if task.labels == 2 else ""
    return f"{task.labels} classes{of}"


def protection_line(federation: Federation) -> str:
    """Describe the protection in one line, with the key that clients and server can compare; empty without one."""
    protection = federation.protection
    if protection is None:
        return ""
    return f"\nprivacy  {protection.plan.protection} {protection.words}"


def noise_lines(federation: Federation, parameters: int) -> str:
    """Describe a run's noise, and what accuracy to expect where it costs much; empty without noise."""
    e, test = federation.experiment, federation.federated.dataset.test
    found = mechanism(e)
    if found is None:
        return ""
    privacy, smallest = e.privacy, federation.state.smallest
    spends = epsilons(e, planned(e, parameters, smallest))["epsilon"]
    if privacy.per_example and privacy.noise_at == "client" and privacy.epsilon is not None:
        z, spends = own_multiplier(e, smallest), privacy.epsilon
    else:
        z = privacy.multiplier
    if privacy.epsilon is not None:
        spends = min(spends, privacy.epsilon)  # a lengthened run stops there
    lines = [
        f"noise    {name_of(e)}: {z:.3g} times the bound ({privacy.clip}) of {found.unit}; {count(e.federation.rounds, 'round')} "
        f"spend{'s' if e.federation.rounds == 1 else ''} epsilon {spends:.3g} at delta {privacy.delta:g} at most"
    ]
    labels = test.labels if test.mask is None else test.labels[test.mask]
    if labels.size and (text := expectation(e, parameters, guessing(labels), smallest)):
        lines.append(f"warning  {text}")
    return "".join(f"\n{line}" for line in lines)


def count(number: int, noun: str) -> str:
    """Write a number with its noun, as in `1 round` and `2 rounds`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def summary_text(result: Result) -> str:
    """Describe the result of a run for people."""
    s = result.summary
    sealed = s["model_sha256"] is None
    lines = [
        f"done     {count(s['rounds'], 'round')} in {s['seconds']:.1f} s"
        + (f": {s['stopped']}" if s["stopped"] else "")
    ]
    for part in ("test", "validation"):
        told = [name.removeprefix(f"{part}_") for name in s if name.startswith(f"{part}_")]
        scores = [(name, s.get(f"{part}_{name}")) for name in dict.fromkeys(["accuracy", *told])]
        words = "  ".join(f"{name} {value:.4f}" for name, value in scores if value is not None)
        if words:
            lines.append(f"{part:<8} {words}")
    if s["doubt"]:
        lines.append(f"doubt    {s['doubt']}")
    if s["best_round"]:
        lines.append(f"best     round {s['best_round']} ({'best.sealed' if sealed else 'best.safetensors'})")
    model = "a ciphertext; who holds client.key opens it: fedveil keys open RECORD --keys CLIENT"
    drawn = any(s.get(f"{part}_accuracy") is not None for part in ("test", "validation"))
    files = ("plots/accuracy.png, " if drawn else "") + "metrics.csv, model." + ("sealed" if sealed else "safetensors")
    lines += [
        f"traffic  {megabytes(s['bytes_up'])} up, {megabytes(s['bytes_down'])} down; " + traffic_words(s),
        *protection_lines(s),
        *(f"noise    {line}" for line in guarantee_lines(s)),
        f"model    {model}" if sealed else f"model    sha256 {s['model_sha256']}",
        f"record   {s['run_dir']} ({files})",
    ]
    return "\n".join(lines)


def traffic_words(summary: dict[str, Any]) -> str:
    """Say who could read an unprotected run's updates, or how much larger a protected run's messages are."""
    privacy = summary.get("privacy")
    if privacy is None:
        return READERS["none"]
    return f"{privacy['bytes_up_ratio']:.2f} and {privacy['bytes_down_ratio']:.2f} times what the same messages are in the clear"


def protection_lines(summary: dict[str, Any]) -> list[str]:
    """Describe what a protection cost, how exact it was, and who could read what; empty without one."""
    privacy = summary.get("privacy")
    if privacy is None:
        return []
    error = privacy["largest_error"]
    exact = (
        f"largest error against the plain mean {error:.1e}"
        if error is not None
        else f"error against the plain mean at most {privacy['error_bound']:.1e} by rounding (not measured on this engine)"
    )
    if privacy["seal_seconds"] is None:
        return [
            f"privacy  {summary['protection']}: {exact}; seconds and clipped numbers are not told, as noise does not cover them",
            f"seen by  {privacy['readers']}",
        ]
    cost = f"protecting took {privacy['seal_seconds']:.2f} s of all clients"
    if PROTECTIONS.declared(summary["protection"], "privacy.protection").needs == "sum":
        # who cannot read the model has only its clients' word for it
        whose = "all clients" if summary["model_sha256"] is None else "this process"
        cost += f", decrypting {privacy['open_seconds']:.2f} s of {whose}"
    return [
        f"privacy  {summary['protection']}: {cost}; {exact}; {count(privacy['clipped'], 'value')} clipped",
        f"seen by  {privacy['readers']}",
    ]
