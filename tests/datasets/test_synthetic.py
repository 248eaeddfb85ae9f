"""Synthetic(alpha, beta): each client makes its own examples, always the same, and a population costs nothing."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil import Experiment
from fedveil.core.errors import SettingsError
from fedveil.core.settings.sections import Data
from fedveil.datasets import federated
from fedveil.datasets.federated import Federated, load
from fedveil.datasets.published.synthetic import Synthetic, splitmix

FORMS = [{"partition": "iid"}, {"partition": "natural"}, {"partition": "natural", "rule": "shared"}]


def made(seed: int = 0, **data: object) -> Federated:
    own = {key: data.pop(key) for key in ("examples", "spread", "beta", "rule") if key in data}
    return load(Data(**{"dataset": {"name": "synthetic", **own}, "clients": 1_000, **data}), seed)


def pooled(loaded: Federated, clients: range) -> tuple[np.ndarray, np.ndarray]:
    parts = [loaded.client(k)[0] for k in clients]
    return np.concatenate([p.features for p in parts]), np.concatenate([p.labels for p in parts])


@pytest.mark.parametrize("form", FORMS, ids=["iid", "own-rule", "shared-rule"])
def test_a_client_makes_the_same_examples_whenever_it_is_asked_whatever_the_population_and_the_seed(form) -> None:
    first = made(**form).client(7)[0]
    federated._divided.cache_clear(), federated._dataset.cache_clear()
    others = [made(**form), made(1, **form), made(clients=2_000_000, **form)]
    for other in others:
        assert np.array_equal(other.client(7)[0].features, first.features)
        assert np.array_equal(other.client(7)[0].labels, first.labels)
    assert not np.array_equal(made(**form).client(8)[0].features[:1], first.features[:1])
    assert first.features.dtype == np.float32
    assert first.labels.dtype == np.int64


@given(
    form=st.sampled_from(FORMS),
    mean=st.integers(1, 60),
    spread=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    least=st.integers(1, 3),
    fraction=st.sampled_from([0.0, 0.1, 0.5, 0.9]),
)
@settings(max_examples=30, deadline=None)
def test_sizes_are_what_clients_train_on(form, mean, spread, least, fraction) -> None:
    least = min(least, mean)
    data = {"examples": mean, "spread": spread, "min_examples": least}
    loaded = made(clients=1_000_000, validation_fraction=fraction, **data, **form)
    asked = np.random.default_rng(mean).integers(0, 1_000_000, 20)
    clients = [loaded.client(int(k)) for k in asked]
    assert loaded.sizes(asked).tolist() == [len(train) for train, _ in clients]
    low, high = loaded.extremes()
    assert all(max(low, least) <= len(train) + len(held) <= high for train, held in clients)
    assert low == high == mean or spread > 0
    assert loaded.fewer_than(least) == 0


@pytest.mark.parametrize("spread", [0.0, 1.0, 2.0])
def test_sizes_have_the_mean_and_the_spread_that_the_settings_say(spread) -> None:
    sizes = made(clients=200_000, examples=1_000, spread=spread).sizes(np.arange(200_000))
    assert sizes.mean() == pytest.approx(1_000, rel=0.02)
    assert np.log(sizes).std() == pytest.approx(spread, rel=0.01)
    assert sizes.max() <= 1_000 * np.exp(3.7 * spread)  # the tail ends: no client of a million fills the memory


def test_the_numbers_behind_sizes_are_those_of_splitmix64() -> None:
    # the first three of seed 1234567, as the reference implementation (Vigna 2015) prints them
    wanted = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert splitmix(1234567, np.arange(3)).tolist() == wanted


@pytest.mark.slow
def test_features_and_labels_follow_the_recipe() -> None:
    """Against the recipe's own words, step by step: v_k from its hyperprior, Sigma, and a linear rule."""
    loaded = made(partition="natural", examples=4_000, spread=0.0, beta=2.0)
    features, labels = loaded.client(3)[0].features, loaded.client(3)[0].labels
    variances = np.arange(1, 61) ** -1.2
    np.testing.assert_allclose(features.var(axis=0), variances, rtol=0.15)
    assert abs(np.corrcoef(features.T)[np.triu_indices(60, 1)]).max() < 0.1
    means = np.array([loaded.client(k)[0].features.mean(axis=0) for k in range(200)])  # v_k, [200, 60]
    assert means.mean(axis=1).std() == pytest.approx(2.0, rel=0.2)  # B_k ~ N(0, beta)
    assert (means - means.mean(axis=1, keepdims=True)).std() == pytest.approx(1.0, rel=0.05)  # v_k ~ N(B_k, 1)
    assert isinstance(loaded.dataset.train, Synthetic)
    rng = federated.Stream(0, client=3).generator("synthetic client")
    mean, (weights, bias) = loaded.dataset.train._distribution(rng)
    np.testing.assert_allclose(mean, features.mean(axis=0), atol=0.1)
    for x, label in zip(features[:200].astype(float), labels[:200], strict=True):
        scores = [sum(x[j] * weights[j, c] for j in range(60)) + bias[c] for c in range(10)]
        assert label == int(np.argmax(scores))
        u = 3.7  # alpha's part: it moves all scores alike, and no label
        assert label == int(np.argmax(x @ (weights + u) + bias + u))


def test_iid_clients_are_alike_and_natural_ones_are_not() -> None:
    classes = {}
    for name, form in zip(("iid", "own", "shared"), FORMS, strict=True):
        counts = made(examples=200, spread=0.0, **form).counts(np.arange(100))
        classes[name] = float((counts > 0).sum(axis=1).mean())
        if name == "iid":
            share = counts.sum(axis=0) / counts.sum()
            distance = ((counts - 200 * share) ** 2 / (200 * share)).sum(axis=1)  # chi-squared, 9 degrees of freedom
            assert distance.mean() == pytest.approx(9, abs=2)
    assert classes["iid"] > 7
    assert max(classes["own"], classes["shared"]) < 4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:lbfgs failed to converge")  # near enough after 40 steps
@pytest.mark.parametrize(("form", "low", "high"), [(FORMS[0], 0.93, 1), (FORMS[1], 0, 0.2), (FORMS[2], 0.9, 1)])
def test_what_one_model_can_learn_of_other_clients(form, low, high) -> None:
    """Pooled logistic regression: a shared rule carries over to clients never seen; rules of their own do not."""
    from sklearn.linear_model import LogisticRegression

    loaded = made(clients=1_000_000, examples=20, **form)
    features, labels = pooled(loaded, range(1, 1_001))
    test = loaded.dataset.test
    score = LogisticRegression(C=100, max_iter=40).fit(features, labels).score(test.features, test.labels)
    assert low <= score <= high


@pytest.mark.parametrize(
    ("clients", "of", "examples"), [(3, 3, 10_002), (1_000, 1_000, 10_000), (10**6, 1_000, 10_000)]
)
def test_test_examples_are_other_ones_of_clients_evenly_taken(clients, of, examples) -> None:
    loaded = made(clients=clients, partition="natural")
    test = loaded.dataset.test
    assert len(test) == examples
    each = examples // of
    for i, k in ((0, 0), (of - 1, clients - 1)):  # the first and the last client
        mine, theirs = loaded.client(k)[0].features, test.features[i * each : (i + 1) * each]
        assert not set(map(bytes, mine)) & set(map(bytes, theirs))
        mean, _ = loaded.dataset.train._distribution(federated.Stream(0, client=k).generator("synthetic client"))
        assert abs((theirs - mean).mean(axis=0)).max() < 5 * each**-0.5
    assert loaded.dataset.made_up


def test_a_million_clients_take_the_memory_of_a_thousand() -> None:
    peaks = []
    made(clients=10)
    for clients in (1_000, 1_000_000):
        federated._divided.cache_clear(), federated._dataset.cache_clear()
        tracemalloc.start()
        loaded = made(clients=clients)
        for k in range(0, clients, clients // 100):
            loaded.client(k)
        loaded.sizes(np.arange(0, clients, clients // 1_000)), loaded.extremes(), loaded.counts(np.arange(100))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 4e6  # a list of a million numbers takes 40e6; sizes are looked at in blocks


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data.partition": "shards"}, "data.partition = 'shards': there is nothing to divide"),
        ({"data.partition": "math:sqrt"}, "there is nothing to divide"),
        (
            {"data.partition.alpha": 0.1},
            "data.partition.alpha: unknown setting of data.partition = 'iid'; alpha is a setting of",
        ),
        ({"data.test_fraction": 0.1}, "data.test_fraction = 0.1: has no effect with data.dataset = 'synthetic'"),
        ({"data.dataset.beta": 0.5}, "has no effect with data.partition = 'iid'"),
        ({"data.dataset.rule": "shared"}, "has no effect with data.partition = 'iid'"),
        ({"data.dataset": "digits", "data.dataset.examples": 9}, "is a setting of data.dataset = 'synthetic'"),
        ({"data.dataset": "digits", "data.dataset.spread": 0.5}, "is a setting of data.dataset = 'synthetic'"),
        ({"data.dataset": "digits", "data.dataset.beta": 0.5}, "is a setting of data.dataset = 'synthetic'"),
        ({"data.dataset.spread": 3.5}, "data.dataset.spread = 3.5: must be less than or equal to 3"),
        ({"data.min_examples": 101}, "data.min_examples = 101: larger than the average"),
        ({"data.synthetic_alpha": 1.0}, "data.synthetic_alpha: unknown setting"),
    ],
    ids=lambda value: value.split("=")[0].strip() if isinstance(value, str) else next(reversed(value)),
)
def test_what_has_no_effect_or_cannot_work_is_refused(change, said) -> None:
    with pytest.raises(SettingsError, match="^" + said if said.startswith("data.") else said):
        Experiment(data={"dataset": "synthetic"}).override(change)


def test_natural_takes_its_settings_and_lone_examples_cannot_be_held_out(tmp_path) -> None:
    from fedveil import run

    settings = Experiment(
        data={"dataset": {"name": "synthetic", "examples": 2}, "partition": "natural", "validation_fraction": 0.5},
        evaluation={"federated": True},
    ).override({"data.dataset.beta": 0.5, "data.dataset.rule": "shared"})
    with pytest.raises(SettingsError, match=r"of 10 clients hold one example.*data.min_examples = 2"):
        run(settings, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    quick = {"data.min_examples": 2, "federation.rounds": 1, "model.hidden": [4]}
    assert 0 <= run(settings.override(quick), out=tmp_path / "run").summary["validation_accuracy"] <= 1


def test_a_million_clients_are_shown_by_a_few_and_called_made_up(tmp_path) -> None:
    import io

    import matplotlib.image
    from rich.console import Console

    from fedveil.simulations.plots import draw_partition
    from fedveil.simulations.shows import partition_table

    experiment = Experiment.preset("million")
    loaded = load(experiment.data, 0)
    console = Console(file=io.StringIO(), width=200)
    console.print(partition_table(experiment, loaded))
    lines = console.file.getvalue().splitlines()
    shown = " ".join(" ".join(lines).split())
    assert "synthetic (made-up data): iid over 1,000,000 clients" in shown
    assert "each client makes its own, 1 to " in shown
    assert "(1,000 clients, evenly taken); 10,000 test examples" in shown
    first = next(i for i, line in enumerate(lines) if line.split()[:1] == ["0"])
    sizes = [int(line.split()[1]) for line in lines[first : first + 20]]
    assert sizes == loaded.sizes(np.arange(20)).tolist()
    draw_partition(experiment, loaded, tmp_path / "p.png")
    assert matplotlib.image.imread(tmp_path / "p.png").std() > 0.05
