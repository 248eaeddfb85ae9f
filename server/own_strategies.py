"""A user's own Flower strategy, `package.module:object`: a class, a factory, or a strategy that is made already.

| object | called with |
|---|---|
| a strategy | it is copied, so that no run begins with what another left in it |
| a class or factory whose arguments are those of Flower's `FedAvg`, or some of them, or none | those arguments, by name |
| one with one argument | the experiment |
| one with two | the experiment, and the arguments of `FedAvg` as a dictionary |
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from copy import deepcopy
from functools import partial
from typing import Any, cast

from flwr.app import MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg, Strategy

from fedveil.core.errors import SettingsError
from fedveil.core.metrics import MetricSet
from fedveil.core.places import where
from fedveil.core.settings.experiment import Experiment
from fedveil.core.wire.messages import ARRAYS, CONFIG, METRICS, WEIGHT
from fedveil.server.rounds.rows import merged_scores

# what FedAvg takes for the fraction and the least number of clients, where nothing else is said
_ASKED = {
    ("fraction_train", "min_train_nodes"): (1.0, 2),
    ("fraction_evaluate", "min_evaluate_nodes"): (1.0, 2),
}
_LEAST = ("min_available_nodes", "min_train_nodes", "min_evaluate_nodes")


def make_flower_strategy(
    found: Any, name: str, experiment: Experiment, evaluators: int, metrics: MetricSet
) -> Strategy:
    """Make a strategy with what a user's name stands for.

    found: what `name` names; evaluators: clients that a round asks to evaluate; metrics: of their evaluations
    Raise SettingsError where it is no strategy of Flower's, cannot be made, or would wait for ever.
    """
    clients, cohort = experiment.data.clients, experiment.federation.cohort
    shared: dict[str, Any] = {
        # Flower takes max(int(fraction * clients), minimum): the minimum is exact, the fraction need not be
        "fraction_train": cohort / clients,
        "min_train_nodes": cohort,
        "fraction_evaluate": evaluators / clients,
        "min_evaluate_nodes": evaluators,
        "min_available_nodes": clients,
        "weighted_by_key": WEIGHT,
        "arrayrecord_key": ARRAYS,
        "configrecord_key": CONFIG,
        "train_metrics_aggr_fn": _mean_loss,
        "evaluate_metrics_aggr_fn": partial(_scores, metrics),
    }
    said = f"federation.strategy = '{name}'"
    try:
        made = deepcopy(found) if isinstance(found, Strategy) else _call(found, experiment, shared)
    except SettingsError as error:
        raise SettingsError(f"{said}: {error}") from error
    except Exception as error:  # a user's code may raise anything
        raise SettingsError(
            f"{said}: cannot be made: {type(error).__name__}: {error}{where(error)}\n"
            "  a factory of one argument is given the experiment, one of two also the arguments of Flower's FedAvg as a dictionary"
        ) from error
    if not isinstance(made, Strategy):
        kind = type(made)
        older = kind.__module__.startswith("flwr.server.") or any(
            base.__module__.startswith("flwr.server.strategy") for base in kind.__mro__
        )
        hint = (
            "it is of Flower's older interface, flwr.server.strategy; take the class of that name in flwr.serverapp.strategy"
            if older
            else "return one of flwr.serverapp.strategy; what returns an Algorithm is declared with @part"
        )
        raise SettingsError(f"{said}: is a {kind.__name__}, and must be a strategy of Flower's; {hint}")
    for strategy in within(made):
        _fill_in(strategy, shared)
        for key in _LEAST:
            if (wanted := getattr(strategy, key, 0)) > clients and (evaluators or key != "min_evaluate_nodes"):
                raise SettingsError(
                    f"{said}: waits for {wanted} clients ({key} = {wanted}), and data.clients = {clients}; lower it, or "
                    "set more data.clients"
                )
    return made


def within(strategy: Strategy) -> Iterator[Strategy]:
    """Yield a strategy, and those that it is put around."""
    yield strategy
    for value in vars(strategy).values():
        if isinstance(value, Strategy):
            yield from within(value)


def _call(found: Any, experiment: Experiment, shared: Mapping[str, Any]) -> Any:
    """Call a class or factory with the arguments that it takes; raise SettingsError where it needs others."""
    if not callable(found):
        return found
    signature = inspect.signature(found)
    taken = signature.parameters.values()
    if any(one.kind is one.VAR_KEYWORD for one in taken) and _binds(signature, **shared):
        return found(**shared)
    named = {one.name for one in taken if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)}
    if _binds(signature, **(some := {key: value for key, value in shared.items() if key in named})):
        return found(**some)
    needed = [one for one in taken if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD]
    own = isinstance(found, type) and issubclass(found, Strategy) and needed and not _is_experiment(needed[0])
    for given in () if own else ((experiment,), (experiment, dict(shared))):
        if _binds(signature, *given):
            return found(*given)
    strange = next(
        (one.name for one in (needed if own else needed[2:]) if one.name not in shared), "nothing that is known"
    )
    raise SettingsError(
        f"takes '{strange}', which FedVeil does not have; give it a default, or write a factory: a function of the experiment, "
        "or of the experiment and the arguments of Flower's FedAvg as a dictionary, that returns a strategy"
    )


def _is_experiment(argument: inspect.Parameter) -> bool:
    return argument.name == "experiment" or "Experiment" in str(argument.annotation)


def _binds(signature: inspect.Signature, *given: Any, **named: Any) -> bool:
    try:
        signature.bind(*given, **named)
    except TypeError:
        return False
    return True


def _fill_in(strategy: Strategy, shared: Mapping[str, Any]) -> None:
    """Set what nobody chose of a strategy that was made without FedVeil's arguments: Flower's defaults."""
    attributes, plain = vars(strategy), FedAvg()
    for keys, usual in _ASKED.items():
        if tuple(attributes.get(key) for key in keys) == usual:
            attributes.update({key: shared[key] for key in keys})
    for key in ("train_metrics_aggr_fn", "evaluate_metrics_aggr_fn"):
        # Flower's own takes a mean of every number that a client tells, where FedVeil's clients tell sums
        if attributes.get(key) is getattr(plain, key):
            attributes[key] = shared[key]


def _mean_loss(contents: list[RecordDict], weighted_by_key: str) -> MetricRecord:
    """Return the mean of the clients' training losses, weighted by their examples."""
    metrics = [cast(MetricRecord, content[METRICS]) for content in contents]
    weights = [float(cast(int, m[weighted_by_key])) for m in metrics]
    total = sum(w * float(cast(float, m["train-loss"])) for w, m in zip(weights, metrics, strict=True))
    return MetricRecord({"train-loss": total / sum(weights)})


def _scores(metrics: MetricSet, contents: list[RecordDict], _weighted_by_key: str) -> MetricRecord:
    told = merged_scores(metrics, contents) or {}
    return MetricRecord({name: value for name, value in told.items() if value is not None})
