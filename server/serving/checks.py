"""Runs on other machines that could never begin, or of which nobody would know how good they are: said when they are ordered."""

from __future__ import annotations

from fedveil.core.errors import SettingsError
from fedveil.core.settings.experiment import Experiment
from fedveil.core.wire.encodings import BYTES
from fedveil.privacy.homomorphic.lattice import Form
from fedveil.privacy.plan import make_lattice

MASKED = 4  # bytes of a weight under secure aggregation, whose numbers are modulo 2^32


def check_order(experiment: Experiment, registered: int | None, words: str) -> None:
    """Raise SettingsError where a run can never begin, whoever joins.

    registered: clients whose keys the server has; None where any client may join
    words: the vocabulary that comes with the run, a line each
    """
    data, cohort = experiment.data, experiment.federation.cohort
    if registered is not None and cohort > registered:
        raise SettingsError(
            f"federation.cohort = {cohort}: this federation has {registered} registered clients, and no others may join; take "
            f"--set federation.cohort={registered} --set data.clients={registered}, or make keys for more (fedveil keys new)"
        )
    if data.dataset.name != "own":
        return
    if data.labels is None:
        raise SettingsError(
            "data.labels: must name the classes, in order, where every client has data of its own: a client may lack one, so "
            'no client\'s data can tell them; as in --set \'data.labels=["ham", "spam"]\''
        )
    tasks = experiment.model.declaration.tasks if experiment.model.resolved else ()
    texts_alone = bool(tasks) and all(task.endswith("of text") for task in tasks)
    if texts_alone and data.vocabulary == "train" and not words:
        raise SettingsError(
            f"data.vocabulary = 'train': model.name = '{experiment.model.name}' reads texts, and no client may know the words of the "
            "others; take --set data.vocabulary=hashed, or name a public list of words (data.vocabulary = FILE)"
        )


def check_size(experiment: Experiment, weights: int, limit: int) -> None:
    """Raise SettingsError where an update is larger than the server lets a client send.

    weights: how many the network has; limit: bytes, `fedveil server --max-update`
    """
    privacy = experiment.privacy
    if privacy.shows == "sum":
        least = Form(make_lattice(privacy), weights, True).bytes(seeded=True)
    else:
        least = weights * (MASKED if privacy.protected else BYTES[experiment.communication.encoding])
    if least > limit:
        raise SettingsError(
            f"model.name = '{experiment.model.name}': an update of its {weights:,} weights has {least / 2**20:,.1f} MiB or more, and "
            f"fedveil server --max-update = {limit / 2**20:.3g} refuses it; start the server with a larger one, or take a smaller network"
        )


def scoreless(experiment: Experiment, evaluates: bool) -> str | None:
    """Say that a run will have no score, and how it would; None where somebody evaluates.

    evaluates: whether the server can read the model and has test data
    """
    if evaluates or experiment.evaluation.federated:
        return None
    why = "the server cannot read the model" if experiment.privacy.shows == "sum" else "the server has no test data"
    if experiment.privacy.noisy:
        return f"nobody evaluates this run, and it will have no score but the loss: {why}, and clients tell no scores with noise"
    return (
        f"nobody evaluates this run, and it will have no score but the training loss: {why}; let clients hold out a part, with --set "
        "data.validation_fraction=0.1 --set evaluation.federated=true"
    )
