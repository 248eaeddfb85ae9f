"""An attack on an experiment or a recorded run: trials, scores beside guessing, and what was recovered."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedveil.core.catalog import ATTACKS
from fedveil.core.declaration import declares
from fedveil.core.errors import SettingsError
from fedveil.core.randomness import Stream
from fedveil.core.settings.choice import AttackChoice
from fedveil.core.settings.experiment import Experiment, resumable
from fedveil.models.computing import one_thread
from fedveil.simulations.attacks.lab.attack import Attack, refusal
from fedveil.simulations.attacks.lab.observers import OBSERVERS, find_observer
from fedveil.simulations.attacks.lab.scoring import SCORES, Score, guess
from fedveil.simulations.attacks.lab.trials import Bench, Room, Trial, recorded_trials, trained, victims

SHOWN = 8  # trials whose answers are kept to be shown


@dataclass(frozen=True)
class Shown:
    """A trial whose answer is shown to people."""

    trial: Trial
    found: Any
    score: Score


@dataclass
class Outcome:
    """The result of an attack over its trials.

    scores, baselines: of each trial, by the metric's name; the first metric is the one that is quoted
    settings: the attack's own, by name
    refused: why it could not be run at all, and scores are those of guessing; None where it was
    warning: what was known beforehand to spoil it
    """

    attack: str
    recovers: str
    observer: str
    experiment: Experiment
    settings: Mapping[str, Any] = field(default_factory=dict)
    scores: list[Score] = field(default_factory=list)
    baselines: list[Score] = field(default_factory=list)
    shown: list[Shown] = field(default_factory=list)
    refused: str | None = None
    warning: str | None = None
    seconds: float = 0.0

    @property
    def metric(self) -> str:
        """The name of the quoted metric."""
        return next(iter(self.scores[0]))

    def mean(self, baseline: bool = False) -> Score:
        """Return the mean of each metric over the trials."""
        rows = self.baselines if baseline else self.scores
        return {name: statistics.fmean(row[name] for row in rows) for name in rows[0]}

    def summary(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        return {
            "attack": self.attack,
            "settings": dict(self.settings),
            "observer": self.observer,
            **self.mean(),
            "baseline": self.mean(baseline=True)[self.metric],
            "metric": self.metric,
            "trials": len(self.scores),
            "refused": self.refused,
            "warning": self.warning,
            "seconds": self.seconds,
        }


def find_attack(name: str, settings: Mapping[str, Any] | None = None) -> Attack:
    """The attack called `name`, or a user's own, package.module:object; `settings`: its own, by name.

    It is an `Attack`; or, where it has settings, a part `(settings) -> Attack`.
    Raise SettingsError where there is none, or its settings cannot be used.
    """
    choice = AttackChoice(name, **(settings or {}))
    found = choice.load()
    if declares(found):
        found = found(choice.settings)
    if not isinstance(found, Attack):
        raise SettingsError(f"attack: '{name}' is a {type(found).__name__}, where an Attack belongs")
    return found


def attack(
    name: str,
    experiment: Experiment,
    *,
    settings: Mapping[str, Any] | None = None,
    observer: str | None = None,
    trials: int = 50,
    after: int = 0,
    warm: Experiment | None = None,
    asked: frozenset[str] = frozenset(),
    against: str | Path | Sequence[str | Path] | None = None,
    room: Room | None = None,
    progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> Outcome:
    """Run an attack on victims of an experiment, or on what was captured of the run in `against`, or of two runs there.

    settings: the attack's own, by name
    observer: whose eyes it has, a name of OBSERVERS; without it the server's, or those that the attack needs
    trials: at least so many, on an experiment; after: rounds of `warm`, the experiment itself without it, that are trained before
    asked: keys of settings that the user chose; room: where runs lie that other attacks look at too
    Raises SettingsError where the attack, the observer or the settings cannot be used, or do not fit each other.
    """
    chosen, choice = find_attack(name, settings), AttackChoice(name, **(settings or {}))
    folders = [Path(each) for each in ([against] if isinstance(against, str | Path) else against or [])]
    observer = observer or _usual(chosen, experiment, len(folders))
    if folders and len(folders) != (2 if find_observer(observer).pairs else 1):
        raise SettingsError(
            f"--observer {observer}: {'compares two runs' if OBSERVERS[observer].pairs else 'looks at one run'}, and --against "
            f"names {len(folders)}"
        )
    if find_observer(observer).crafts and chosen.craft is None:
        raise SettingsError(f"attack '{name}': makes up no model; take another observer than '{observer}'")
    if chosen.craft is not None and not OBSERVERS[observer].crafts:
        raise SettingsError(
            f"attack '{name}': needs a server that makes up its model; take --observer malicious-server, or "
            "malicious-aggregate, which reads the sum"
        )
    own = {key: value for key, value in choice.dump().items() if key != "name"}
    outcome = Outcome(name, chosen.recovers, observer, experiment, own)
    started = time.perf_counter()
    if folders:
        experiments = [experiment, *(resumable(folder, "--against") for folder in folders[1:])]
        found = recorded_trials(folders, experiments, chosen, observer)
    else:
        outcome.experiment = victims(experiment, chosen, observer, trials, asked)
        start = trained(warm or experiment, after)
        with tempfile.TemporaryDirectory() as folder:
            found = (room or Room(Path(folder))).trials(
                outcome.experiment, repr(choice), chosen, observer, trials, start
            )
    _try(outcome, chosen, found, progress)
    outcome.seconds = time.perf_counter() - started
    return outcome


def _usual(chosen: Attack, experiment: Experiment, runs: int) -> str:
    """Return the observer of an attack for which none is named: of the server's, the one that sees most."""
    if chosen.craft is not None:  # under secure aggregation a server reads the sum, and nobody's own update
        return "malicious-aggregate" if experiment.privacy.shows == "mean" else "malicious-server"
    return "two-runs" if runs == 2 else chosen.observer


def _try(outcome: Outcome, chosen: Attack, trials: Sequence[Trial], progress: Callable[[int, int], None]) -> None:
    """Run all trials; score their answers and guessing."""
    score = SCORES[chosen.recovers]
    for trial in trials[:1]:
        unsuited = chosen.suits(trial.known)
        if unsuited:
            raise SettingsError(f"attack '{outcome.attack}': {unsuited}")
    streams = [
        Stream(outcome.experiment.seed, round=trial.observation.round, client=number)
        for number, trial in enumerate(trials)
    ]
    reasons = [refusal(chosen, trial.observation, trial.known) for trial in trials]
    outcome.refused = next(filter(None, reasons), None)
    answers = _together(chosen, trials, streams) if chosen.many and outcome.refused is None else {}
    for number, (trial, stream, reason) in enumerate(zip(trials, streams, reasons, strict=True)):
        guessed = guess(chosen.recovers, trial.truth, trial.known, stream.generator("guess"))
        if reason is not None:
            found = guessed
        elif number in answers:
            found = answers[number]
        else:
            with one_thread():
                found = chosen.run(trial.observation, trial.known, stream)
        if reason is None:
            outcome.warning = outcome.warning or chosen.warn(trial.observation, trial.known)
        made = score(found, trial.truth, trial.known.task)
        outcome.scores.append(made)
        outcome.baselines.append(score(guessed, trial.truth, trial.known.task))
        if len(outcome.shown) < SHOWN:
            outcome.shown.append(Shown(trial, None if reason else found, made))
        progress(number + 1, len(trials))


def _together(chosen: Attack, trials: Sequence[Trial], streams: Sequence[Stream]) -> dict[int, Any]:
    """Compute the answers of trials with the same prior knowledge at once; return all by the trial's number."""
    assert chosen.many is not None
    groups: dict[int, list[int]] = {}
    for number, trial in enumerate(trials):
        groups.setdefault(id(trial.known), []).append(number)
    answers: dict[int, Any] = {}
    with one_thread():
        for members in groups.values():
            seen = [trials[number].observation for number in members]
            found = chosen.many(seen, trials[members[0]].known, [streams[number] for number in members])
            answers |= dict(zip(members, found, strict=True))
    return answers


def fitting(experiment: Experiment, observer: str | None = None) -> list[str]:
    """Return the names of the attacks that suit the experiment's data and network, and that this observer could run."""
    known = Bench.of(experiment).known
    looks = OBSERVERS[observer or "server"]
    found = {name: find_attack(name) for name in ATTACKS}
    return [
        name
        for name, each in found.items()
        if each.suits(known) is None
        and (each.craft is not None) == looks.crafts
        and (looks.pairs or "two runs" not in each.needs)
    ]
