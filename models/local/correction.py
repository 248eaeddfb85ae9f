"""What an algorithm adds to every gradient of local training: g + mu (w - anchor) + shift.

FedProx pulls towards the global weights (Li et al. 2020, algorithm 2); SCAFFOLD shifts by c - c_k (Karimireddy et al. 2020,
algorithm 1); FedDyn does both (Acar et al. 2021, algorithm 1); Ditto pulls personal weights to the global ones (Li et al. 2021).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from fedveil.core.errors import DataError


@dataclass(frozen=True)
class Correction:
    """The terms beside a gradient, for K clients.

    mu: strength of the pull to the anchor; 0 pulls nowhere
    anchor: by name, each [...] for all clients or [K, ...]; None is where each client starts
    shift: by name, each [...] or [K, ...]; a weight that it leaves out is not shifted
    """

    mu: float = 0.0
    anchor: Mapping[str, Tensor] | None = None
    shift: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def moves_all(self) -> bool:
        """Whether a weight may move that has no gradient of its own: a row of a word table that no text of the client uses."""
        return bool(self.shift) or (self.mu > 0 and self.anchor is not None)

    def of(self, clients: Sequence[int], like: Mapping[str, Tensor]) -> Correction:
        """The correction for some of the K clients, by position; `like`: weights of one client."""
        if not self.moves_all:
            return self
        anchor = None if self.anchor is None else pick(self.anchor, clients, like)
        return replace(self, anchor=anchor, shift=pick(self.shift, clients, like))


def pick(tensors: Mapping[str, Tensor], clients: Sequence[int], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The rows of some clients of tensors [K, ...], by position; a tensor [...] is everybody's."""
    return {
        name: tensor if tensor.dim() == like[name].dim() else tensor[list(clients)] for name, tensor in tensors.items()
    }


def spread(tensor: Tensor, weights: Tensor) -> Tensor:
    """A tensor [...] or [K, ...] as one of the shape of `weights`, [K, ...], without a copy.

    Raise DataError where it has another shape.
    """
    found = tensor if tensor.dim() == weights.dim() else tensor.unsqueeze(0)
    if found.shape[1:] != weights.shape[1:] or len(found) not in (1, len(weights)):
        raise DataError(
            f"a correction of local training has the shape {list(tensor.shape)}, and the weights of {len(weights)} clients "
            f"have {list(weights.shape)}"
        )
    return found.expand_as(weights)
