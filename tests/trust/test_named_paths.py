"""A server that names paths in its settings: a client opens none of them, and answers the same whether they exist."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from trust.liar import DeployedClient

from fedveil import Experiment
from fedveil.client.node.trainer import ClientProfile

SHARED = {"data.clients": 3, "federation.cohort": 3, "federation.rounds": 1, "privacy.protection": "none"}
WORDS = "\n".join(("<padding>", "<unknown>", *(f"secretword{i}" for i in range(1234)))) + "\n"
OPENED: list[str] = []  # by this process, while a test watches
PATHS = ("data.path", "data.test_path", "data.vocabulary")


def _note(event: str, arguments: tuple[object, ...]) -> None:
    if event in ("open", "os.listdir", "os.scandir", "glob.glob", "pathlib.Path.glob", "pathlib.Path.rglob"):
        OPENED.append(str(arguments[0]))


@pytest.fixture(scope="module")
def watched() -> None:
    """Note every file that is opened from now on; Python keeps such a hook until it ends."""
    sys.addaudithook(_note)


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A folder of the client's that is no part of its data, with a file that a data set could be read from."""
    folder = tmp_path / "private"
    folder.mkdir()
    (folder / "words.txt").write_text(WORDS)
    (folder / "more.csv").write_text("label,text\nham,secretword\nspam,win\n")
    return folder


@pytest.fixture(params=["a share of texts", "a share of images", "a file", "a file of texts"])
def client(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[DeployedClient, Experiment]:
    texts = Experiment.preset("spam-demo").override(SHARED)
    images = Experiment.preset("digits").override(SHARED)
    own = images.override({"data.dataset": "own", "data.labels": ["0", "1"]})
    (tmp_path / "table.csv").write_text("label,a,b\n" + "0,0.1,0.2\n1,0.3,0.1\n" * 10)
    (tmp_path / "texts.csv").write_text("label,text\n" + "ham,hello there\nspam,win now\n" * 10)
    source, experiment = {
        "a share of texts": ("spam-demo:1/3", texts),
        "a share of images": ("digits:1/3", images),
        "a file": (str(tmp_path / "table.csv"), own),
        "a file of texts": (str(tmp_path / "texts.csv"), texts),
    }[request.param]
    return DeployedClient(ClientProfile(0, source)), experiment


def sent(experiment: Experiment, key: str, path: str) -> str:
    """The settings with a path in them, which no override allows: a liar writes what it likes."""
    name = key.removeprefix("data.")
    lines = [line for line in experiment.toml().split("\n") if not line.startswith(f"{name} = ")]
    return "\n".join(lines).replace("[data]\n", f"[data]\n{name} = '{path}'\n", 1)


@pytest.mark.usefixtures("watched")
@pytest.mark.parametrize("key", PATHS)
def test_no_path_that_a_server_names_is_opened_or_told_about(
    client: tuple[DeployedClient, Experiment], secret: Path, key: str
) -> None:
    asked, experiment = client
    answers = []
    for path in (secret / "words.txt", secret / "more.csv", secret, secret / "nowhere", Path("/etc/shadow")):
        OPENED.clear()
        outcome = asked.reply("query", experiment=sent(experiment, key, str(path)), words=WORDS.strip())
        assert not [name for name in OPENED if str(secret) in name or name.startswith("/etc/shadow")]
        parcel = None if outcome.content is None else [dict(record) for record in outcome.content.values()]  # type: ignore[call-overload]
        answers.append((outcome.error, parcel))
    assert all(answer == answers[0] for answer in answers)


@pytest.mark.usefixtures("watched")
def test_the_watch_sees_a_file_that_is_opened(secret: Path) -> None:
    OPENED.clear()
    (secret / "words.txt").read_text()
    assert [str(secret / "words.txt")] == OPENED
