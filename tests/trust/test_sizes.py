"""A server that sets sizes: a hello that asks for gigabytes is refused before anything of that size is made."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from trust.liar import DeployedClient, Refused

from fedveil import Experiment
from fedveil.client import app
from fedveil.client.node.trainer import ClientProfile

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads the most memory held from /proc")

SHARED = {"data.clients": 3, "federation.cohort": 3, "federation.rounds": 1}
IMAGES = Experiment.preset("digits").override(SHARED)
TEXTS = Experiment.preset("sms-lstm").override({**SHARED, "data.vocabulary": "hashed", "privacy.protection": "none"})
BYTES = 32 << 20  # that a refused hello may take, of a process that has all it needs imported


def growth(ask: Callable[[], Any]) -> int:
    """The bytes by which the most memory that this process held grows in a call."""
    Path("/proc/self/clear_refs").write_text("5")  # the most held is from now on
    before = most_held()
    ask()
    return most_held() - before


def most_held() -> int:
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


@pytest.fixture
def texts(tmp_path: Path) -> DeployedClient:
    (tmp_path / "texts.csv").write_text("label,text\n" + "ham,hello there\nspam,win now\n" * 500)
    return DeployedClient(ClientProfile(0, str(tmp_path / "texts.csv")), {"experiment": TEXTS.toml()})


@pytest.fixture
def images(tmp_path: Path) -> DeployedClient:
    (tmp_path / "policy.toml").write_text("max_epochs = 5\nmax_rounds = 1\n")
    profile = ClientProfile(0, "digits:1/3", policy=str(tmp_path / "policy.toml"))
    return DeployedClient(profile, {"experiment": IMAGES.toml()})


def refused_at_once(client: DeployedClient, **settings: str) -> str:
    """What a client's operator is told of a hello that costs next to nothing."""
    client.ask("query")  # a modest run is served, and leaves all imported and read
    said: list[str] = []

    def hello() -> None:
        with pytest.raises(Refused) as refused:
            client.ask("query", **settings)
        said.extend(refused.value.said)

    assert growth(hello) < BYTES
    return "\n".join(said)


@pytest.mark.parametrize("hidden", [[20_000, 20_000], [10**6, 10**6], [10_000] * 100])
def test_a_network_of_gigabytes_is_counted_and_refused(images: DeployedClient, hidden: list[int]) -> None:
    said = refused_at_once(images, experiment=IMAGES.override({"model.hidden": hidden}).toml())
    assert "weights, and 50,000,000 are allowed" in said


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"data.vocabulary_size": 10**7}, "weights, and 50,000,000 are allowed"),
        ({"model.units": 10**6}, "weights, and 50,000,000 are allowed"),
        ({"model.layers": 100, "model.units": 10**4}, "weights, and 50,000,000 are allowed"),
        ({"data.max_tokens": 10**6}, "data.max_tokens = 1000000, and it allows 4096 at most (max_tokens)"),
    ],
)
def test_words_and_tokens_of_gigabytes_are_refused(texts: DeployedClient, settings: dict[str, Any], said: str) -> None:
    assert said in refused_at_once(texts, experiment=TEXTS.override(settings).toml())


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("vocabulary_size = 4000", "vocabulary_size = 20000000", "must be less than or equal to 10000000"),
        ("max_tokens = 64", "max_tokens = 1000000000", "must be less than or equal to 1000000"),
        ('vocabulary = "hashed"', f'vocabulary = "{"x" * 10**6}"', "text of at most 4096 characters"),
    ],
)
def test_sizes_beyond_any_use_are_no_settings(texts: DeployedClient, old: str, new: str, said: str) -> None:
    text = TEXTS.toml()
    assert old in text
    assert said in refused_at_once(texts, experiment=text.replace(old, new))


def test_a_vocabulary_of_millions_of_words_is_not_cut_into_words(texts: DeployedClient) -> None:
    listed = TEXTS.override({"data.vocabulary": "train"}).toml()
    words = "\n" * app.MOST_WORDS
    assert "more than 1,000,000 words" in refused_at_once(texts, experiment=listed, words=words)
    assert "more than 1,000,000 words" in refused_at_once(texts, experiment=listed, words="x" * (app.LONGEST_WORDS + 1))


def test_a_share_of_millions_of_made_examples_is_not_made() -> None:
    made = IMAGES.override({"data.dataset": "synthetic", "training.epochs": 1})
    client = DeployedClient(ClientProfile(0, "synthetic:1/3"), {"experiment": made.toml()})
    large = made.override({"data.dataset.examples": 10**7, "data.dataset.spread": 0.0}).toml()
    assert "a share of 10,000,000 examples" in refused_at_once(client, experiment=large)


def test_settings_of_megabytes_are_not_parsed(images: DeployedClient) -> None:
    assert "settings of 4,000,000 characters" in refused_at_once(images, experiment="#" * 4_000_000)


def test_an_owner_allows_more_or_less(tmp_path: Path) -> None:
    large = IMAGES.override({"model.hidden": [300, 300]}).toml()
    for most, served in ((1000, False), (200_000, True)):
        (tmp_path / "policy.toml").write_text(f"max_weights = {most}\n")
        client = DeployedClient(ClientProfile(0, "digits:1/3", policy=str(tmp_path / "policy.toml")))
        assert (client.reply("query", experiment=large).content is not None) == served


@pytest.mark.slow
def test_many_hellos_do_not_fill_the_memory(images: DeployedClient) -> None:
    images.ask("query")

    def hellos() -> None:
        for units in range(3000, 3008):
            images.ask("query", experiment=IMAGES.override({"model.hidden": [units, 3000]}).toml())

    grown = growth(hellos)
    assert grown < 250 << 20  # 37 MB each: the networks of two runs, and one that is tried
