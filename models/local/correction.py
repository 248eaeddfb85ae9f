"""The correction that an algorithm adds to every gradient of local training: g + mu (w - anchor) + shift.

FedProx pulls towards the global model (Li et al. 2020, algorithm 2). SCAFFOLD shifts by c - c_k (Karimireddy et al.
2020, algorithm 1). FedDyn does both (Acar et al. 2021, algorithm 1). Ditto pulls personal models to the global one (Li
et al. 2021).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from fedveil.core.errors import DataError


@dataclass(frozen=True)
class Correction:
    """The terms that are added to the gradients of K clients.

    mu: strength of the pull towards the anchor; 0: no pull
    anchor: by name, each [...] for all clients or [K, ...]; None: each client's initial weights
    shift: by name, each [...] for all clients or [K, ...]; weights that it lacks are not shifted
    """

    mu: float = 0.0
    anchor: Mapping[str, Tensor] | None = None
    shift: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def moves_all(self) -> bool:
        """Whether rows of a word table may change that a client's texts do not use, and so have no gradient."""
        return bool(self.shift) or (self.mu > 0 and self.anchor is not None)

    def of(self, clients: Sequence[int], like: Mapping[str, Tensor]) -> Correction:
        """Return the correction of some of the K clients, by position; `like`: the weights of one client."""
        if not self.moves_all:
            return self
        anchor = None if self.anchor is None else pick(self.anchor, clients, like)
        return replace(self, anchor=anchor, shift=pick(self.shift, clients, like))


def pick(tensors: Mapping[str, Tensor], clients: Sequence[int], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the rows of some clients, by position, of tensors [K, ...]; a tensor [...], for all clients, stays whole.

    like: tensors [...] of one client
    """
    return {
        name: tensor if tensor.dim() == like[name].dim() else tensor[list(clients)] for name, tensor in tensors.items()
    }


def spread(tensor: Tensor, weights: Tensor) -> Tensor:
    """Expand a tensor [...] or [K, ...] to the shape of `weights`, [K, ...], without a copy.

    Raise DataError where its shape is neither.
    """
    found = tensor if tensor.dim() == weights.dim() else tensor.unsqueeze(0)
    if found.shape[1:] != weights.shape[1:] or len(found) not in (1, len(weights)):
        raise DataError(
            f"a correction of local training has the shape {list(tensor.shape)}, and the weights of {len(weights)} clients "
            f"have {list(weights.shape)}"
        )
    return found.expand_as(weights)
