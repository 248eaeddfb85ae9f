"""The four knobs of local training: where clients start, which weights move, the pull to an anchor, and a shift."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedveil.core.errors import DataError
from fedveil.core.examples import Examples, Task
from fedveil.core.randomness import Stream
from fedveil.core.settings.choice import Model
from fedveil.core.settings.sections import Training
from fedveil.models.local.batches import batch_size_of, orders
from fedveil.models.local.correction import Correction
from fedveil.models.local.losses import loss
from fedveil.models.local.training import train_clients
from fedveil.models.networks.build import build, example
from fedveil.models.vectorized.batched import batched

FEATURES = Task("features", (6,), ("a", "b", "c"))
TEXT = Task("text", (8,), ("a", "b", "c"), 12)


def examples(task: Task, n: int, seed: int) -> Examples:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, n)
    if task is TEXT:
        ids = rng.integers(1, 12, (n, 8)).astype(np.int32)
        ids[np.arange(8) >= rng.integers(1, 9, n)[:, None]] = 0  # padding behind the words
        return Examples(ids, labels)
    return Examples(rng.random((n, 6)), labels)


def textbook(
    network: nn.Module,
    start: Mapping[str, Tensor],
    client: Examples,
    training: Training,
    stream: Stream,
    moves: Sequence[str],
    mu: float,
    anchor: Mapping[str, Tensor],
    shift: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Local training whose objective has the terms mu/2 |w - anchor|^2 + <shift, w>, by autograd and torch's optimisers."""
    network = copy.deepcopy(network).train()
    network.load_state_dict(dict(start))
    named = dict(network.named_parameters())
    moving = [named[name] for name in moves]
    optimizer = (
        torch.optim.SGD(moving, training.learning_rate, training.momentum, weight_decay=training.weight_decay)
        if training.optimizer == "sgd"
        else torch.optim.Adam(moving, training.learning_rate, weight_decay=training.weight_decay)
    )
    width = batch_size_of(len(client), training)
    order = orders(len(client), training, [stream])[0]  # [passes, n]
    for chosen in (batch for a_pass in order for batch in np.split(a_pass, range(width, len(a_pass), width))):
        inputs = torch.from_numpy(client.features[chosen])
        inputs = inputs if inputs.is_floating_point() else inputs.long()
        optimizer.zero_grad()
        value = loss(network(inputs), torch.from_numpy(client.labels[chosen]), training.loss)
        for name in moves:
            value = value + mu / 2 * (named[name] - anchor[name]).square().sum()
            if name in shift:
                value = value + (shift[name] * named[name]).sum()
        value.backward()
        if training.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(moving, training.max_grad_norm)
        optimizer.step()
    return {name: parameter.detach().clone() for name, parameter in network.named_parameters()}


def made(network: nn.Module, seed: int, clients: int | None) -> dict[str, Tensor]:
    """Random tensors of the network's shapes, [...] or [K, ...]."""
    draw = torch.Generator().manual_seed(seed)
    lead = () if clients is None else (clients,)
    return {
        name: 0.5 * torch.randn(*lead, *p.shape, generator=draw, dtype=torch.float64)
        for name, p in network.named_parameters()
    }


def of(tensors: Mapping[str, Tensor], k: int, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t if t.dim() == like[name].dim() else t[k] for name, t in tensors.items()}


KNOB = st.sampled_from(["none", "shared", "own"])


@pytest.mark.slow
@settings(max_examples=120, deadline=None)
@given(
    task_model=st.sampled_from(
        [(FEATURES, Model(hidden=(5,))), (FEATURES, Model(hidden=(4,), normalization="layer")),
         (TEXT, Model(name="bag", embedding=3)), (TEXT, Model(name="lstm", embedding=3, units=4))]
    ),
    training=st.builds(
        Training, epochs=st.integers(1, 2), batch_size=st.sampled_from([2, 3, "full"]),
        optimizer=st.sampled_from(["sgd", "sgd", "adam"]), weight_decay=st.sampled_from([0.0, 0.1]),
        max_grad_norm=st.sampled_from([None, 0.5]), learning_rate=st.just(0.1),
    ),
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    own_start=st.booleans(), some=st.booleans(), mu=st.sampled_from([0.0, 0.4]), anchor=KNOB, shift=KNOB,
    seed=st.integers(0, 99),
)  # fmt: skip
def test_local_training_with_every_knob_is_the_textbook_loop(
    task_model, training, sizes, own_start, some, mu, anchor, shift, seed
):
    """One by one and all at once, for shared and for each client's own start, anchor and shift."""
    task, model = task_model
    network = build(task, model, Stream(seed)).double()
    K = len(sizes)
    like = {name: p.detach() for name, p in network.named_parameters()}
    clients = [examples(task, n, k) for k, n in enumerate(sizes)]
    streams = [Stream(7, 3, k) for k in range(K)]
    start = made(network, 1, K if own_start else None)
    moves = list(like)[1:] if some else None
    anchors = None if anchor == "none" else made(network, 2, K if anchor == "own" else None)
    shifts = {} if shift == "none" else made(network, 3, K if shift == "own" else None)
    probe = example(task)
    how = batched(network, probe if task is TEXT else probe.double())
    assert not isinstance(how, str), how
    for together in (None, how):
        found = train_clients(
            network, start, clients, training, training.learning_rate, streams, classes=3,
            correction=Correction(mu, anchors, shifts), moves=moves, together=together,
        )  # fmt: skip
        for k, client in enumerate(clients):
            mine = of(start, k, like)
            wanted = textbook(
                network, mine, client, training, streams[k], moves or list(like), mu,
                mine if anchors is None else of(anchors, k, like), of(shifts, k, like),
            )  # fmt: skip
            for name, value in wanted.items():
                torch.testing.assert_close(found.parameters[name][k], value, rtol=1e-8, atol=1e-8, msg=name)
                if moves and name not in moves:
                    assert torch.equal(value, mine[name])


def test_a_correction_of_another_network_is_refused_with_both_shapes():
    network = build(FEATURES, Model(hidden=(5,)), Stream(1))
    start = {name: p.detach().clone() for name, p in network.named_parameters()}
    wrong = Correction(shift={name: torch.zeros(2, 2) for name in start})
    client = Examples(np.zeros((3, 6), np.float32), np.zeros(3, np.int64))
    with pytest.raises(DataError, match=r"shape \[2, 2\]"):
        train_clients(network, start, [client], Training(), 0.1, [Stream(1)], classes=3, correction=wrong)
