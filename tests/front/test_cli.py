"""The command line, through real processes: what it prints, where, and how it ends."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import prepared

KILLED = [
    "--set",
    "federation.strategy=fedadam",
    "--set",
    "training.learning_rate=0.05",
    "--set",
    "federation.rounds=15",
]
FAST = ["--set", "federation.rounds=2", "--set", "training.epochs=1"]


def fedveil(*words: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `fedveil` as a user would, in a folder of its own."""
    around = {**os.environ, "FEDVEIL_CACHE": str(cwd / "cache"), **environment}
    return prepared.fedveil(*words, cwd=cwd, environment=around)


def refused(*words: object, cwd: Path, code: int = 2, **environment: str) -> str:
    """The message of a command that must fail, leave nothing behind, and show no traceback."""
    before = [path for path in sorted(cwd.rglob("*")) if "cache" not in path.parts]
    answer = fedveil(*words, cwd=cwd, **environment)
    assert answer.returncode == code, answer.stdout + answer.stderr
    assert "Traceback" not in answer.stderr
    assert "error " in answer.stderr
    assert [path for path in sorted(cwd.rglob("*")) if "cache" not in path.parts] == before
    return answer.stderr


def test_run_trains_digits_and_leaves_a_record(tmp_path) -> None:
    answer = fedveil("run", *FAST, cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert "round 2/2" in answer.stdout
    assert "test     accuracy" in answer.stdout
    (record,) = (tmp_path / "runs").iterdir()
    assert (record / "plots" / "accuracy.png").stat().st_size > 10_000


def test_json_is_the_only_thing_on_standard_output(tmp_path) -> None:
    answer = fedveil("run", "digits", *FAST, "--json", "--seed", 3, "--out", "here", cwd=tmp_path)
    summary = json.loads(answer.stdout)
    promised = (
        """run_dir rounds test_accuracy test_loss seconds model_sha256 bytes_up bytes_down engine device protection"""
    )
    assert set(promised.split()) <= set(summary)
    assert summary["run_dir"] == "here"
    assert summary["rounds"] == 2
    assert "round 2/2" in answer.stderr
    hashed = subprocess.run(
        ["sha256sum", "here/model.safetensors"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert hashed.stdout.split()[0] == summary["model_sha256"]


def test_quiet_prints_nothing(tmp_path) -> None:
    answer = fedveil("run", *FAST, "--quiet", cwd=tmp_path)
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, "", "")


def test_show_prints_settings_that_run_again_from_a_file(tmp_path) -> None:
    shown = fedveil("run", "mnist-2nn", "--show", "--set", "seed=5", cwd=tmp_path).stdout
    (tmp_path / "mine.toml").write_text(shown)
    assert fedveil("run", "mine.toml", "--show", cwd=tmp_path).stdout == shown
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "kind", ["presets", "datasets", "partitions", "metrics", "models", "strategies", "protections"]
)
def test_list_names_every_part(kind, tmp_path) -> None:
    from fedveil.catalog import TABLES

    answer = fedveil("list", kind, cwd=tmp_path)
    assert all(name in answer.stdout for name in TABLES[kind])


def test_data_show_draws_and_lists_who_holds_what(tmp_path) -> None:
    answer = fedveil("data", "show", "digits", "--set", "data.partition=classes", cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert "classes a client: 2 to 2" in " ".join(answer.stdout.split())
    assert (tmp_path / "partition-digits.png").stat().st_size > 10_000


def test_data_list_and_check_say_where_files_are(tmp_path, real_data) -> None:
    listed = fedveil("data", "list", cwd=tmp_path)
    assert "train-images-idx3-ubyte.gz" in listed.stdout
    told = {
        (one["dataset"], one["file"]): one for one in json.loads(fedveil("data", "list", "--json", cwd=tmp_path).stdout)
    }
    for path in (one["path"] for one in told.values() if one["path"]):
        assert Path(path).exists()
        assert f"  {path}\n" in listed.stdout  # whole, on a line
    assert told["digits", None]["here"]
    checked = fedveil("data", "check", "mnist", cwd=tmp_path)
    assert checked.stdout.count("ok ") == 4, checked.stderr


def test_ctrl_c_stops_after_the_message_in_flight_and_resume_ends_at_the_same_bytes(tmp_path) -> None:
    whole = json.loads(fedveil("run", "--json", "--out", "whole", cwd=tmp_path).stdout)
    process = subprocess.Popen(
        [sys.executable, "-m", "fedveil", "run", "--out", "cut"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )  # fmt: skip
    deadline = time.monotonic() + 120
    rows = tmp_path / "cut" / "metrics.csv"
    while not (rows.exists() and rows.read_text().count("\n") > 4) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "go on with: fedveil resume cut" in errors
    resumed = json.loads(fedveil("resume", "cut", "--json", cwd=tmp_path).stdout)
    assert resumed["model_sha256"] == whole["model_sha256"]
    assert rows.read_bytes() == (tmp_path / "whole" / "metrics.csv").read_bytes()


BAD_SETTINGS = [
    (["run", "digitz"], "no preset is called 'digitz'; did you mean 'digits'?"),
    (["run", "nothere.toml"], "cannot read the settings file nothere.toml"),
    (["run", "--set", "training.epoch=3"], "did you mean 'training.epochs'"),
    (["run", "--set", "training.epochs=many"], "training.epochs = 'many': must be a whole number"),
    (["run", "--set", "training.epochs"], "must be KEY=VALUE"),
    (["run", "--set", "data.clients=0"], "data.clients = 0"),
    (["run", "--set", "training.learning_rate=-0.1"], "must be greater than 0"),
    (["run", "--set", "federation.cohort=99"], "larger than the population"),
    (["run", "--set", "data.dataset=mnits"], "did you mean 'mnist'"),
    (["run", "--set", "model.name=mpl"], "did you mean 'mlp'"),
    (["run", "--set", "federation.strategy=fedavgg"], "did you mean 'fedavg"),
    (["run", "--engine", "warp"], "engine = 'warp': must be 'auto', 'batched', 'sequential', 'processes' or 'ray'"),
    (["run", "--device", "tpu"], "device = 'tpu'"),
    (["run", "--set", "data.clients=5000"], "data.clients = 5,000: more clients than the 1,438 training examples"),
    (["run", "--set", "data.min_examples=999"], "data.min_examples"),
    (
        ["run", "--set", "model.name=lstm"],
        "is for classification of text, and the task of the data is classification of images",
    ),
    (["run", "--set", "model.normalization=batch"], "Use 'layer'"),
    (["resume", "nowhere"], "is not the folder of a run"),
    (["resume", "nowhere", "--on", "localhost", "--rounds", "3"], "not with --on"),
    (["show", "partition", "iid"], "did you mean 'partitions'"),
    (["show", "partitions", "idd"], "did you mean 'iid'"),
    (["app", "nowhere"], "is not the folder of a Flower app"),
    (["run", "--data-dir", "nowhere"], "is not a folder"),
    (["run", "--set", "privacy.protection=mine:secret"], "no protection is called 'mine:secret'"),
    (["run", "--set", "model.name=nowhere:factory"], "cannot be loaded (ModuleNotFoundError"),
    (["run", "digits", "--resume", "nowhere"], "digits: not with `fedveil resume`"),
    (["data", "show", "--out", "picture.foo"], "must end in .png"),
    (["list", "model"], "did you mean 'models'"),
    (["data", "fetch", "mnits"], "did you mean 'mnist'"),
    (["data", "show", "digitz"], "did you mean 'digits'"),
]


@pytest.mark.parametrize(("words", "said"), BAD_SETTINGS, ids=[" ".join(words) for words, _ in BAD_SETTINGS])
def test_bad_settings_end_in_one_message_with_exit_code_2(words, said, tmp_path) -> None:
    assert said in refused(*words, cwd=tmp_path)


@pytest.mark.skipif("__import__('torch').cuda.is_available()")
def test_cuda_without_a_gpu_is_refused(tmp_path) -> None:
    assert "PyTorch finds no CUDA device" in refused("run", "--device", "cuda", cwd=tmp_path)


def test_an_output_folder_that_exists_or_cannot_be_written_is_refused(tmp_path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    assert "exists already" in refused("run", "--out", "taken", cwd=tmp_path)
    assert "cannot be written" in refused("run", "--out", "taken/file/run", cwd=tmp_path)


def test_divergence_ends_with_exit_code_1_and_keeps_the_record(tmp_path) -> None:
    words = ["--set", "training.learning_rate=1e30", "--set", "model.activation=leaky_relu", "--out", "run"]
    answer = fedveil("run", *words, cwd=tmp_path)
    assert answer.returncode == 1
    assert "round 1: training diverged: client" in answer.stderr
    assert "kept: the model and metrics of rounds up to 0, in run" in answer.stderr
    assert (tmp_path / "run" / "metrics.csv").exists()


def test_missing_data_says_which_file_goes_where_and_what_was_tried(tmp_path) -> None:
    # a proxy that refuses connections: what being offline looks like, wherever the test runs
    offline = {
        "http_proxy": "http://127.0.0.1:9",
        "https_proxy": "http://127.0.0.1:9",
        "FEDVEIL_DATA": str(tmp_path / "cache"),
    }
    said = refused("run", "mnist-mlp", cwd=tmp_path, **offline)
    assert "train-images-idx3-ubyte.gz" in said
    assert "FEDVEIL_DATA" in said


def damage_truncate(folder: Path) -> None:
    path = folder / "mnist" / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:100_000])


def damage_swap(folder: Path) -> None:
    shutil.copy(folder / "mnist" / "t10k-labels-idx1-ubyte.gz", folder / "mnist" / "train-labels-idx1-ubyte.gz")


@pytest.mark.parametrize("damage", [damage_truncate, damage_swap])
def test_damaged_data_is_named_with_its_checksum(damage, real_data, tmp_path) -> None:
    shutil.copytree(real_data / "mnist", tmp_path / "cache" / "given" / "mnist")
    given = tmp_path / "cache" / "given"
    for path in given.rglob("*"):
        path.chmod(0o755)
    damage(given)
    said = refused("run", "mnist-mlp", "--data-dir", given, cwd=tmp_path)
    assert "is not the published file: expected" in said
    assert "SHA-256" in said


OWN = ["run", "--set", "data.dataset=own", "--set", "data.clients=2", "--set", "federation.cohort=2"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "the file is empty"),
        ("label,words\nspam,hello\n", "name the column of text 'text'"),
        ("label,a,b\nx,1,2\ny,,3\n", "line 3, column a"),
    ],
)
def test_a_users_csv_that_cannot_be_used_is_explained(content, said, tmp_path) -> None:
    (tmp_path / "my.csv").write_text(content)
    assert said in refused(*OWN, "--set", "data.path=my.csv", cwd=tmp_path)


def test_a_label_never_seen_in_training_is_named(tmp_path) -> None:
    (tmp_path / "train.csv").write_text("label,a\n" + "x,1\ny,2\n" * 10)
    (tmp_path / "test.csv").write_text("label,a\nx,1\nz,2\n")
    said = refused(*OWN, "--set", "data.path=train.csv", "--set", "data.test_path=test.csv", cwd=tmp_path)
    assert "'z'" in said


def test_a_users_own_csv_and_network_train(tmp_path) -> None:
    rng = np.random.default_rng(0)
    rows = [f"{'yes' if a + b > 1 else 'no'},{a:.4f},{b:.4f}" for a, b in rng.random((400, 2))]
    (tmp_path / "my.csv").write_text("label,a,b\n" + "\n".join(rows) + "\n")
    (tmp_path / "my_model.py").write_text(
        "from torch import nn\n\ndef factory(task, settings):\n"
        "    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, len(task.classes)))\n"
    )
    words = [
        "--set",
        "data.path=my.csv",
        "--set",
        "model.name=my_model:factory",
        "--set",
        "training.epochs=5",
        "--json",
    ]
    answer = fedveil(*OWN, *words, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert json.loads(answer.stdout)["test_accuracy"] > 0.9, answer.stderr


def test_a_record_of_other_data_than_a_presets_does_not_bear_its_name(tmp_path) -> None:
    """`spam-demo` is made up; a user's mail is not."""
    rows = [f"{'spam' if i % 3 else 'ham'},word{i % 7} and {i}" for i in range(90)]
    (tmp_path / "my mail.csv").write_text("label,text\n" + "\n".join(rows) + "\n")
    own = (
        "--set",
        "data.dataset=own",
        "--set",
        "data.path=my mail.csv",
        "--set",
        "data.clients=3",
        "--set",
        "federation.cohort=3",
    )
    answer = fedveil("run", "spam-demo", *own, *FAST, cwd=tmp_path)
    assert "spam-demo" not in answer.stdout, answer.stdout
    assert "(precision, recall and F1 are of 'spam')" in answer.stdout
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("my-mail-")
    assert 'name = "my-mail"' in fedveil("run", "spam-demo", *own, "--show", cwd=tmp_path).stdout
    assert 'name = "mine"' in fedveil("run", "spam-demo", *own, "--set", "name=mine", "--show", cwd=tmp_path).stdout
    assert 'name = "mnist"' in fedveil("run", "digits", "--set", "data.dataset=mnist", "--show", cwd=tmp_path).stdout
    assert 'name = "digits"' in fedveil("run", "digits", *FAST, "--show", cwd=tmp_path).stdout


def test_the_command_finds_a_users_network_beside_it(tmp_path) -> None:
    (tmp_path / "mine.py").write_text("def factory(task, settings):\n    return 3\n")
    (tmp_path / "broken.py").write_text("def factory(:\n")
    command = [str(Path(sys.executable).with_name("fedveil")), "run", "--set"]
    for module, said in (
        ("mine", "it returned int, not a torch.nn.Module"),
        ("broken", "cannot be loaded (SyntaxError"),
    ):
        answer = subprocess.run(
            [*command, f"model.name={module}:factory"], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
        )  # fmt: skip
        assert answer.returncode == 2, answer.stderr
        assert said in answer.stderr


def test_a_killed_run_leaves_a_readable_record_and_goes_on_to_the_same_bytes(tmp_path) -> None:
    import pandas as pd
    from safetensors.numpy import load_file

    whole = json.loads(fedveil("run", *KILLED, "--json", "--out", "whole", cwd=tmp_path).stdout)
    process = subprocess.Popen(
        [sys.executable, "-m", "fedveil", "run", *KILLED, "--quiet", "--out", "cut"], cwd=tmp_path
    )
    rows, deadline = tmp_path / "cut" / "metrics.csv", time.monotonic() + 120
    while not (rows.exists() and rows.read_text().count("\n") > 4) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert len(pd.read_csv(rows)) >= 4
    assert load_file(tmp_path / "cut" / "model.safetensors")
    resumed = json.loads(fedveil("resume", "cut", "--json", cwd=tmp_path).stdout)
    assert resumed["model_sha256"] == whole["model_sha256"]
    assert rows.read_bytes() == (tmp_path / "whole" / "metrics.csv").read_bytes()


def test_an_unpacked_data_set_is_as_good_as_a_packed_one(real_data, tmp_path) -> None:
    folder = tmp_path / "cache" / "plain" / "mnist"
    folder.mkdir(parents=True)
    for path in (real_data / "mnist").iterdir():
        (folder / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    answer = fedveil("data", "show", "mnist-mlp", "--data-dir", folder.parent, cwd=tmp_path)
    assert "60,000 training examples" in answer.stdout, answer.stderr


def test_the_old_spelling_of_the_benchmarks_says_the_new_one(tmp_path) -> None:
    assert "run: python -m benchmarks j1 --json" in refused("bench", "j1", "--json", cwd=tmp_path)
    assert "bench" not in fedveil("--help", cwd=tmp_path).stdout


def test_the_old_spellings_do_the_same_and_say_the_new_ones(tmp_path) -> None:
    assert fedveil("run", *FAST, "--out", "short", "--quiet", cwd=tmp_path).returncode == 0
    answer = fedveil("run", "--resume", "short", "--json", "--quiet", cwd=tmp_path)
    assert answer.stderr == "note     `fedveil run --resume` is now: fedveil resume short\n"
    assert json.loads(answer.stdout) == json.loads(fedveil("resume", "short", "--json", cwd=tmp_path).stdout)
    app = Path(__file__).parents[1] / "apps" / "plain_flower"
    words = ["--set", f"output={tmp_path / 'out.json'}", "--clients", 2, "--json"]
    answer = fedveil("run", "--app", app, *words, cwd=tmp_path)
    assert f"`fedveil run --app` is now: fedveil app {app}" in answer.stderr
    assert json.loads(answer.stdout)["clients"] == 2
    nobody = "127.0.0.1:9"
    said = refused("run", "digits", "--on", nobody, cwd=tmp_path, code=1)
    assert f"`fedveil run --on` is now: fedveil submit digits --on {nobody}" in said
    assert "no server answers there" in said
    said = refused("run", "--on", nobody, "--resume", "digits-1", cwd=tmp_path, code=1)
    assert f"is now: fedveil resume digits-1 --on {nobody}" in said
    helped = fedveil("run", "--help", cwd=tmp_path).stdout
    assert not any(word in helped for word in ("--resume", "--app", "--on ", "--clients"))


def test_a_finished_run_is_lengthened_and_its_record_says_so(tmp_path) -> None:
    short = ["--set", "federation.rounds=2", "--quiet"]
    assert fedveil("run", *short, "--out", "short", cwd=tmp_path).returncode == 0
    whole = json.loads(fedveil("run", "--set", "federation.rounds=4", "--out", "whole", "--json", cwd=tmp_path).stdout)
    longer = json.loads(fedveil("resume", "short", "--rounds", 4, "--json", cwd=tmp_path).stdout)
    assert longer["rounds"] == 4
    assert longer["model_sha256"] == whole["model_sha256"]
    same = [(tmp_path / folder / "experiment.toml").read_text() for folder in ("short", "whole")]
    assert same[0] == same[1]
    (resumed,) = json.loads((tmp_path / "short" / "environment.json").read_text())["resumes"]
    assert (resumed["after"], resumed["rounds"]) == (2, [2, 4])
    assert resumed["command"] == ["fedveil", "resume", "short", "--rounds", "4", "--json"]
    assert {"started", "versions", "commit"} <= set(resumed)


def test_submit_shows_its_settings_and_asks_a_server(tmp_path) -> None:
    shown = fedveil("submit", "digits", "--set", "seed=4", "--show", cwd=tmp_path).stdout
    assert shown == fedveil("run", "digits", "--seed", 4, "--show", cwd=tmp_path).stdout
    assert "no server answers there" in refused("submit", "--on", "127.0.0.1:9", cwd=tmp_path, code=1)


@pytest.mark.parametrize("kind", ["presets", "datasets", "models", "attacks"])
def test_list_as_json_is_every_name_with_its_line(kind, tmp_path) -> None:
    from fedveil.catalog import TABLES

    assert json.loads(fedveil("list", kind, "--json", cwd=tmp_path).stdout) == dict(TABLES[kind])
    assert json.loads(fedveil("list", "--json", cwd=tmp_path).stdout)[kind] == dict(TABLES[kind])


def test_show_tells_a_parts_settings_with_their_defaults_and_ranges(tmp_path) -> None:
    (tmp_path / "mine.py").write_text(
        "from typing import Literal\n"
        "from pydantic import Field\n"
        "from fedveil.core.declaration import part\n"
        "from fedveil.core.settings.section import Section\n\n"
        "class Trim(Section):\n"
        "    fraction: float = Field(0.2, ge=0, lt=0.5, description='cut off at each end')\n"
        "    side: Literal['both', 'top'] = 'both'\n"
        "    least: int | None = None\n\n"
        "@part(Trim, needs='each', tasks=('classification',))\n"
        "def trimmed(settings): ...\n"
    )
    lines = [
        " ".join(line.split())
        for line in fedveil("show", "strategies", "mine:trimmed", cwd=tmp_path).stdout.splitlines()
    ]
    assert lines == [
        "mine:trimmed your own",
        "needs each",
        "tasks classification",
        "settings of its own",
        "fraction 0.2 a number at least 0, below 0.5 cut off at each end",
        'side "both" "both", "top"',
        "least null a whole number or nothing",
    ]


@pytest.mark.parametrize(
    ("kind", "name", "said"),
    [
        ("strategies", "krum", "the one update closest to its neighbours"),
        ("protections", "none", "updates travel in the clear"),
        ("attacks", "words", "cites  Trask 2019"),
        ("presets", "digits", "[federation]"),
    ],
)
def test_show_tells_what_a_part_is(kind, name, said, tmp_path) -> None:
    answer = fedveil("show", kind, name, cwd=tmp_path)
    assert answer.stdout.startswith(f"{name}  ")
    assert said in answer.stdout


def test_the_schema_has_every_setting_with_its_type_and_description(tmp_path) -> None:
    from fedveil.core.settings.experiment import known_keys

    found = json.loads(fedveil("schema", cwd=tmp_path).stdout)
    for key, description in known_keys().items():
        places = [found]
        for name in key.split("."):
            inside = [place["properties"][name] for place in places if name in place.get("properties", {})]
            assert inside, key
            resolved = [
                found["$defs"][place["$ref"].rpartition("/")[2]] if "$ref" in place else place for place in inside
            ]
            # a part is a name, or a table of a name and settings, one for each part
            tables = [table for place in resolved for table in place.get("anyOf", []) if "properties" in table]
            places = [*resolved, *tables]
        assert any({"type", "anyOf", "enum", "const"} & set(place) for place in places), key
        words = [place.get("description", "") for place in places]
        assert any(word and word in description for word in words) or key == "model.name", key


def test_version_names_what_computes(tmp_path) -> None:
    from fedveil import __version__

    assert fedveil("version", cwd=tmp_path).stdout.startswith(f"fedveil {__version__}\n")
    assert set(json.loads(fedveil("version", "--json", cwd=tmp_path).stdout)) >= {"fedveil", "python", "flwr", "torch"}
