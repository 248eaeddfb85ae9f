"""The catalog of FedVeil's parts, by kind and name.

A new part is one function or class in one file, and one entry here. Listing and checking names imports no part; a part
is imported when it is chosen.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Any

from fedveil.core.declaration import Declaration, declaration
from fedveil.core.errors import SettingsError, nearest


class Table(Mapping[str, str]):
    """The parts of one kind, `name -> description`; each part is imported when it is first used.

    Where the kind allows it, a user's own part needs no entry: its name is `package.module:object`.
    """

    def __init__(self, kind: str, entries: dict[str, tuple[str, str]], *, own: bool = True) -> None:
        """Make a table of parts.

        entries: name -> (`module:object`, one line of description); an empty `module:object` stands for no part
        own: whether users may name parts of their own
        """
        self.kind = kind
        self.own = own
        self._entries = entries

    def __getitem__(self, name: str) -> str:
        return self._entries[name][1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def check(self, name: str, key: str) -> str:
        """Return `name`; raise SettingsError, with the nearest known name, where no part has it.

        key: the setting that names the part, for errors
        """
        if name in self._entries or (self.own and ":" in name):
            return name
        known = ", ".join(self._entries) + ("; or your own as package.module:object" if self.own else "")
        raise SettingsError(f"{key}: no {self.kind} is called '{name}'{nearest(name, self)}\n  known: {known}")

    def load(self, name: str, key: str) -> Any:
        """Import and return the part called `name`; raise SettingsError where a user's own part cannot be imported."""
        self.check(name, key)
        own = name not in self._entries
        module, _, attribute = (name if own else self._entries[name][0]).partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except Exception as error:  # importing a user's module runs its code, which may raise anything
            if not own:
                raise
            raise SettingsError(
                f"{key}: '{name}' cannot be loaded ({type(error).__name__}: {error}); it must be package.module:object, "
                "importable from here"
            ) from error

    def is_own(self, name: str) -> bool:
        """Say whether `name` is that of a user's own part, `package.module:object`."""
        return self.own and name not in self._entries and ":" in name

    def declared(self, name: str, key: str) -> Declaration:
        """Return the declaration of the part called `name`; an entry without an object, `none`, has the default one."""
        if name in self._entries and not self._entries[name][0]:
            return Declaration()
        return declaration(self.load(name, key))


DATASETS = Table(
    "data set",
    {
        "digits": (
            "fedveil.datasets.published.images:digits",
            "1,797 handwritten digits, 8x8, real; ships inside scikit-learn",
        ),
        "mnist": (
            "fedveil.datasets.published.images:mnist",
            "70,000 handwritten digits, 28x28, real (LeCun et al. 1998)",
        ),
        "sms": ("fedveil.datasets.text:sms", "5,574 text messages, ham or spam, real (Almeida et al. 2011)"),
        "enron": (
            "fedveil.datasets.text:enron",
            "10,347 e-mails, ham or spam, real (Metsis et al. 2006: enron1, enron5)",
        ),
        "spam-demo": (
            "fedveil.datasets.published.spam_demo:spam_demo",
            "2,000 made-up messages, ham or spam; made by FedVeil, not real",
        ),
        "synthetic": (
            "fedveil.datasets.published.synthetic:synthetic",
            "made-up features; each client makes its own, for populations of any size (Li et al. 2020)",
        ),
        "own": (
            "fedveil.datasets.own.own:own",
            "your own files: CSV of label,text; CSV or .npz of features; a folder of images",
        ),
    },
)

PARTITIONS = Table(
    "partition",
    {
        "iid": ("fedveil.datasets.partition.iid:iid", "shuffled and dealt out evenly"),
        "shards": (
            "fedveil.datasets.partition.shards:shards",
            "sorted by label, cut into shards, a few for each client (McMahan et al. 2017)",
        ),
        "dirichlet": (
            "fedveil.datasets.partition.dirichlet:dirichlet",
            "each client's label mix drawn from a Dirichlet (Hsu et al. 2019)",
        ),
        "label_dirichlet": (
            "fedveil.datasets.partition.label_dirichlet:label_dirichlet",
            "each class divided by a Dirichlet, sizes skewed too (flwr-datasets' DirichletPartitioner)",
        ),
        "quantity": (
            "fedveil.datasets.partition.quantity:quantity",
            "sizes follow a power law, labels are mixed alike",
        ),
        "classes": ("fedveil.datasets.partition.classes:classes", "each client holds exactly k classes"),
        "natural": (
            "fedveil.datasets.partition.natural:natural",
            "by the source the data came from: a mailbox, a column of your file, a client that makes its own",
        ),
    },
)

MODELS = Table(
    "model",
    {
        "mlp": ("fedveil.models.networks.mlp:mlp", "dense layers, for images and features"),
        "lstm": ("fedveil.models.networks.lstm:lstm", "embedding and LSTM, for text"),
        "bag": ("fedveil.models.networks.bag:bag", "mean of word embeddings and a linear layer, for text"),
    },
)

STRATEGIES = Table(
    "strategy",
    {
        "fedavg": (
            "fedveil.algorithms.fedavg:fedavg",
            "mean of the clients' weights by examples (McMahan et al. 2017)",
        ),
        "fedprox": (
            "fedveil.algorithms.fedprox:fedprox",
            "fedavg with a proximal term on the clients (Li et al. 2020)",
        ),
        "fedavgm": ("fedveil.algorithms.fedavgm:fedavgm", "fedavg with momentum on the server (Hsu et al. 2019)"),
        "fedadam": ("fedveil.algorithms.fedopt:fedadam", "Adam on the server (Reddi et al. 2021)"),
        "fedyogi": ("fedveil.algorithms.fedopt:fedyogi", "Yogi on the server (Reddi et al. 2021)"),
        "fedadagrad": ("fedveil.algorithms.fedopt:fedadagrad", "Adagrad on the server (Reddi et al. 2021)"),
        "qfedavg": ("fedveil.algorithms.qfedavg:qfedavg", "clients with a higher loss weigh more (Li et al. 2020)"),
        "fedmedian": ("fedveil.algorithms.rules.median:fedmedian", "median of each weight (Yin et al. 2018)"),
        "fedtrimmedavg": (
            "fedveil.algorithms.rules.trimmed_mean:fedtrimmedavg",
            "mean of each weight without its extremes (Yin et al. 2018)",
        ),
        "krum": (
            "fedveil.algorithms.rules.krum:krum",
            "the one update closest to its neighbours (Blanchard et al. 2017)",
        ),
        "multikrum": (
            "fedveil.algorithms.rules.krum:multikrum",
            "mean of the updates closest to their neighbours (Blanchard et al. 2017)",
        ),
        "bulyan": (
            "fedveil.algorithms.rules.bulyan:bulyan",
            "Krum, then a trimmed mean of each weight (El Mhamdi et al. 2018)",
        ),
    },
)

METRICS = Table(
    "metric",
    {
        "loss": ("fedveil.core.metrics:LOSS", "mean of training.loss over the predictions"),
        "accuracy": ("fedveil.core.metrics:ACCURACY", "share of the predictions that name the label"),
        "precision": (
            "fedveil.core.metrics:PRECISION",
            "two classes: share of positives among those predicted positive",
        ),
        "recall": ("fedveil.core.metrics:RECALL", "two classes: share of positives that were predicted positive"),
        "f1": ("fedveil.core.metrics:F1", "two classes: the harmonic mean of precision and recall"),
        "auc": (
            "fedveil.core.metrics:AUC",
            "two classes, on the server's test data alone: the chance that a positive scores above a negative",
        ),
        "perplexity": ("fedveil.core.metrics:PERPLEXITY", "next_token: exponential of the mean loss a token"),
    },
)

PROTECTIONS = Table(
    "protection",
    {
        "none": ("", "updates travel in the clear: the server sees every client's weights, and what they leak"),
        "ckks": (
            "fedveil.privacy.plan:ckks",
            "homomorphic encryption of numbers snapped to a grid: the server adds ciphertexts and sees no trained weights, "
            "not even their mean. All clients share one key: one that colludes with the server, or reads another's traffic, "
            "opens everybody's updates. Does not hide who takes part, example counts, losses and scores of each client, or "
            "what the mean itself leaks to the clients; does not stop a server that lies",
        ),
        "bfv": (
            "fedveil.privacy.plan:bfv",
            "as ckks, with whole numbers: fewer bytes (models of many weights upload less than float32) and less time, for "
            "smaller cohorts",
        ),
        "secagg": (
            "fedveil.privacy.plan:secagg",
            "secure aggregation (Bonawitz et al. 2017, Bell et al. 2020): masks that cancel in the sum. A server that follows "
            "the protocol, with a set share of the clients telling it all they know, learns the mean of a cohort's weights and "
            "no client's own; clients may drop out. With keys registered beforehand the server may lie too. Does not hide the "
            "mean, who takes part, example counts, losses and scores of each client",
        ),
    },
    own=False,
)

MECHANISMS = Table(
    "mechanism",
    {
        "server-poisson": (
            "fedveil.privacy.dp.accounting.mechanisms:SERVER_POISSON",
            "noise_at server, sampling poisson: one client's whole data, against who sees the models and not who took part; "
            "against who knows that too, epsilon_known, which is much larger. The server is trusted",
        ),
        "server-order": (
            "fedveil.privacy.dp.accounting.mechanisms:SERVER_ORDER",
            "noise_at server, sampling order: one client's whole data, against who sees the models, and who took part. The server "
            "is trusted",
        ),
        "server-banded": (
            "fedveil.privacy.dp.accounting.mechanisms:SERVER_BANDED",
            "noise_at server, sampling order, noise banded: as server-order, and with noise that cancels over rounds, which costs "
            "less accuracy than there. The server is trusted. Refused with other sampling",
        ),
        "server-fixed": (
            "fedveil.privacy.dp.accounting.mechanisms:SERVER_FIXED",
            "noise_at server, sampling fixed: one client's whole data, against who sees the models and not who took part: the "
            "better of what sampling and what the busiest client's rounds prove. The server is trusted",
        ),
        "client-clear": (
            "fedveil.privacy.dp.accounting.mechanisms:CLIENT_CLEAR",
            "noise_at client, protection none: one client's whole data, against the server too, which sees each update; each "
            "update has all the noise. Seconds and who takes part are not covered",
        ),
        "client-sum": (
            "fedveil.privacy.dp.accounting.mechanisms:CLIENT_SUM",
            "noise_at client, protection secagg, ckks or bfv: one client's whole data, each update's noise against who comes to see "
            "it, their sum's against who sees sums alone. Refused where a grid would round the noise away",
        ),
        "client-distributed": (
            "fedveil.privacy.dp.accounting.mechanisms:CLIENT_DISTRIBUTED",
            "noise_at distributed, protection secagg or bfv: one client's whole data, against who sees sums, the server too, helped "
            "by the clients that the noise is sized for; bfv: not against the server together with a client, who hold the key. "
            "Refused with none and ckks, and where a client's share is under 4 steps of the grid",
        ),
        "example-client": (
            "fedveil.privacy.dp.accounting.mechanisms:EXAMPLE_CLIENT",
            "unit example, noise_at client: one example, against everybody but its own client: each client's training is "
            "private (DP-SGD), and which examples a step uses is its secret",
        ),
        "example-server": (
            "fedveil.privacy.dp.accounting.mechanisms:EXAMPLE_SERVER",
            "unit example, noise_at server, training.steps 1: one example, against who sees the models, as if all data lay in one "
            "place. The server is trusted. Refused with several local steps",
        ),
        "example-distributed": (
            "fedveil.privacy.dp.accounting.mechanisms:EXAMPLE_DISTRIBUTED",
            "unit example, noise_at distributed, training.steps 1: one example, against who sees sums, the server too. Refused "
            "with several local steps, with none and with ckks",
        ),
    },
    own=False,
)

DEFENCES = Table(
    "defence",
    {
        "none": ("", "updates leave clients as training made them"),
        "prune": (
            "fedveil.privacy.defences:prune",
            "the smallest numbers of an update are set to zero, and sent as zeros (Zhu et al. 2019); no guarantee",
        ),
    },
)

PRESETS = Table(
    "preset",
    {
        "digits": ("digits.toml", "small MLP on 8x8 digits, 10 clients; seconds, no download"),
        "mnist-mlp": ("mnist-mlp.toml", "MLP on MNIST, 100 clients, IID"),
        "mnist-dp": ("mnist-dp.toml", "MLP on MNIST, 1,000 clients, client-level differential privacy of epsilon 3"),
        "mnist-2nn": ("mnist-2nn.toml", "the 784-200-200-10 network of McMahan et al. 2017, IID"),
        "mnist-shards": ("mnist-shards.toml", "the same network on the paper's pathological non-IID split"),
        "sms-lstm": ("sms-lstm.toml", "LSTM on real text messages, 10 clients"),
        "sms-mlp": ("sms-mlp.toml", "word embeddings and a linear layer on real text messages, 10 clients"),
        "enron-book": ("enron-book.toml", "the spam model of 'Grokking Deep Learning', chapter 15, on real mail"),
        "spam-demo": ("spam-demo.toml", "LSTM on made-up messages; no download"),
        "digits-dp": (
            "digits-dp.toml",
            "client-level differential privacy, epsilon 7: 100 clients add noise in shares under secure aggregation",
        ),
        "sms-bag-dp": (
            "sms-bag-dp.toml",
            "example-level differential privacy, epsilon 3: spam among real text messages, hashed words",
        ),
        "million": ("million.toml", "1,000,000 clients that make up their own examples, 1,000 of them a round"),
    },
    own=False,
)

ATTACKS = Table(
    "attack",
    {
        "words": (
            "fedveil.simulations.attacks.words.words:WORDS",
            "the words of text messages, by the rows of the embedding that moved (Trask 2019; Melis et al. 2019)",
        ),
        "order": (
            "fedveil.simulations.attacks.words.order:ORDER",
            "a message's words in order, from an LSTM's update, one message at a time",
        ),
        "images": (
            "fedveil.simulations.attacks.images.first_layer:FIRST_LAYER",
            "images, exactly, from the first dense layer's weights and biases (Phong et al. 2017)",
        ),
        "spear": (
            "fedveil.simulations.attacks.images.spear:SPEAR",
            "a small batch of images, exactly, from low rank and ReLU's sparsity (Dimitrov et al. 2024)",
        ),
        "labels": (
            "fedveil.simulations.attacks.labels:LABELS",
            "how many examples of each class, from the last layer (Zhao et al. 2020; Wainakh et al. 2022)",
        ),
        "counts": (
            "fedveil.simulations.attacks.counts:COUNTS",
            "how many examples of each of two classes, from what clients say of their evaluation, under any protection",
        ),
        "differencing": (
            "fedveil.simulations.attacks.differencing:DIFFERENCING",
            "one client's update, from the sums of two runs whose cohorts differ by it (Denning et al. 1979)",
        ),
        "matching": (
            "fedveil.simulations.attacks.images.matching:MATCHING",
            "images whose gradient looks like the update's (Geiping et al. 2020)",
        ),
        "dlg": ("fedveil.simulations.attacks.images.dlg:DLG", "image and label together, by L-BFGS (Zhu et al. 2019)"),
        "idlg": (
            "fedveil.simulations.attacks.images.dlg:IDLG",
            "the image by L-BFGS, its label from the last layer (Zhao et al. 2020)",
        ),
        "imprint": (
            "fedveil.simulations.attacks.images.imprint:IMPRINT",
            "images, by a malicious server that crafts the first layer (Fowl et al. 2022)",
        ),
        "loss": (
            "fedveil.simulations.attacks.membership.membership:LOSS",
            "who was trained on, by the loss (Yeom et al. 2018)",
        ),
        "loss-difference": (
            "fedveil.simulations.attacks.membership.membership:LOSS_DIFFERENCE",
            "who was trained on, by how far the loss fell",
        ),
        "cosine": (
            "fedveil.simulations.attacks.membership.membership:COSINE",
            "who was trained on, by the angle between an example's gradient and the update",
        ),
        "coverage": (
            "fedveil.simulations.attacks.membership.coverage:COVERAGE",
            "which messages were trained on, by whether all of their words moved (Melis et al. 2019)",
        ),
        "lira": (
            "fedveil.simulations.attacks.membership.lira:LIRA",
            "who was trained on, by a likelihood ratio over shadow models (Carlini et al. 2022)",
        ),
        "lira-offline": (
            "fedveil.simulations.attacks.membership.lira:LIRA_OFFLINE",
            "the same, with shadow models that never saw the examples asked about",
        ),
    },
)
