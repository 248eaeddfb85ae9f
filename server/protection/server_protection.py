"""The server's part of a protection: its state for a whole run, and its checks of every update and aggregate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from flwr.app import ArrayRecord, Message, MetricRecord

from fedveil.core.errors import ProtectionError, SettingsError
from fedveil.core.settings.experiment import Experiment
from fedveil.core.wire.messages import ARRAYS, METRICS, WEIGHT, from_sealed
from fedveil.privacy.dp.cohorts import cohort_sizes
from fedveil.privacy.fixed_point import Layout
from fedveil.privacy.homomorphic.keys import CLIENT, SERVER, ServerContext, check_lattice, fingerprint, load_server
from fedveil.privacy.plan import COARSEST, Plan, plan_for, share_for
from fedveil.privacy.secagg.graph import choose_degree
from fedveil.privacy.trust.identity import Registry
from fedveil.privacy.trust.key_folders import IDENTITY, load_registry
from fedveil.privacy.trust.manifest import UNSIGNED
from fedveil.server.exchange import Exchanged, count, metric

Take = Callable[[int, Message], None]
Converse = Callable[[Sequence[Message], str, Take], tuple[Exchanged, list[Message]]]


@dataclass(frozen=True)
class ServerProtection:
    """The state of a protected run on the server: no secret, and of the data the number of each client's examples.

    sizes: returns the examples of each of some clients; run: 16 bytes that name the run
    context: of CKKS and BFV; registry: of secure aggregation whose clients do not trust the server to follow the
    protocol
    manifest: SHA-256 of the run's signed manifest; zeros where it has none
    """

    experiment: Experiment
    plan: Plan
    layout: Layout
    run: bytes
    sizes: Callable[[Sequence[int]], Sequence[int]]
    context: ServerContext | None = None
    registry: Registry | None = None
    manifest: bytes = UNSIGNED

    @property
    def words(self) -> str:
        """The parameters, and the key's fingerprint, which clients and server can compare."""
        key = f"; key {fingerprint(self.context.key_id)}" if self.context else ""
        signed = "; keys are signed, survivors confirmed" if self.registry and not self.context else ""
        return self.plan.explain() + key + signed

    def announced(self, messages: Sequence[Message]) -> dict[int, int]:
        """Return the examples of each client that is asked, or 1 where clients weigh alike; their sum is n_ref."""
        clients = [m.metadata.dst_node_id - 1 for m in messages]
        if self.experiment.privacy.noisy:
            return dict.fromkeys(clients, 1)
        return dict(zip(clients, self.sizes(clients), strict=True))


def check_protection(experiment: Experiment, active: bool = False) -> None:
    """Raise SettingsError where a protection cannot work for the experiment's cohorts; active: the server may lie."""
    privacy, cohort = experiment.privacy, experiment.federation.cohort
    if privacy.protected:
        plan_for(experiment)
    degree = 0
    if privacy.shows == "mean":
        degree, _ = choose_degree(cohort, privacy.protection.drop_outs, privacy.protection.colluders, active)
    if privacy.protected and experiment.federation.sampling == "poisson":
        _check_coins(experiment, max(privacy.least, degree + 1), active)


def _check_coins(experiment: Experiment, least: int, active: bool) -> None:
    """Raise SettingsError where cohorts drawn by coins are too small for a protection, or it needs them all of one size."""
    start, name = "federation.sampling = 'poisson'", experiment.privacy.protection.name
    use = "use federation.sampling = 'order' or 'fixed'"
    if experiment.privacy.shows == "sum":
        raise SettingsError(
            f"{start}: a round may draw nobody, and with privacy.protection = '{name}' clients use a model of the round before "
            f"alone; {use}, or secagg"
        )
    if active:
        raise SettingsError(
            f"{start}: with registered keys secure aggregation has a threshold for cohorts of one size alone, and cohorts drawn by "
            f"coins vary; {use}"
        )
    fewest, _ = cohort_sizes(experiment.federation, experiment.data.clients)
    if fewest < least:
        raise SettingsError(
            f"{start}: with federation.cohort = {experiment.federation.cohort:,} of {experiment.data.clients:,} clients a round may draw "
            f"{fewest:,}, and secure aggregation needs {least:,}; take a larger federation.cohort, or {use}"
        )


def protect_server(
    experiment: Experiment,
    layout: Layout,
    run: bytes,
    sizes: Callable[[Sequence[int]], Sequence[int]],
    keys: Path | None,
    manifest: bytes = UNSIGNED,
) -> ServerProtection | None:
    """Return the server's part of an experiment's protection; None where updates travel in the clear.

    keys: the folder that holds server.ctx, for CKKS and BFV; manifest: SHA-256 of the run's
    Raise SettingsError or ProtectionError where it cannot work.
    """
    privacy = experiment.privacy
    if not privacy.protected:
        return None
    for secret in [] if keys is None else [keys / CLIENT, keys / IDENTITY]:
        if secret.exists():
            raise ProtectionError(f"{secret}: a client's secret in the server's folder; remove it from this machine")
    plan = plan_for(experiment)
    if plan.honest:
        share_for(experiment, plan, layout.size)  # raises where rounding would be too coarse for updates of this size
    context, registry = None, None if keys is None else load_registry(keys)
    if registry is not None:
        check_protection(experiment, active=True)
    if plan.lattice is not None:
        if keys is None:
            raise ProtectionError(
                f"privacy.protection = '{privacy.protection}': the server needs server.ctx, and no folder of keys is named; make "
                "one with `fedveil keys new DIR`, and name it in the run's configuration: keys = 'DIR'"
            )
        context = load_server(keys / SERVER)
        check_lattice(context.lattice, plan.lattice)
    return ServerProtection(experiment, plan, layout, run, sizes, context, registry, manifest)


def protected_update(reply: Message, protection: str) -> bytes:
    """Return the protected update in a client's reply.

    Raise ProtectionError where it has none, or its training failed.
    """
    record = reply.content.get(ARRAYS)
    blob = from_sealed(record, protection) if isinstance(record, ArrayRecord) else None
    if blob is None:
        raise ProtectionError(f"its update is not protected with {protection}")
    told = cast(MetricRecord, reply.content[METRICS])
    for key in ("train-loss", "seal-seconds", "open-seconds"):
        if key in told and not math.isfinite(metric(reply, key)):
            raise ProtectionError(f"its reply says {key} = {metric(reply, key):g}: its training failed")
    return blob


def examples_in(reply: Message, announced: int) -> int:
    """Return the examples that a client reports; raise ProtectionError for none, or more than were announced for it.

    With more, the client would outweigh its share, and leave no room for the others'.
    """
    examples = count(reply, WEIGHT, 1)
    if examples > announced:
        raise ProtectionError(f"it says {examples:,} examples, and {announced:,} were announced for it")
    return examples


class TooFew(ProtectionError):
    """Too few clients are left of a round for their sum to be made; nothing of it was revealed."""


def enough(plan: Plan, clients: int, examples: int, reference: int) -> float:
    """Return the largest rounding error of a mean over so many clients with `examples` of the `reference` announced.

    Raise TooFew where an aggregate of so few clients would tell too much about each, or where clients with
    most of the examples are missing, so that the rest lies on a grid too coarse to learn on.
    """
    if clients < plan.least:
        raise TooFew(
            f"{clients} clients sent an update that could be used, and an aggregate of fewer than {plan.enough} is not made"
        )
    step = plan.grid.step * reference / examples
    if step > 2.0**-COARSEST and not plan.honest:  # distributed noise is larger than its grid's step by itself
        raise TooFew(
            f"the clients that answered hold {examples:,} of the {reference:,} examples announced, which leaves their mean a grid "
            f"of {step:.1g}, coarser than 2^-{COARSEST}"
        )
    return clients * step / 2 + plan.grid.largest * 2.0**-24  # rounding to the grid, and to float32
