"""Somebody else's Flower app runs unmodified in this process, and gives what Flower's own runtime gives."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import prepared
from helpers.flower_apps import make_app

from fedveil.core.errors import FedveilError, SettingsError
from fedveil.simulations.apps import run_app

PLAIN = Path(__file__).parents[1] / "apps" / "plain_flower"
TOLERANCE = 1e-6  # float32 weights and float64 means, summed in another order


@pytest.fixture(autouse=True)
def no_flower_configuration(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flower-home"))


def fedveil(*words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return prepared.fedveil("app", *words, cwd=cwd)


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra fedveil[ray]")
def test_an_unmodified_app_gives_what_flowers_own_runtime_gives(superlink, tmp_path) -> None:
    theirs, ours = tmp_path / "theirs.json", tmp_path / "ours.json"
    answer = subprocess.run(
        ["flwr", "run", str(PLAIN), "--stream", "--run-config", f'output="{theirs}"', "--federation-config", "num-supernodes=4"],
        cwd=tmp_path, env=superlink, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert theirs.exists(), answer.stdout[-3000:] + answer.stderr + (tmp_path / "superlink.log").read_text()[-3000:]

    own = fedveil(PLAIN, "--clients", 4, "--set", f"output={ours}", "--json", cwd=tmp_path)
    assert own.returncode == 0, own.stderr
    summary = json.loads(own.stdout)
    assert (summary["clients"], summary["messages"], summary["failures"]) == (4, 24, 0)
    assert summary["bytes_down"] > summary["bytes_up"] > 12 * 4 * 195  # twelve replies with 195 weights
    assert "ROUND 3/3" in own.stderr
    assert "plain-flower ends" in own.stderr

    flower, engine = json.loads(theirs.read_text()), json.loads(ours.read_text())
    assert flower["weights"].keys() == engine["weights"].keys()
    for name, weights in flower["weights"].items():
        np.testing.assert_allclose(engine["weights"][name], weights, rtol=TOLERANCE, atol=TOLERANCE)
    for kind in ("train", "evaluate"):
        assert list(flower[kind]) == list(engine[kind]) == ["1", "2", "3"]
        for number, metrics in flower[kind].items():
            assert engine[kind][number] == pytest.approx(metrics, rel=TOLERANCE, abs=TOLERANCE)
    assert engine["train"]["3"]["visits"] == 3


def test_a_failing_client_answers_with_an_error_and_the_run_goes_on(tmp_path, capsys) -> None:
    app = make_app(tmp_path / "app", """
        @client.query()
        def query(message, context):
            seen = context.state["seen"]["n"] if "seen" in context.state else 0
            context.state["seen"] = MetricRecord({"n": seen + 1})
            message.content["given"]["n"] = 99  # its own copy: no other client may see this
            if context.node_config["partition-id"] == 1 and seen == 1:
                raise ValueError("a bad\\nday")
            if context.node_config["partition-id"] == 2:
                raise SystemExit(3)
            found = {"n": seen, "partitions": context.node_config["num-partitions"]}
            return Message(RecordDict({"found": MetricRecord(found)}), reply_to=message)

        @server.main()
        def main(grid, context):
            said = []
            given = MetricRecord({"n": 1})
            for _ in range(4):
                replies = grid.send_and_receive(ask([*grid.get_node_ids(), 77], given=given))
                said.append([r.error.code if r.has_error() else r.content["found"]["n"] for r in replies])
            assert given["n"] == 1
            open(context.run_config["output"], "w").write(json.dumps(said))
    """, "output = 'said.json'")  # fmt: skip
    summary = run_app(app, {"output": str(tmp_path / "said.json")}, clients=3)
    # client 1 forgets what it did in the call that failed, so it fails again, as it would in Flower's runtime
    assert json.loads((tmp_path / "said.json").read_text()) == [[0, 0, 2, 5], [1, 2, 2, 5], [2, 2, 2, 5], [3, 2, 2, 5]]
    assert (summary["messages"], summary["failures"]) == (16, 11)
    said = capsys.readouterr().err
    line = (app / "one_file.py").read_text().splitlines().index('        raise ValueError("a bad\\nday")') + 1
    assert f"client 1 failed: ValueError: a bad day ({app / 'one_file.py'}, line {line})\n" in said
    assert "client 2 failed: SystemExit: 3" in said
    assert "client 76 failed: there is no node 77; the nodes are 1 to 3\n" in said


def test_pushed_messages_are_answered_by_replies_that_name_them(tmp_path) -> None:
    app = make_app(tmp_path / "app", """
        @client.query()
        def query(message, context):
            return Message(message.content, reply_to=message)

        @server.main()
        def main(grid, context):
            messages = ask(grid.get_node_ids())
            ids = list(grid.push_messages(messages))
            assert len(set(ids)) == 3
            assert ids == [message.metadata.message_id for message in messages]
            assert [r.metadata.reply_to_message_id for r in grid.pull_messages(ids[1:])] == ids[1:]
            again = list(grid.push_messages(messages))
            assert not set(again) & set(ids)
            replies = {r.metadata.reply_to_message_id: r.metadata.src_node_id for r in grid.pull_messages(ids + again)}
            assert replies == {ids[0]: 1, again[0]: 1, again[1]: 2, again[2]: 3}
    """)  # fmt: skip
    assert run_app(app, clients=3)["messages"] == 6


def test_an_app_of_flowers_older_interface_runs(tmp_path) -> None:
    app = make_app(tmp_path / "app", """
        import numpy as np
        from flwr.client import NumPyClient
        from flwr.common import ndarrays_to_parameters
        from flwr.server import ServerAppComponents, ServerConfig
        from flwr.server.strategy import FedAvg

        class Client(NumPyClient):
            def __init__(self, number):
                self.number = number
            def fit(self, parameters, config):
                return [array + self.number for array in parameters], 1, {}
            def evaluate(self, parameters, config):
                return float(parameters[0][0]), 1, {}

        def end(number, parameters, config):
            print("model", number, [round(value, 9) for value in parameters[0].tolist()])  # summed in any order

        client = ClientApp(client_fn=lambda context: Client(context.node_config["partition-id"]).to_client())

        def components(context):
            strategy = FedAvg(initial_parameters=ndarrays_to_parameters([np.zeros(2)]), evaluate_fn=end)
            return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=2))

        server = ServerApp(server_fn=components)
    """, more="[tool.flwr.federations]\ndefault = 'here'\n[tool.flwr.federations.here]\noptions.num-supernodes = 5\n")  # fmt: skip
    answer = fedveil(app, cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert "model 2 [4.0, 4.0]" in answer.stdout  # twice the mean of 0 to 4
    assert "done     20 messages to 5 clients" in answer.stdout


def test_apps_with_modules_of_the_same_names_do_not_meet_and_leave_nothing(tmp_path) -> None:
    code = """
        import fedveil.word, random_words
        from core.words import word

        @server.main()
        def main(grid, context):
            from {late} import late
            open(context.run_config["output"], "a").write(f"{{fedveil.word.word}} {{word}} {{late}};")
    """
    path, modules, folder = list(sys.path), dict(sys.modules), os.getcwd()
    for name in ("one", "two"):
        app = make_app(tmp_path / name, code.format(late="core.late"), "output = ''")
        for package in ("core", "fedveil"):
            (app / package).mkdir()
            (app / package / "__init__.py").touch()
        (app / "random_words.py").touch()
        (app / "core" / "words.py").write_text(f"word = 'core-{name}'")
        (app / "core" / "late.py").write_text(f"late = 'late-{name}'")
        (app / "fedveil" / "word.py").write_text(f"word = 'fedveil-{name}'")
        run_app(app, {"output": str(tmp_path / "said")})
    assert (tmp_path / "said").read_text() == "fedveil-one core-one late-one;fedveil-two core-two late-two;"
    assert sys.path == path
    assert os.getcwd() == folder
    assert {name: sys.modules.get(name) for name in modules} == modules
    assert not {"one_file", "core", "core.words", "core.late", "random_words", "fedveil.word"} & set(sys.modules)


def test_a_seed_repeats_the_global_generators_and_puts_them_back(tmp_path) -> None:
    app = make_app(tmp_path / "app", """
        import random, numpy, torch

        @server.main()
        def main(grid, context):
            drawn = [random.random(), numpy.random.rand(), torch.rand(1).item()]
            open(context.run_config["output"], "a").write(json.dumps(drawn) + "\\n")
    """, "output = ''")  # fmt: skip
    random.seed(5)
    before = random.getstate()
    for seed in (1, 1, 2):
        run_app(app, {"output": str(tmp_path / "drawn")}, seed=seed)
    assert random.getstate() == before
    first, second, third = (tmp_path / "drawn").read_text().splitlines()
    assert first == second
    assert not set(json.loads(first)) & set(json.loads(third))


def test_settings_change_declared_keys_and_keep_their_types(tmp_path) -> None:
    app = make_app(tmp_path / "app", """
        @client.query()
        def query(message, context):
            context.run_config["rounds"] = 0  # its own copy
            return Message(RecordDict({"c": ConfigRecord(dict(context.run_config))}), reply_to=message)

        @server.main()
        def main(grid, context):
            (reply,) = grid.send_and_receive(ask([1]))
            found = [context.run_config, dict(reply.content["c"]), len(list(grid.get_node_ids()))]
            open(context.run_config["local.output"], "w").write(json.dumps(found))
    """, "rounds = 3\nfast = true\n[tool.flwr.app.config.local]\nrate = 0.5\noutput = 'x'\n")  # fmt: skip
    output = str(tmp_path / "found.json")
    run_app(app, {"rounds": 7, "local.rate": 2, "local.output": output, "fast": None})
    config = {"rounds": 7, "fast": True, "local.rate": 2.0, "local.output": output}
    assert json.loads(Path(output).read_text()) == [config, {**config, "rounds": 0}, 10]
    for settings, message in (
        ({"round": 1}, r"round: the app has no such key; did you mean 'rounds'\?\n.*rounds, fast, local.rate, local.output"),
        ({"local": 1}, "local: the app has no such key"),
        ({"rounds": True}, "rounds = True: must be a whole number, as the app's own 3; .*rounds, fast"),
        ({"rounds": 1.5}, "rounds = 1.5: must be a whole number"),
        ({"fast": 1}, "fast = 1: must be true or false"),
        ({"local.rate": "x"}, "local.rate = 'x': must be a number"),
        ({"local.output": 5}, "local.output = 5: must be text, in quotes"),
        ({"local.output": [5]}, "local.output = .5.: must be text"),
    ):  # fmt: skip
        with pytest.raises(SettingsError, match=message):
            run_app(app, settings)


def test_how_many_clients_the_configuration_says(tmp_path, monkeypatch) -> None:
    code = """
        @server.main()
        def main(grid, context):
            pass
    """
    options = "[{0}]\ndefault = 'a'\n[{0}.a]\noptions.num-supernodes = {1}\n"
    plain = make_app(tmp_path / "plain", code)
    says = make_app(tmp_path / "says", code, more=options.format("tool.flwr.federations", 4))
    home = tmp_path / "home"
    monkeypatch.setenv("FLWR_HOME", str(home))
    assert run_app(plain)["clients"] == 10
    home.mkdir()
    (home / "config.toml").write_text(options.format("superlink", 6))
    assert run_app(plain)["clients"] == 6
    assert run_app(says)["clients"] == 4
    assert run_app(says, clients=2)["clients"] == 2
    (home / "config.toml").write_text(options.format("superlink", "'many'"))
    with pytest.raises(SettingsError, match=r"config\.toml: num-supernodes = 'many': must be a whole number above 0"):
        run_app(plain)
    with pytest.raises(SettingsError, match="--clients 0: must be"):
        run_app(says, clients=0)


NOTHING = "[tool.flwr.app.components]\nserverapp = 'm:server'\nclientapp = 'm:client'\n"


@pytest.mark.parametrize(
    ("pyproject", "module", "message"),
    [
        (None, "", "is not the folder of a Flower app .it has no pyproject.toml"),
        ("[tool", "", "cannot read .*pyproject.toml"),
        ("[project]\nname = 'x'", "", "components. serverapp is missing"),
        ("[tool.flwr.app.components]\nserverapp = 'm:server'", "", "components. clientapp is missing"),
        ("[tool.flwr.app.components]\nserverapp = 'm'", "", "serverapp = 'm': must be module:attribute"),
        (NOTHING + "[tool.flwr.app.config]\nsizes = [1, 2]", "", "config. The value for key sizes needs to be"),
        (NOTHING.replace("m:", "gone.deep:"), "", "'gone.deep:server': there is no module 'gone' in"),
        (NOTHING.replace("m:", "m.deep:"), "", "there is no module 'm.deep' in"),
        (NOTHING, "import not_a_package_at_all", "needs the module 'not_a_package_at_all', which is not installed"),
        (NOTHING, "x = 1", "module 'm' has no 'server'"),
        (NOTHING, "server = 5", "'m:server': is a int, and must be a ServerApp"),
        (NOTHING, "x = 1 / 0", r"importing 'm' failed: ZeroDivisionError: division by zero \(.*m.py, line 1\)"),
        (NOTHING, "def x(:", r"importing 'm' failed: SyntaxError: invalid syntax \(m.py, line 1\)"),
    ],
)
def test_a_folder_that_is_no_app_is_refused(pyproject, module, message, tmp_path) -> None:
    if pyproject is not None:
        (tmp_path / "pyproject.toml").write_text(pyproject)
    (tmp_path / "m.py").write_text(module)
    path = list(sys.path)
    with pytest.raises(FedveilError, match=message) as caught:
        run_app(tmp_path)
    assert caught.value.exit_code == (1 if "importing" in message else 2)
    assert sys.path == path
    assert "m" not in sys.modules


@pytest.mark.parametrize(
    ("statement", "code", "message"),
    [
        ("return [][1]", 1, "the app's server failed: IndexError: list index out of range"),
        ("raise SystemExit(4)", 1, "the app's server ended with exit code 4"),
        ("raise SystemExit(0)", 0, ""),
        ("raise KeyboardInterrupt", 130, "what the app wrote is kept"),
    ],
)
def test_how_an_app_that_fails_ends(statement, code, message, tmp_path) -> None:
    app = make_app(tmp_path / "app", f"""
        @server.main()
        def main(grid, context):
            {statement}
    """)  # fmt: skip
    answer = fedveil(app, "--quiet", cwd=tmp_path)
    assert answer.returncode == code
    assert answer.stdout == ""
    assert "Traceback" not in answer.stderr
    assert message in answer.stderr
    if "IndexError" in message:
        line = (app / "one_file.py").read_text().splitlines().index("    return [][1]") + 1
        assert f"({app / 'one_file.py'}, line {line})" in answer.stderr


def test_options_that_do_not_fit_an_app_are_refused(tmp_path) -> None:
    for words in (["digits"], ["--engine", "auto"], ["--device", "cpu"], ["--out", "x"], ["--resume", "x"], ["--show"]):
        command = [sys.executable, "-m", "fedveil", "run", "--app", str(PLAIN), *words]
        answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
        assert answer.returncode == 2
        assert f"error {words[0]}: not with `fedveil app`" in answer.stderr
    command = [sys.executable, "-m", "fedveil", "run", "--clients", "4"]
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert answer.returncode == 2
    assert "--clients 4: only with `fedveil app`; use --set data.clients=4" in answer.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_app_that_waits_for_more_clients_than_there_are_is_ended(tmp_path) -> None:
    answer = fedveil(PLAIN, "--clients", 1, "--quiet", "--set", f"output={tmp_path / 'out.json'}", cwd=tmp_path)
    assert answer.returncode == 1
    assert "the app's server waits for more clients, and there are 1; give it more with --clients" in answer.stderr


def test_an_app_of_which_every_client_fails_is_a_failure(tmp_path) -> None:
    app = make_app(tmp_path / "app", """
        @client.train()
        def train(message, context):
            raise ValueError("never")

        @server.main()
        def main(grid, context):
            messages = [Message(RecordDict(), dst_node_id=node, message_type="train") for node in grid.get_node_ids()]
            print(len(list(grid.send_and_receive(messages))), "replies")
    """)  # fmt: skip
    answer = fedveil(app, "--clients", 2, cwd=tmp_path)
    assert answer.returncode == 1
    assert "2 replies" in answer.stdout
    assert answer.stderr.count("failed: ValueError: never") == 2
    assert "no client answered a 'train' message without an error; the reasons are above" in answer.stderr
