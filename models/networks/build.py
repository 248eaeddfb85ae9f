"""Building a network: its initial weights come from a stream, and its outputs and state are checked.

A network maps a batch of examples to logits: float32 [n, classes], or [n, 1] for two classes, the logit of the second;
for next_token [n, tokens, vocabulary]. A user's network is `package.module:factory`, called as
`factory(task, settings)` with its own settings. A factory declares the tasks it fits:
`@part(tasks=("classification of text",))`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedveil.core.catalog import MODELS
from fedveil.core.errors import SettingsError
from fedveil.core.examples import Task, check_task
from fedveil.core.randomness import Stream, torch_random
from fedveil.core.settings.choice import Model
from fedveil.models.networks.words import PADDING


def build(task: Task, model: Model, stream: Stream) -> nn.Module:
    """Build the network `model.name` for `task`, on the CPU, with initial weights from `stream`.

    Raise SettingsError where it does not fit the task, cannot be built, or has a state that cannot be averaged.
    """
    factory, settings = model.load(), model.settings
    check_task(f"model.name = '{model.name}'", model.declaration.tasks, task, table=MODELS)
    with torch_random(stream, "initial weights"):
        try:
            network = factory(task, settings)
            if not isinstance(network, nn.Module):
                raise TypeError(f"it returned {type(network).__name__}, not a torch.nn.Module")
            _check_weights(network, model.name)
            _check_outputs(_outputs(network.eval(), task), task, model.name)
            _check_state(network.train(), task, model.name)
        except SettingsError:
            raise
        except Exception as error:  # a user's code may raise anything
            raise SettingsError(
                f"model.name = '{model.name}': the network cannot be built for {task} of shape {task.shape} and "
                f"{_labels(task)}: {type(error).__name__}: {error}"
            ) from error
    return network


def example(task: Task) -> Tensor:
    """Return three different made-up examples, [3, *task.shape], on which networks are compared."""
    numbers = torch.arange(3 * math.prod(task.shape)).reshape(3, *task.shape)
    if task.kind == "text":
        numbers = numbers % (task.vocabulary_size - 1) + 1
        numbers[2, (task.shape[0] + 1) // 2 :] = PADDING  # after the words of the last example
        return numbers
    return torch.frac(numbers * 0.618034)  # spread over [0, 1)


def _outputs(network: nn.Module, task: Task) -> Tensor:
    """Return the network's outputs for two examples of zeros; texts are of word 1, for next_token half padding."""
    shape = (2, *task.shape)
    inputs = torch.ones(shape, dtype=torch.long) if task.kind == "text" else torch.zeros(shape)
    if task.predicts == "next_token":
        inputs[:, (task.shape[0] + 1) // 2 :] = PADDING  # padding has outputs too, which do not count
    with torch.no_grad():
        outputs: Tensor = network(inputs)
    return outputs


def _check_weights(network: nn.Module, name: str) -> None:
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise SettingsError(f"model.name = '{name}': the network has no weights to train")
    for key, parameter in network.named_parameters():
        if parameter.dtype != torch.float32:
            raise SettingsError(
                f"model.name = '{name}': weight '{key}' is {parameter.dtype}; all must be torch.float32, make it .float()"
            )


def _check_outputs(outputs: object, task: Task, name: str) -> None:
    each = (2, *task.shape) if task.predicts == "next_token" else (2,)
    wanted = [(*each, task.labels)] + ([(2, 1)] if task.binary else [])
    if not isinstance(outputs, Tensor):
        found = type(outputs).__name__
    elif not outputs.is_floating_point() or tuple(outputs.shape) not in wanted:
        found = f"{str(outputs.dtype).removeprefix('torch.')} {list(outputs.shape)}"
    else:
        return
    shapes = " or ".join(str(list(shape)) for shape in wanted)
    raise SettingsError(
        f"model.name = '{name}': for two examples the network gives {found}; it must give logits, float {shapes}, "
        f"for the {_labels(task)}"
    )


def _labels(task: Task) -> str:
    """Describe the labels, one of which each logit stands for."""
    return f"{task.labels:,} word ids" if task.predicts == "next_token" else f"{len(task.classes)} classes"


def _check_state(network: nn.Module, task: Task, name: str) -> None:
    """Refuse a network with state that training changes besides the weights: such state would not be aggregated."""
    keeps = [key for key, module in network.named_modules() if isinstance(module, _BatchNorm)]
    if not keeps:
        before = {key: buffer.clone() for key, buffer in network.named_buffers()}
        _outputs(network, task)
        keeps = [key for key, buffer in network.named_buffers() if not torch.equal(before[key], buffer)]
    if keeps:
        raise SettingsError(
            f"model.name = '{name}': '{keeps[0]}' keeps statistics or other state that training changes (batch norm does); "
            "they are not weights, and averaging them over clients gives a model that fits nobody; use "
            "torch.nn.LayerNorm or GroupNorm (model.normalization = 'layer'), which keep none"
        )
