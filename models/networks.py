"""The networks, and the one way to build one: initial weights from a stream, shape and state checked.

A network maps a batch of examples to logits: float32 [n, classes], or [n, 1] where there are two classes, the
logit of the second; of next_token [n, tokens, vocabulary]. A user's own is `package.module:factory`, called as
`factory(task, settings)`. A factory declares the tasks it fits, `@part(tasks=("classification of text",))`.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedveil.core import parts
from fedveil.core.declaration import declaration, part
from fedveil.core.errors import SettingsError
from fedveil.core.examples import Task, check_task
from fedveil.core.experiment import Model
from fedveil.core.randomness import Stream, torch_random
from fedveil.models.words import PADDING, PooledWords, Words, pool, trim

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "prelu": nn.PReLU,
    "elu": nn.ELU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
}
NORMALIZATIONS: dict[str, Callable[[int], nn.Module]] = {"layer": nn.LayerNorm, "batch": nn.BatchNorm1d}


def build(task: Task, settings: Model, stream: Stream) -> nn.Module:
    """The network `settings.name` for `task`, on the CPU, with initial weights from `stream`.

    Raises SettingsError where it does not fit the task, cannot be made, or keeps a state that cannot be averaged.
    """
    factory = parts.MODELS.load(settings.name, "model.name")
    check_task(f"model.name = '{settings.name}'", declaration(factory).tasks, task, table=parts.MODELS)
    with torch_random(stream, "initial weights"):
        try:
            network = factory(task, settings)
            if not isinstance(network, nn.Module):
                raise TypeError(f"it returned {type(network).__name__}, not a torch.nn.Module")
            _check_weights(network, settings.name)
            _check_outputs(_outputs(network.eval(), task), task, settings.name)
            _check_state(network.train(), task, settings.name)
        except SettingsError:
            raise
        except Exception as error:  # of a user's own code: any
            raise SettingsError(
                f"model.name = '{settings.name}': the network cannot be built for {task} of shape {task.shape} and "
                f"{_labels(task)}: {type(error).__name__}: {error}"
            ) from error
    return network


@part(tasks=("classification",))
def mlp(task: Task, settings: Model) -> nn.Module:
    """Dense layers `settings.hidden`, each with normalization, activation and dropout, and one to the classes.

    images, features: flattened; text: the mean or sum of word vectors first. Dense weights start as
    `he`: N(0, 2/fan_in) (He et al. 2015, section 2.2); `xavier`: uniform within sqrt(6 / (fan_in + fan_out)) (Glorot and
    Bengio 2010, equation 16); `lecun`: N(0, 1/fan_in) (LeCun et al. 1998, section 4.6); biases as zero. `zeros` sets
    every weight to zero: such a network does not learn, but for its last bias, as all its units stay alike.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if task.kind == "text":
        layers["embedding"] = PooledWords(task.vocabulary_size, settings.embedding, _bag_pooling(settings))
        width = settings.embedding
    else:
        layers["flatten"] = nn.Flatten()
        width = math.prod(task.shape)
    for i, units in enumerate(settings.hidden, start=1):
        layers[f"dense{i}"] = nn.Linear(width, units)
        if settings.normalization != "none":
            layers[f"norm{i}"] = NORMALIZATIONS[settings.normalization](units)
        layers[f"activation{i}"] = ACTIVATIONS[settings.activation]()
        if settings.dropout > 0:
            layers[f"dropout{i}"] = nn.Dropout(settings.dropout)
        width = units
    layers["output"] = nn.Linear(width, len(task.classes))
    return _initialized(nn.Sequential(layers), settings.initialization)


@part(tasks=("classification of text",))
def bag(task: Task, settings: Model) -> nn.Module:
    """The mean or sum of a text's word vectors, and a linear layer to the classes.

    With `settings.embedding` = 1 and two classes there is no linear layer: each word has one number, and their sum
    (or mean) is the logit of the second class, as in Trask 2019, 'Grokking Deep Learning', chapter 15.
    """
    words = PooledWords(task.vocabulary_size, settings.embedding, _bag_pooling(settings))
    layers: OrderedDict[str, nn.Module] = OrderedDict(embedding=words)
    if settings.embedding > 1 or len(task.classes) > 2:
        layers["output"] = nn.Linear(settings.embedding, len(task.classes))
    return _initialized(nn.Sequential(layers), settings.initialization)


@part(tasks=("classification of text",))
def lstm(task: Task, settings: Model) -> nn.Module:
    """Word vectors, `settings.layers` LSTM layers of `settings.units` (Hochreiter and Schmidhuber 1997), a linear layer.

    Pooling `mean` averages the states over a text's words, `last` takes the state after its last word; the padding
    behind a text does not count. Recurrent weights start as PyTorch's do: uniform within 1/sqrt(units).
    """
    if settings.pooling == "sum":
        raise SettingsError(
            "model.pooling = 'sum': an lstm takes 'mean' or 'last'; a sum of its states grows with the text"
        )
    return _initialized(LSTM(task, settings), settings.initialization)


class LSTM(nn.Module):
    """The network of `lstm`: int64 [n, t] -> [n, classes]."""

    def __init__(self, task: Task, settings: Model) -> None:
        super().__init__()
        between = settings.dropout if settings.layers > 1 else 0.0  # PyTorch warns of dropout between layers of one
        self.embedding = Words(task.vocabulary_size, settings.embedding)
        self.lstm = nn.LSTM(settings.embedding, settings.units, settings.layers, batch_first=True, dropout=between)
        self.dropout = nn.Dropout(settings.dropout)
        self.output = nn.Linear(settings.units, len(task.classes))
        self.pooling = settings.pooling

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of texts, whose padding behind the longest is not computed."""
        ids = trim(ids)
        states, _ = self.lstm(self.embedding(ids))  # [n, t, units]
        logits: Tensor = self.output(self.dropout(pool(states, ids, self.pooling)))
        return logits


def _bag_pooling(settings: Model) -> str:
    if settings.pooling == "last":
        raise SettingsError(
            "model.pooling = 'last': would read one word of each text; take 'mean' or 'sum', or an lstm"
        )
    return settings.pooling


def _initialized(network: nn.Module, initialization: str) -> nn.Module:
    """Set dense weights as `initialization` says and their biases to zero; with `zeros`, every weight."""
    if initialization == "zeros":
        for parameter in network.parameters():
            nn.init.zeros_(parameter)
        return network
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            if initialization == "xavier":
                nn.init.xavier_uniform_(layer.weight)
            else:
                nn.init.normal_(layer.weight, std=math.sqrt((2 if initialization == "he" else 1) / layer.in_features))
            nn.init.zeros_(layer.bias)
    return network


def example(task: Task) -> Tensor:
    """Three different examples, made up, to try a network on: [3, *task.shape]."""
    numbers = torch.arange(3 * math.prod(task.shape)).reshape(3, *task.shape)
    if task.kind == "text":
        numbers = numbers % (task.vocabulary_size - 1) + 1
        numbers[2, (task.shape[0] + 1) // 2 :] = PADDING  # behind the words of the last
        return numbers
    return torch.frac(numbers * 0.618034)  # spread over [0, 1)


def _outputs(network: nn.Module, task: Task) -> Tensor:
    """What the network gives for two examples of zeros; of the word 1, where they are text, half of it where each has outputs."""
    shape = (2, *task.shape)
    inputs = torch.ones(shape, dtype=torch.long) if task.kind == "text" else torch.zeros(shape)
    if task.predicts == "next_token":
        inputs[:, (task.shape[0] + 1) // 2 :] = PADDING  # padding has outputs too, though its mask is False
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
    """What a logit stands for, in words."""
    return f"{task.labels:,} word ids" if task.predicts == "next_token" else f"{len(task.classes)} classes"


def _check_state(network: nn.Module, task: Task, name: str) -> None:
    """Refuse what training changes besides weights: it would stay with a client, or be lost."""
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
