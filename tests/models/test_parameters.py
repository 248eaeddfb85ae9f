"""Weights taken out of a network, put back, and lent."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import nn

from fedveil.core.errors import DataError
from fedveil.models import parameters as weights


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2), nn.PReLU())


def test_weights_taken_out_are_copies_in_the_networks_order_and_load_into_another() -> None:
    one, other = network(), network()
    taken = weights.get(one)
    assert list(taken) == ["0.weight", "0.bias", "1.weight"]
    weights.load(other, taken)
    with torch.no_grad():
        one[0].weight.fill_(7)
    for name, parameter in other.named_parameters():
        assert torch.equal(parameter, taken[name])
        assert parameter.requires_grad
    assert not (taken["0.weight"] == 7).any()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"0.bias": None}, r"'0.bias' is missing in the weights and \(2,\) in the network"),
        ({"2.bias": torch.zeros(4)}, r"'2.bias' is \(4,\) in the weights and missing in the network"),
        ({"0.weight": torch.zeros(2, 5)}, r"'0.weight' is \(2, 5\) in the weights and \(2, 3\) in the network"),
    ],
)
def test_weights_of_another_network_are_refused_by_name(change: dict[str, torch.Tensor | None], said: str) -> None:
    one = network()
    before = weights.get(one)
    other = {name: tensor for name, tensor in (before | change).items() if tensor is not None}
    with pytest.raises(DataError, match=said):
        weights.load(one, other)
    assert all(torch.equal(p, before[name]) for name, p in one.named_parameters())


def test_arrays_share_memory_with_tensors_both_ways() -> None:
    tensors = weights.get(network())
    arrays = weights.to_numpy(tensors)
    back = weights.from_numpy(arrays)
    assert all(back[name].data_ptr() == tensors[name].data_ptr() for name in tensors)


def test_read_only_and_strided_arrays_become_tensors_of_the_same_values_without_a_warning() -> None:
    frozen = np.frombuffer(np.arange(4, dtype=np.float32).tobytes(), np.float32)
    strided = np.arange(12, dtype=np.float32).reshape(3, 4).T[::2]
    scalar = np.array(2.5, dtype=np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensors = weights.from_numpy({"frozen": frozen, "strided": strided, "scalar": scalar})
    for name, array in {"frozen": frozen, "strided": strided, "scalar": scalar}.items():
        np.testing.assert_array_equal(tensors[name].numpy(), array)
        assert tensors[name].shape == array.shape


def test_a_network_lent_is_given_back_as_it_was_even_after_an_error() -> None:
    one = network()
    one[1].eval()
    before, places = weights.get(one), [p.data_ptr() for p in one.parameters()]
    lent = {name: torch.randn_like(tensor) for name, tensor in before.items()}

    def fail() -> None:
        with weights.kept(one):
            weights.place(one, lent)
            one.train()
            one(torch.ones(1, 3)).sum().backward()
            assert one[0].weight.data_ptr() == lent["0.weight"].data_ptr()
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert [p.data_ptr() for p in one.parameters()] == places
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in one.named_parameters())
    assert [module.training for module in one.modules()] == [True, True, False]
