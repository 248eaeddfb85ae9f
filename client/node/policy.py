"""The policy of a client's owner, which limits any server's runs: `fedveil client --policy policy.toml`.

    protections = ["ckks", "secagg"]
    min_clients = 5
    max_epochs = 2

The settings of a run come from the server; a run that asks for more than the policy allows is refused.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from fedveil.core.catalog import MODELS, PROTECTIONS
from fedveil.core.errors import Disallowed, SettingsError, nearest
from fedveil.core.foreign import reading
from fedveil.core.settings.experiment import Experiment
from fedveil.core.settings.section import Count, NonNegative, Positive, Section
from fedveil.privacy.dp.sensitivity import own_noise
from fedveil.privacy.trust.totals import Limits

Names = Annotated[tuple[str, ...], Field(strict=False)]


class Policy(Section):
    """The limits of one client. A key that is left out has its default, and an empty list limits nothing.

    Code that a run's settings name is refused, except for a network that the owner names too. The policy judges the
    settings of one run at a time; what counts over all runs and servers, the client's ledger enforces.
    """

    protections: Names = Field((), description="protections of updates that the client takes part in")
    models: Names = Field((), description="networks it trains; your package.module:factory is named in full")
    min_clients: Count = Field(
        1, description="the fewest clients whose updates may be added up; above 1 asks for a protection"
    )
    max_epochs: Count | None = Field(None, description="the most passes over the client's examples in a round")
    max_weights: Count = Field(50_000_000, description="the most weights of a network that the client builds")
    max_tokens: Count = Field(
        4096, description="the most tokens (data.max_tokens) that the client's texts are padded to"
    )
    max_rounds: Count | None = Field(None, description="the most rounds of a run, each of which is answered once")
    max_answers: Count | None = Field(
        None,
        description="the most answers made of its examples (training, losses, evaluations), over all runs and servers",
    )
    max_epsilon: Positive | None = Field(
        None, description="the most epsilon that its own noise lets all answers spend, over all runs and servers"
    )
    delta: Annotated[float, Field(gt=0, lt=1)] = Field(1e-5, description="the delta of max_epsilon")
    least_cohort: Count = Field(
        1, description="the fewest clients among whom it is revealed; above 1 asks for a protection"
    )
    least_difference: Count = Field(
        1,
        description="secure aggregation: the fewest clients by which sums that it is in may differ, or combinations of them",
    )
    evaluates: bool = Field(True, description="whether the client takes part in runs whose clients evaluate")
    reproducible: Literal["allow", "refuse"] = Field(
        "refuse", description="what it does about a run that asks for training that repeats from the seed"
    )
    min_noise: NonNegative = Field(
        0.0, description="the least privacy.noise_multiplier, of noise that clients add to their own updates"
    )
    leak_guard: Literal["off", "warn", "refuse"] = Field(
        "off",
        description="what the client does about a telling update in the clear, where privacy.leak_guard asks for less",
    )

    def __init__(self, /, **limits: Any) -> None:
        """Check the limits; raise SettingsError that names every key that cannot be used."""
        try:
            super().__init__(**limits)
        except ValidationError as error:
            raise SettingsError(_explain(error)) from None
        for key, table in (("protections", PROTECTIONS), ("models", MODELS)):
            for name in getattr(self, key):
                table.check(name, key)
        if contradictions := self._contradictions():
            raise SettingsError("\n".join(contradictions))

    @classmethod
    def read(cls, path: Path) -> Policy:
        """Read the policy in a TOML file.

        Raise SettingsError that names the file and the key where it cannot be used.
        """
        with reading(lambda why: SettingsError(f"cannot read the policy {path}: {why}")):
            content = path.read_bytes()
        with reading(lambda why: SettingsError(f"the policy {path} is not valid TOML: {why}")):
            limits = tomllib.loads(content.decode())
        try:
            return cls(**limits)
        except SettingsError as error:
            raise SettingsError(f"the policy {path}: {error}") from None

    @property
    def limits(self) -> Limits:
        """What the client's ledger enforces."""
        return Limits(self.max_epsilon, self.delta, self.max_answers, self.least_cohort, self.least_difference)

    def _contradictions(self) -> list[str]:
        """Name keys that together allow nothing."""
        problems = []
        if 1 < self.least_cohort < self.least_difference:
            problems.append(
                f"least_cohort = {self.least_cohort}: is below least_difference = {self.least_difference}, and a first sum "
                "differs from nothing by its whole cohort; raise least_cohort, or leave it out"
            )
        asking = [key for key in ("min_clients", "least_cohort", "least_difference") if getattr(self, key) > 1]
        if asking and self.protections and set(self.protections) <= {"none"}:
            problems.append(
                f"{asking[0]} = {getattr(self, asking[0])}: needs a protection, and protections allows none alone"
            )
        if self.max_epsilon is not None and self.evaluates and "evaluates" in self.model_fields_set:
            problems.append(
                f"evaluates = true: an evaluation has no noise, and max_epsilon = {self.max_epsilon:g} allows no answer without"
            )
        return problems

    def check(self, experiment: Experiment) -> None:
        """Raise Disallowed with everything that a run asks for and this policy does not allow.

        Every problem begins with the setting of the run that it is about.
        """
        problems = self._protection(experiment) + self._work(experiment)
        if problems:
            keys = dict.fromkeys(problem.partition(" ")[0] for problem in problems)
            raise Disallowed("this client's policy refuses the run: " + "; ".join(problems), keys)

    def check_training(self, *, repeats: bool) -> None:
        """Raise Disallowed where a run asks for training that repeats from the seed, and this policy refuses it."""
        if repeats and self.reproducible == "refuse":
            raise Disallowed(
                "this client's policy refuses the run: it asks for training that repeats from the seed (fedveil submit "
                "--reproducible), and its owner has not written reproducible = 'allow'",
                ("reproducible",),
            )

    def _protection(self, experiment: Experiment) -> list[str]:
        privacy, problems = experiment.privacy, []
        asked = f"privacy.protection = '{privacy.protection}'"
        if self.protections and privacy.protection.name not in self.protections:
            problems.append(f"{asked}, and it allows {', '.join(self.protections)}")
        if self.min_clients > 1 and not privacy.protected:
            problems.append(
                f"{asked}, and it allows aggregates of {self.min_clients} clients or more (min_clients): the server of an "
                "unprotected run sees each update by itself"
            )
        elif privacy.least < self.min_clients:  # no cohort is smaller than privacy.protection.min_clients
            problems.append(
                f"privacy.protection.min_clients = {privacy.least}, and it allows {self.min_clients} or more (min_clients)"
            )
        problems += [
            f"{asked}, and it is revealed among {getattr(self, key)} clients or more ({key})"
            for key in ("least_cohort", "least_difference")
            if getattr(self, key) > 1 and not privacy.protected
        ]
        if (
            privacy.shows == "sum" and privacy.least < self.least_cohort
        ):  # who is in an encrypted sum is not in its hands
            problems.append(
                f"privacy.protection.min_clients = {privacy.least}, and it is revealed among {self.least_cohort} clients or more "
                "(least_cohort)"
            )
        if privacy.noisy and self.leak_guard == "refuse":
            problems.append(
                f"privacy.noise_at = '{privacy.noise_at}', and it keeps back what reveals examples (leak_guard = 'refuse'): whether it drops out "
                "would depend on its data, which noise does not cover; leak_guard = 'warn' tells its operator alone"
            )
        multiplier = (
            f"privacy.{'noise_multiplier' if privacy.epsilon is None else 'calibrated'} = {privacy.multiplier:g}"
        )
        if self.max_epsilon is not None and not own_noise(privacy):
            hides = ", which hides single examples" if privacy.per_example else ""
            problems.append(
                f"{multiplier} at the {privacy.noise_at}{hides}, and it asks for a finite epsilon of its own noise (max_epsilon)"
            )
        unknown = privacy.epsilon is not None and privacy.calibrated is None  # until the client has found its noise
        if privacy.multiplier < self.min_noise and not unknown:
            problems.append(f"{multiplier}, and it allows {self.min_noise:g} or more (min_noise)")
        elif self.min_noise > 0 and (privacy.noise_at != "client" or privacy.per_example):
            problems.append(
                f"privacy.noise_at = '{privacy.noise_at}', and it asks for noise of its own (min_noise) that hides its whole data: "
                "what others add, or do not, is out of a client's hands"
            )
        return problems

    def _work(self, experiment: Experiment) -> list[str]:
        training, rounds, problems = experiment.training, experiment.federation.rounds, []
        # a name with a colon stands for any object that can be imported here, which is then called
        if experiment.model.is_own and experiment.model.name not in self.models:
            problems.append(
                f"model.name = '{experiment.model.name}' names code, and it does not allow that code (models)"
            )
        elif self.models and experiment.model.name not in self.models:
            problems.append(f"model.name = '{experiment.model.name}', and it allows {', '.join(self.models)}")
        if self.max_rounds is not None and rounds > self.max_rounds:
            problems.append(f"federation.rounds = {rounds}, and it allows {self.max_rounds} at most (max_rounds)")
        if experiment.data.max_tokens > self.max_tokens:
            problems.append(
                f"data.max_tokens = {experiment.data.max_tokens}, and it allows {self.max_tokens} at most (max_tokens)"
            )
        if experiment.evaluation.federated and not self.evaluates:
            problems.append("evaluation.federated = true, and it evaluates no model (evaluates)")
        if experiment.data.partition.is_own:
            problems.append(
                f"data.partition = '{experiment.data.partition}' names code, which a server must not choose"
            )
        if experiment.privacy.defence.is_own:
            problems.append(
                f"privacy.defence = '{experiment.privacy.defence}' names code, which a server must not choose"
            )
        problems += [
            f"evaluation.metrics names '{name}', which is code that a server must not choose"
            for name in experiment.evaluation.metrics or ()
            if ":" in name and experiment.evaluation.federated
        ]
        most = self.max_epochs
        if most is None:
            return problems
        if training.steps is None:
            if training.epochs > most:
                problems.append(f"training.epochs = {training.epochs}, and it allows {most} at most (max_epochs)")
        elif training.batch_size != "full":
            problems.append(
                f"training.steps = {training.steps}, and it allows {most} epoch(s) at most (max_epochs): how many epochs that is "
                "depends on how many examples a client has; training.epochs can be compared"
            )
        elif training.steps > most:  # a step of all examples is an epoch
            problems.append(
                f"training.steps = {training.steps} of all examples, and it allows {most} epoch(s) at most (max_epochs)"
            )
        return problems


def _explain(error: ValidationError) -> str:
    """Write one line for each key that cannot be used."""
    lines = {}
    for problem in error.errors():
        key = str(problem["loc"][0])
        if problem["type"] == "extra_forbidden":
            known = ", ".join(Policy.model_fields)
            lines[key] = f"{key}: unknown key{nearest(key, Policy.model_fields)}\n  known: {known}"
        else:
            message = problem["msg"].removeprefix("Input should be ")
            lines[key] = f"{key} = {problem['input']!r}: must be {_WORDS.get(problem['type'], message)}"
    return "\n".join(lines.values())


# by pydantic's kind of error, words for a policy's author
_WORDS = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "a name, as in 'ckks'",
    "tuple_type": "a list of names, as in ['ckks', 'secagg']",
}
