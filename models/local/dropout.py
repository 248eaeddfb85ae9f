"""Dropout of clients that train one by one on a GPU: drawn on the CPU, from the client's stream, as everywhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

F = nn.functional
_DROPPING = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout, torch.feature_dropout}


class HostDropout(TorchFunctionMode):
    """Within it, dropout multiplies by factors that the CPU's generator draws, whatever device the values are on.

    A GPU's generator draws other numbers, with which a client would train differently than in a batch of clients. The
    dropout between the layers of an LSTM is drawn inside cuDNN and stays as it is.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Compute one function of PyTorch."""
        kwargs = dict(kwargs or {})
        if func not in _DROPPING:
            return func(*args, **kwargs)
        values = kwargs.pop("input", None) if "input" in kwargs else args[0]
        return values * func(torch.ones(values.shape, dtype=values.dtype), *args[1:], **kwargs).to(values.device)
