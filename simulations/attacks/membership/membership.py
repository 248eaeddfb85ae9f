"""Membership: whether an example was trained on, from how well a model fits it, or from the direction of the update.

The scores are the loss (Yeom et al. 2018, "Privacy Risk in Machine Learning", section 3.2), how much training lowered
it, and the cosine of the example's gradient with the update (after Nasr et al. 2019, "Comprehensive Privacy Analysis of
Deep Learning", section III, who feed such gradients to a network). For one client's update the model is the local one,
for an aggregate the global one.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from fedveil.core.errors import SettingsError
from fedveil.core.examples import Examples
from fedveil.core.randomness import Stream
from fedveil.models import parameters as weights
from fedveil.models.local.inputs import device_of, to_tensor
from fedveil.models.local.losses import loss, losses_and_slopes
from fedveil.simulations.attacks.lab.attack import Attack
from fedveil.simulations.attacks.lab.observation import Known, Observation, Parameters

BATCH = 1000
TINY = 1e-30  # a gradient of zero points nowhere


def by_loss(observation: Observation, known: Known, _stream: Stream) -> np.ndarray:
    """Return minus the loss of each candidate after training, as members fit better: float64 [n]."""
    assert known.candidates is not None
    return -losses(known.network, after(observation), known.candidates, loss_kind(observation))


def by_loss_difference(observation: Observation, known: Known, stream: Stream) -> np.ndarray:
    """Return how much training lowered the loss of each candidate, float64 [n]."""
    assert known.candidates is not None
    assert observation.before is not None
    before = losses(known.network, observation.before, known.candidates, loss_kind(observation))
    lowered: np.ndarray = before + by_loss(observation, known, stream)
    return lowered


def by_cosine(observation: Observation, known: Known, _stream: Stream) -> np.ndarray:
    """Return the cosine of each candidate's descent, at the model before the round, with the update: float64 [n]."""
    assert known.candidates is not None
    assert observation.before is not None
    assert observation.update is not None
    network, kind = known.network, loss_kind(observation)
    device = device_of(network)
    sign = 1.0 if observation.kind == "gradient" else -1.0
    seen = {name: torch.from_numpy(sign * array).to(device) for name, array in observation.update.items()}
    inputs, labels = to_tensor(known.candidates.features, device), to_tensor(known.candidates.labels, device)
    size = torch.sqrt(sum((tensor.square().sum() for tensor in seen.values()), torch.zeros((), device=device)))
    scores = []
    with weights.kept(network), torch.backends.cudnn.flags(enabled=False):  # its LSTM has no gradients in eval mode
        weights.place(network, _placed(observation.before, device))
        network.eval()
        named = dict(network.named_parameters())
        for i in range(len(labels)):
            value = loss(network(inputs[i : i + 1]), labels[i : i + 1], kind)
            slopes = torch.autograd.grad(value, list(named.values()), materialize_grads=True)
            along = torch.stack([(slope * seen[name]).sum() for name, slope in zip(named, slopes, strict=True)]).sum()
            own = torch.stack([slope.double().square().sum() for slope in slopes]).sum().sqrt()
            scores.append(along / (own * size).clamp(min=TINY))
    found: np.ndarray = torch.stack(scores).cpu().numpy()
    return found


def after(observation: Observation) -> Parameters:
    """Return the weights after training, float32: one client's, or the mean of several.

    Raises SettingsError for a gradient where the observer does not know the learning rate.
    """
    assert observation.before is not None
    assert observation.update is not None
    step = 1.0
    if observation.kind == "gradient":
        if observation.training is None:
            raise SettingsError(
                f"the observer '{observation.observer}' saw a gradient and does not know the learning rate, so there is no "
                "model after training to look at; take attack 'cosine'"
            )
        step = -observation.training.learning_rate
    return {
        name: (array + step * observation.update[name]).astype(np.float32) for name, array in observation.before.items()
    }


def losses(network: nn.Module, parameters: Parameters, examples: Examples, kind: str) -> np.ndarray:
    """Return the loss of each example, float64 [n]."""
    logits = outputs(network, parameters, examples)
    values: np.ndarray = losses_and_slopes(logits, to_tensor(examples.labels, logits.device), kind)[0].cpu().numpy()
    return values


def outputs(network: nn.Module, parameters: Parameters, examples: Examples) -> Tensor:
    """Return the logits of each example by a network with these weights: float64 [n, classes] or [n, 1]."""
    device = device_of(network)
    with weights.kept(network), torch.no_grad():
        weights.place(network, _placed(parameters, device))
        network.eval()
        starts = range(0, len(examples), BATCH)
        logits = [network(to_tensor(examples.features[start : start + BATCH], device)) for start in starts]
    return torch.cat(logits).double()


def loss_kind(observation: Observation) -> str:
    """Return the loss that clients train with; cross entropy where it is not known."""
    return observation.training.loss if observation.training else "cross_entropy"


def warn(observation: Observation, _known: Known) -> str | None:
    """Return what will spoil the scores, or None: an aggregate hides each client's fit among the others'."""
    if observation.clients > 1:
        return (
            f"the mean of {observation.clients} clients fits nobody's examples much better than others: expect little"
        )
    return None


def _placed(parameters: Parameters, device: torch.device) -> dict[str, Tensor]:
    return weights.from_numpy(
        {name: array.astype(np.float32, copy=False) for name, array in parameters.items()}, device
    )


LOSS = Attack(
    run=by_loss,
    recovers="members",
    needs=("update", "candidates"),
    warn=warn,
    cost="milliseconds",
    cites="Yeom et al. 2018, Privacy Risk in Machine Learning, section 3.2",
)

LOSS_DIFFERENCE = Attack(
    run=by_loss_difference,
    recovers="members",
    needs=("update", "candidates"),
    warn=warn,
    cost="milliseconds",
    cites="after Yeom et al. 2018, Privacy Risk in Machine Learning, section 3.2",
)

COSINE = Attack(
    run=by_cosine,
    recovers="members",
    needs=("update", "candidates"),
    warn=warn,
    cost="a second",
    cites="after Nasr et al. 2019, Comprehensive Privacy Analysis of Deep Learning, section III",
)
