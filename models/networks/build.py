"""Building a network: its initial weights come from a stream, and its outputs and state are checked.

Buffers that stay as they were built are constants of the network: they are remade from the seed wherever it is built,
and stored in the file of the model. Buffers that training changes are refused, as nobody would aggregate them.

A network maps a batch of examples to logits: float32 [n, classes], or [n, 1] for two classes, the logit of the second;
for next_token [n, tokens, vocabulary]. A user's network is `package.module:factory`, called as
`factory(task, settings)` with its own settings. A factory declares the tasks it fits:
`@part(tasks=("classification of text",))`.
"""

from __future__ import annotations

import math
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from fedveil.core.catalog import MODELS
from fedveil.core.errors import SettingsError
from fedveil.core.examples import Task, check_task
from fedveil.core.randomness import Stream, global_random, torch_random
from fedveil.core.settings.choice import Model
from fedveil.models.networks.words import PADDING
from fedveil.models.parameters import constants, kept

SIZES = (2, 1, 3)  # of the batches on which a network is tried; the last batch of a client may hold one example
STORED = {
    torch.float64, torch.float32, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
}  # fmt: skip


def build(task: Task, model: Model, stream: Stream) -> nn.Module:
    """Build the network `model.name` for `task`, on the CPU, with initial weights from `stream`.

    Raise SettingsError where it does not fit the task, cannot be built, or has a state that cannot be averaged.
    """
    check_task(f"model.name = '{model.name}'", model.declaration.tasks, task, table=MODELS)
    network = _make(task, model, stream)
    with torch_random(stream, "tried batches"):
        _check_batches(network, task, model.name)
        if dict(network.named_buffers()):
            _check_constants(network, _make(task, model, stream), model.name)
    return network.train()


def check_weights(task: Task, model: Model, most: int) -> None:
    """Raise SettingsError where the network `model.name` has more than `most` weights, before any of them is allocated.

    A user's own network that cannot be made without memory for its weights is not counted.
    """
    named = f"model.name = '{model.name}'"
    check_task(named, model.declaration.tasks, task, table=MODELS)
    factory, settings = model.load(), model.settings
    try:
        with torch.device("meta"):
            weights = sum(parameter.numel() for parameter in factory(task, settings).parameters())
    except Exception:  # a user's code may raise anything, and again where it is built, which says why
        if not model.is_own:
            raise
        return
    if weights > most:
        raise SettingsError(f"{named}: the network has {weights:,} weights, and {most:,} are allowed")


def _make(task: Task, model: Model, stream: Stream) -> nn.Module:
    """Call the factory of the network, with all global generators seeded from `stream`."""
    factory, settings = model.load(), model.settings
    with torch_random(stream, "initial weights"), global_random(stream, "initial weights"):
        try:
            network = factory(task, settings)
            if not isinstance(network, nn.Module):
                raise TypeError(f"it returned {type(network).__name__}, not a torch.nn.Module")
            _check_weights(network, model.name)
            _outputs(network.eval(), task, SIZES[0])  # which gives a lazy layer its weights
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
    return _spread(numbers)


def _spread(like: Tensor) -> Tensor:
    """Return numbers in [0, 1) in a tensor's shape, no two alike."""
    return torch.frac(torch.arange(like.numel()).reshape(like.shape) * 0.618034)


def _outputs(network: nn.Module, task: Task, size: int) -> object:
    """Return the network's outputs for the first `size` of the made-up examples; for next_token half padding."""
    inputs = example(task)[:size]
    if task.predicts == "next_token":
        inputs[:, (task.shape[0] + 1) // 2 :] = PADDING  # padding has outputs too, which do not count
    with torch.no_grad():
        outputs: object = network(inputs)
    return outputs


def _check_weights(network: nn.Module, name: str) -> None:
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise SettingsError(f"model.name = '{name}': the network has no weights to train")
    for key, parameter in network.named_parameters():
        if parameter.dtype != torch.float32:
            raise SettingsError(
                f"model.name = '{name}': weight '{key}' is {parameter.dtype}; all must be torch.float32, make it .float()"
            )


def _check_batches(network: nn.Module, task: Task, name: str) -> None:
    """Refuse a network that is not for batches of every size, or whose buffers change as it computes or its weights do."""
    before = {key: buffer.clone() for key, buffer in network.named_buffers()}
    for training, size in product((False, True), SIZES):
        with kept(network):
            network.train(training)
            for parameter in network.parameters():  # as training would: spectral norm's vectors follow the weights
                parameter.data = parameter.data * (1 + _spread(parameter))
            try:
                outputs = _outputs(network, task, size)
            except Exception as error:  # a user's code may raise anything
                if size == 1 and _needs_two(network):
                    continue  # only a client whose last batch is one example cannot train: it says so then
                does = (
                    f"in {'training' if training else 'evaluation'} the network raises {type(error).__name__}: {error}"
                )
                raise SettingsError(
                    f"model.name = '{name}': for {_batch(size)} {does}; a batch may have any size, and the last one a single example"
                ) from error
            _check_outputs(outputs, task, name, size)
            _check_state(network, before, name)


def _needs_two(network: nn.Module) -> bool:
    """Say whether a layer normalises each batch by its own statistics alone, which one example may not have."""
    return any(isinstance(module, _BatchNorm) and module.running_mean is None for module in network.modules())


def _batch(size: int) -> str:
    return {1: "a batch of one example", 2: "two examples", 3: "three examples"}[size]


def _check_outputs(outputs: object, task: Task, name: str, size: int) -> None:
    each = (size, *task.shape) if task.predicts == "next_token" else (size,)
    wanted = [(*each, task.labels)] + ([(size, 1)] if task.binary else [])
    if not isinstance(outputs, Tensor):
        found = type(outputs).__name__
    elif not outputs.is_floating_point() or tuple(outputs.shape) not in wanted:
        found = f"{str(outputs.dtype).removeprefix('torch.')} {list(outputs.shape)}"
    else:
        return
    shapes = " or ".join(str(list(shape)) for shape in wanted)
    hint = ""
    if size != SIZES[0]:  # with that size it was right
        hint = "; squeeze() takes the batch's own dimension where it is 1: name the one to take, or use flatten(1)"
    raise SettingsError(
        f"model.name = '{name}': for {_batch(size)} the network gives {found}; it must give logits, float {shapes}, "
        f"for the {_labels(task)}{hint}"
    )


def _labels(task: Task) -> str:
    """Describe the labels, one of which each logit stands for."""
    return f"{task.labels:,} word ids" if task.predicts == "next_token" else f"{len(task.classes)} classes"


def _check_state(network: nn.Module, before: dict[str, Tensor], name: str) -> None:
    """Refuse a network with state that training changes besides the weights: such state would not be aggregated."""
    for key, buffer in network.named_buffers():
        if key in before and _same(before[key], buffer):
            continue
        module = network.get_submodule(key.rpartition(".")[0])
        keeps = key.rpartition(".")[0] if isinstance(module, _NormBase) else key
        raise SettingsError(
            f"model.name = '{name}': '{keeps}' keeps statistics or other state that training changes (batch norm does); "
            "they are not weights, and averaging them over clients gives a model that fits nobody; use "
            "torch.nn.LayerNorm or GroupNorm (model.normalization = 'layer'), which keep none, or batch norm with "
            "track_running_stats=False"
        )


def _check_constants(network: nn.Module, again: nn.Module, name: str) -> None:
    """Refuse buffers that another process would not make again, and those that no file of a model can hold."""
    for key, buffer in constants(network).items():
        if buffer.dtype not in STORED:
            raise SettingsError(
                f"model.name = '{name}': buffer '{key}' is {buffer.dtype}, which the file of the model cannot hold; make it "
                "torch.float32, or register it with persistent=False"
            )
    made = dict(again.named_buffers())
    for key, buffer in network.named_buffers():
        if key not in made or not _same(buffer, made[key]):
            raise SettingsError(
                f"model.name = '{name}': buffer '{key}' has other values each time the network is built, and every client "
                "builds it: draw it with torch, NumPy or random without a generator of its own, which FedVeil seeds"
            )


def _same(one: Tensor, other: Tensor) -> bool:
    return (
        one.shape == other.shape
        and one.dtype == other.dtype
        and bool(torch.equal(one.nan_to_num(), other.nan_to_num()))
    )
