"""`fedveil attack`: what a script reads from it, what it leaves behind, and one message for each mistake."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedveil.cli import app
from fedveil.core.catalog import ATTACKS
from fedveil.core.errors import SettingsError

METRICS = {"words": ("recall", "precision"), "images": ("psnr",), "labels": ("accuracy",), "loss": ("auc",)}


def said(*words: str) -> str:
    answer = CliRunner().invoke(app, ["attack", *words])
    assert answer.exit_code == 0, answer.output
    return answer.stdout


@pytest.mark.parametrize("name", METRICS)
def test_json_has_the_score_under_its_metric_s_name_and_the_baseline(name, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = said(name, "--trials", "3", "--json", "--quiet")
    found = json.loads(text)
    assert text.count("\n") == 1
    assert {"baseline", "metric", "trials", "observer", "refused", "seconds", "report", *METRICS[name]} <= set(found)
    assert found[METRICS[name][0]] > found["baseline"]
    assert (tmp_path / found["report"]).exists()
    assert json.loads((tmp_path / found["report"]).with_name("scores.json").read_text())[0]["metric"] == found["metric"]


def test_the_book_s_experiment_shows_message_and_words_side_by_side(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = said("words", "--trials", "2").splitlines()
    sent = [line.split()[1:] for line in lines if line.startswith("  sent")]
    read = [line.split()[1:] for line in lines if line.startswith("  read")]
    assert len(sent) == len(read) == 2
    assert [set(each) for each in sent] == [set(each) for each in read]
    assert any("guessing" in line for line in lines)


@pytest.mark.parametrize("page", [False, True])
def test_what_was_not_read_stands_on_no_line_of_what_was(page, tmp_path, monkeypatch) -> None:
    """A pipe, a log or a document has no colours: under noise nothing is read, and nothing may seem to be."""
    monkeypatch.chdir(tmp_path)
    noise = ("--set", "privacy.clip=0.001", "--set", "privacy.noise_multiplier=100", "--set", "data.vocabulary=hashed")
    shown = said("words", "--trials", "2", *noise, "--out", "report")
    if page:
        text = re.sub(r"<b>(sent|read|wrong|missed)</b>", r"\n  \1 ", Path("report/report.html").read_text())
        shown = html.unescape(re.sub(r"<[^>]*>", "", text))
    lines = [line.split() for line in shown.splitlines()]
    parts = {name: [set(words[1:]) for words in lines if words[:1] == [name]] for name in ("sent", "read", "missed")}
    assert len(parts["sent"]) == len(parts["read"]) == len(parts["missed"]) == 2
    for sent, read, missed in zip(*parts.values(), strict=True):
        assert missed
        assert read - {"nothing"} == sent - missed


def test_an_order_says_how_many_words_stand_in_their_place(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = said(
        "order",
        "--trials",
        "2",
        "--set",
        "privacy.clip=0.001",
        "--set",
        "privacy.noise_multiplier=100",
        "--set",
        "data.vocabulary=hashed",
    ).splitlines()
    read = [line.split()[1:] for line in lines if line.startswith("  read")]
    sent = [[word for word in line.split()[1:] if word != "…"] for line in lines if line.startswith("  sent")]
    right = [sum(a == b for a, b in zip(*each, strict=False)) for each in zip(read, sent, strict=True)]
    told = [line.split()[1:] for line in lines if line.startswith("  right")]
    assert told == [
        [str(n), "of", str(len(words)), *["words", "in", "their", "place"]]
        for n, words in zip(right, sent, strict=True)
    ]


def test_a_trained_model_gives_images_away_too_and_was_not_trained_on_batches_of_one(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("images", "--after", "5", "--set", "training.batch_size=1", "--trials", "5", "--json", "--quiet")
    assert json.loads(said(*words))["least"] > 60


def test_two_runs_say_the_same(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = (json.loads(said("images", "--trials", "2", "--json", "--quiet", "--out", out)) for out in "ab")
    assert {k: v for k, v in first.items() if k not in ("seconds", "report")} == {
        k: v for k, v in second.items() if k not in ("seconds", "report")
    }


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ([], "name one"),
        (["wrods"], "did you mean 'words'"),
        (["order", "digits"], "take a preset of text"),
        (["images", "spam-demo"], "take a preset of images"),
        (["images", "--observer", "sever"], "did you mean 'server'"),
        (["images", "--against", "nowhere"], "--against nowhere: is not the folder of a run"),
        (["images", "--against", "nowhere", "--seed", "1"], "attacks a run as it was"),
        (["images", "--set", "training.batch_size=5000"], "larger than the data of any client"),
        (["images", "--set", "privacy.protection=ckk"], "did you mean 'ckks'"),
        (["images", "--quick"], "only with `fedveil attack matrix`"),
        (["matrix", "--after", "3"], "has settings of its own"),
        (["imprint", "--observer", "server"], "needs a server that makes up its model"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_message_and_leaves_nothing(words, why, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    answer = CliRunner().invoke(app, ["attack", *words])
    assert isinstance(answer.exception, SettingsError)
    assert why in str(answer.exception)
    assert not (tmp_path / "attacks").exists()


def test_attacks_are_listed_with_what_they_need() -> None:
    answer = CliRunner().invoke(app, ["list", "attacks"])
    assert answer.exit_code == 0
    for name in ATTACKS:
        assert f"\n{name}  " in f"\n{answer.stdout}"
    assert answer.stdout.count("  sees ") == answer.stdout.count("  cites ") == len(ATTACKS)
    assert "key-holder" in answer.stdout
