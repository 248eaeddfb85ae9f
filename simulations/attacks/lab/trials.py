"""Trials of attacks through the real pipeline: a round of victims, and what an observer saw of it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np

from fedveil.core.errors import Interrupted, SettingsError
from fedveil.core.examples import Examples, check_task, join
from fedveil.core.randomness import Stream
from fedveil.core.settings.experiment import Experiment
from fedveil.datasets.federated import Federated, load
from fedveil.models.networks.build import build
from fedveil.models.parameters import get, to_numpy
from fedveil.server.rounds.captures import read_captures
from fedveil.simulations.attacks.lab.attack import Attack
from fedveil.simulations.attacks.lab.observation import Known, Observation, Parameters
from fedveil.simulations.attacks.lab.observers import find_observer, observe, sums
from fedveil.simulations.attacks.lab.pairs import anew, captured_of, check_alike, difference, first_network, update_of
from fedveil.simulations.attacks.lab.scoring import Truth
from fedveil.simulations.result import Result
from fedveil.simulations.run import run

PEOPLE = 8  # clients in an aggregate, where the settings do not say


@dataclass(frozen=True)
class Trial:
    """One trial of an attack: the observation, the prior knowledge and, for scoring alone, the truth."""

    observation: Observation
    known: Known
    truth: Truth


def victims(
    experiment: Experiment, attack: Attack, observer: str, number: int, asked: frozenset[str] = frozenset()
) -> Experiment:
    """Return the experiment that trains victims for one round: each client holds one batch.

    A batch has one example, as in the literature, where the user did not choose its size. Attacks on membership and on
    the counts of evaluation leave clients all their examples.
    number: of clients in the cohort, where the observer sees each client's update
    asked: keys of settings that the user chose, which stay as they are
    """
    evaluates = "counts" in attack.needs
    whole = attack.recovers == "members" or evaluates
    batch = experiment.training.batch_size if whole or "training.batch_size" in asked else 1
    settings: dict[str, Any] = {
        "federation.rounds": 1,
        "federation.capture": True,
        "federation.target_accuracy": None,
        "federation.patience": None,
        "evaluation.every": 1,
        "evaluation.federated": evaluates,
        "data.validation_fraction": 0.2 if evaluates else 0.0,
        "training.batch_size": batch,
        "workers": 1,  # one small round is not worth the start of other processes
    }
    looks = find_observer(observer)
    cohort = number if looks.alone else experiment.federation.cohort
    if not looks.alone and "federation.cohort" not in asked:
        cohort = PEOPLE
    least = experiment.privacy.least + looks.pairs  # of the larger cohort of two
    settings["federation.cohort"] = max(cohort, least)
    settings["data.clients"] = max(experiment.data.clients, settings["federation.cohort"])
    if looks.pairs:  # a cohort of all, and one of all but one
        settings["data.clients"] = settings["federation.cohort"]
    if whole:
        pass
    elif experiment.data.dataset.name == "synthetic":
        settings |= {"data.dataset.examples": batch, "data.dataset.spread": 0.0}
    elif "data.client_examples" not in asked and batch != "full":
        settings["data.client_examples"] = batch
    return experiment.override(settings)


def check_batch(experiment: Experiment, federated: Federated) -> None:
    """Raise SettingsError where a batch is larger than the data of any client."""
    batch, (_, most) = experiment.training.batch_size, federated.extremes()
    if batch != "full" and batch > most:
        raise SettingsError(
            f"training.batch_size = {batch}: larger than the data of any client: each of {len(federated.clients)} has {most} examples at most; "
            "lower it, --trials or data.clients"
        )


@dataclass(frozen=True)
class Bench:
    """What the trials on an experiment share: its data and the prior knowledge of attacks."""

    experiment: Experiment
    federated: Federated
    known: Known

    @classmethod
    def of(cls, experiment: Experiment) -> Bench:
        """Load the data and build the network; raise SettingsError or DataError where that cannot be done."""
        federated = load(experiment.data, experiment.seed)
        dataset = federated.dataset
        check_task("an attack", ("classification",), dataset.task, f"data.dataset = '{experiment.data.dataset}'")
        network = build(dataset.task, experiment.model, Stream(experiment.seed))
        return cls(experiment, federated, Known(dataset.task, experiment.model, network, dataset.words, dataset.test))

    def trial(self, observation: Observation, clients: tuple[int, ...], attack: Attack) -> Trial:
        """Return a trial of an attack on an observation of these clients."""
        held = [self.federated.client(client)[0] for client in clients]
        examples = join(held)
        if attack.recovers == "update":
            update = update_of(self.experiment, self.federated, self.known.network, observation, clients)
            return Trial(observation, self.known, Truth(examples, update=update, together=observation.together))
        if attack.recovers != "members":
            return Trial(observation, self.known, Truth(examples, tuple(len(each) for each in held)))
        known, members = self._candidates(examples, clients[0])
        return Trial(observation, known, Truth(examples, members=members))

    def _candidates(self, examples: Examples, client: int) -> tuple[Known, np.ndarray]:
        """Return prior knowledge with members and as many others as candidates, and which are members, bool [n].

        The candidates are in random order; the others are taken out of the auxiliary examples.
        """
        alike = self.known.auxiliary
        assert alike is not None
        stream = Stream(self.experiment.seed, client=client)
        rows = stream.generator("others").permutation(len(alike))
        n = min(len(examples), len(alike) // 2)
        others, rest = alike.take(rows[:n]), alike.take(rows[n:])
        members = np.arange(2 * n) < n
        order = stream.generator("candidates").permutation(2 * n)
        both = join([examples.take(slice(n)), others]).take(order)
        return replace(self.known, candidates=both, auxiliary=rest), members[order]


def trained(experiment: Experiment, rounds: int) -> Parameters | None:
    """Train the experiment for `rounds` rounds without protection, and return the model; None for 0 rounds."""
    if rounds == 0:
        return None
    plain = {"federation.rounds": rounds, "evaluation.every": rounds}
    if experiment.privacy.protected:
        experiment = Experiment(**{**experiment.model_dump(exclude_none=True), "privacy": {}})
    with tempfile.TemporaryDirectory() as folder:
        return to_numpy(get(_run(experiment.override(plain), Path(folder) / "run").model))


@dataclass
class Room:
    """The folder for records of runs, and the observations of them, which several attacks share."""

    folder: Path
    _seen: dict[tuple[str, str, str, bytes], list[tuple[Bench, Observation, tuple[int, ...]]]] = field(
        default_factory=dict
    )

    def trials(
        self, experiment: Experiment, name: str, attack: Attack, observer: str, number: int, start: Parameters | None
    ) -> list[Trial]:
        """Return at least `number` trials, of several rounds with different seeds where one round gives too few.

        experiment: as `victims` returns it; start: the model that clients are sent, that of the seed where it is None
        """
        given = b"" if start is None else sha256(b"".join(value.tobytes() for value in start.values())).digest()
        key = (experiment.toml(), observer, name if attack.craft else "", given)
        seen = self._seen.setdefault(key, [])
        while len(seen) < number:
            seen += self._look(experiment.override({"seed": experiment.seed + len(seen)}), attack, observer, start)
        return [bench.trial(observation, clients, attack) for bench, observation, clients in seen]

    def forget(self) -> None:
        """Delete the runs."""
        self._seen.clear()
        for run_folder in self.folder.iterdir():
            rmtree(run_folder)

    def _look(
        self, experiment: Experiment, attack: Attack, observer: str, start: Parameters | None
    ) -> list[tuple[Bench, Observation, tuple[int, ...]]]:
        bench = Bench.of(experiment)
        check_batch(experiment, bench.federated)
        if attack.craft is not None:
            weights = to_numpy(get(bench.known.network)) if start is None else start
            start = attack.craft(weights, bench.known, Stream(experiment.seed))
        out = self.folder / f"run-{len(list(self.folder.iterdir()))}"
        folder = _run(experiment, out, start).run_dir
        if find_observer(observer).pairs:
            return [(bench, *self._compare(bench, folder, observer, start))]
        return [(bench, observation, clients) for observation, clients in observe(folder, experiment, observer)]

    def _compare(
        self, bench: Bench, folder: Path, observer: str, start: Parameters | None
    ) -> tuple[Observation, tuple[int, ...]]:
        """Compare a run with one of a cohort that is smaller by one client; return what that tells, and of whom."""
        experiment = bench.experiment
        smaller = experiment.override({"federation.cohort": experiment.federation.cohort - 1})
        rounds = read_captures(folder)[:1]
        if find_observer(observer).deployed:
            clients, seed = sorted(rounds[0].trained)[:-1], experiment.seed + 2**32
            others, other = [anew(smaller, bench.federated, bench.known.network, rounds[0], clients, seed)], folder
        else:
            other = _run(smaller, folder.with_name(f"{folder.name}-smaller"), start).run_dir
            others = read_captures(other)[:1]
        one, two = sums(folder, experiment, observer, rounds), sums(other, smaller, observer, others)
        return difference(observer, one[0], two[0], experiment.privacy.noisy)


def _run(experiment: Experiment, out: Path, start: Parameters | None = None) -> Result:
    """Run an experiment for the lab; raise Interrupted without the advice to resume, as its record is not kept."""
    try:
        return run(experiment, out=out, start=start, plots=False)
    except Interrupted:
        raise Interrupted("the attack was stopped; nothing of it is kept") from None


def recorded_trials(
    folders: Sequence[Path], experiments: Sequence[Experiment], attack: Attack, observer: str
) -> list[Trial]:
    """Return trials on the captures of a run, or on those of two; raise SettingsError where there are none."""
    folder, experiment = folders[0], experiments[0]
    bench = Bench.of(experiment)
    if len(folders) == 2:
        return [
            bench.trial(observation, clients, attack)
            for observation, clients in _pair(bench, folders, experiments, observer)
        ]
    return [bench.trial(observation, clients, attack) for observation, clients in observe(folder, experiment, observer)]


def _pair(
    bench: Bench, folders: Sequence[Path], experiments: Sequence[Experiment], observer: str
) -> list[tuple[Observation, tuple[int, ...]]]:
    """Compare the rounds that two runs have in common; raise SettingsError where none can be compared, and why."""
    check_alike(experiments[0], experiments[1], (str(folders[0]), str(folders[1])))
    first = first_network(experiments[0], bench.federated)
    seen = [
        {each.observation.round: each for each in sums(folder, one, observer, captured_of(folder, one, first))}
        for folder, one in zip(folders, experiments, strict=True)
    ]
    found, reasons = [], ["they have no round in common"]
    for number in sorted(seen[0].keys() & seen[1].keys()):
        try:
            found.append(difference(observer, seen[0][number], seen[1][number], experiments[0].privacy.noisy))
        except SettingsError as error:
            reasons.append(str(error))
    if not found:
        raise SettingsError(f"--against {folders[0]} --against {folders[1]}: {reasons[:2][-1]}")
    return found
