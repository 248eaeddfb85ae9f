"""The parties of somebody else's Flower app are as apart as processes are: generators, time-outs, ids, waiting."""

from __future__ import annotations

import json
import random
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.flower_apps import make_app

from fedveil.core.errors import FedveilError, SettingsError
from fedveil.simulations import apps
from fedveil.simulations.apps import run_app

OUTPUT = "output = ''"


@pytest.fixture(autouse=True)
def no_flower_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flower-home"))


def told(app: Path, **options: Any) -> Any:
    """What the app's server wrote."""
    output = app.parent / "said.json"
    run_app(app, {"output": str(output)}, **options)
    return json.loads(output.read_text())


DRAWING = """
    import random, numpy, torch

    def draw():
        return [random.random(), float(numpy.random.rand()), torch.rand(1).item()]

    @client.query()
    def query(message, context):
        {seeds}
        return Message(RecordDict({{"drawn": MetricRecord({{"d": draw()}})}}), reply_to=message)

    @server.main()
    def main(grid, context):
        own, theirs = [], []
        for _ in range(3):
            replies = grid.send_and_receive(ask(grid.get_node_ids()))
            theirs.append([list(reply.content["drawn"]["d"]) for reply in replies])
            own.append(draw())
        open(context.run_config["output"], "w").write(json.dumps([own, theirs]))
"""


@pytest.mark.parametrize("seed", [None, 3])
def test_a_client_that_seeds_the_global_generators_leaves_the_servers_alone(seed: int | None, tmp_path: Path) -> None:
    seeds = "random.seed(42); numpy.random.seed(42); torch.manual_seed(42)"
    own, theirs = told(make_app(tmp_path / "app", DRAWING.format(seeds=seeds), OUTPUT), clients=2, seed=seed)
    assert len({tuple(drawn) for drawn in own}) == 3  # the server draws others in each round
    assert all(len({drawn[i] for drawn in own}) == 3 for i in range(3))
    assert all(drawn == theirs[0][0] for drawings in theirs for drawn in drawings)


def test_each_client_goes_on_with_generators_of_its_own(tmp_path: Path) -> None:
    app = make_app(tmp_path / "app", DRAWING.format(seeds="pass"), OUTPUT)
    state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    own, theirs = told(app, clients=2, seed=1)
    again = told(app, clients=2, seed=1)
    assert again == [own, theirs]
    assert (random.getstate(), np.random.get_state()[1].tolist()) == state[:2]
    assert torch.equal(torch.get_rng_state(), state[2])
    drawn = [value for drawings in [own, *theirs] for values in drawings for value in values]
    assert len(set(drawn)) == len(drawn) == 3 * 3 + 3 * 2 * 3
    assert told(app, clients=2) != told(app, clients=2)
    # the first client draws the same whoever else is there
    assert [round_of[0] for round_of in told(app, clients=3, seed=1)[1]] == [round_of[0] for round_of in theirs]


def test_a_seed_at_import_is_every_clients_as_in_a_process_of_its_own(tmp_path: Path) -> None:
    app = make_app(tmp_path / "app", "    import torch; torch.manual_seed(7)\n" + DRAWING.format(seeds="pass"), OUTPUT)
    (app / "one_file.py").rename(app / "task.py")
    (app / "one_file.py").write_text("from task import client, server\n")
    _, theirs = told(app, clients=2)
    torch_drawn = [[drawn[2] for drawn in drawings] for drawings in theirs]
    generator = torch.Generator().manual_seed(7)
    expected = [torch.rand(1, generator=generator).item() for _ in range(3)]
    assert torch_drawn == [[value, value] for value in expected]
    assert theirs[0][0][0] != theirs[0][1][0]  # Python's generator was not seeded
    assert "noticing" not in repr(torch.manual_seed)


def test_flowers_server_side_noise_differs_from_round_to_round(tmp_path: Path) -> None:
    """Public report: with np.random.seed in a client, each round added the same noise."""
    app = make_app(tmp_path / "app", """
        import numpy as np
        from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg

        seen = []

        @client.train()
        def train(message, context):
            np.random.seed(42)
            metrics = MetricRecord({"num-examples": 1})
            arrays = ArrayRecord([array + 1 for array in message.content["arrays"].to_numpy_ndarrays()])
            return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

        def keep(number, arrays):
            seen.append(arrays.to_numpy_ndarrays()[0].tolist())

        @server.main()
        def main(grid, context):
            inner = FedAvg(fraction_evaluate=0.0)
            strategy = DifferentialPrivacyServerSideFixedClipping(inner, 1.0, 1.0, 2)
            strategy.start(grid, ArrayRecord([np.zeros(4)]), num_rounds=3, evaluate_fn=keep)
            open(context.run_config["output"], "w").write(json.dumps(seen))
    """, OUTPUT)  # fmt: skip
    models = np.array(told(app, clients=2, seed=5))
    steps = np.diff(models, axis=0)  # of each round: 1 / 2, which is the clipped update, and the noise
    assert len(steps) == 3
    assert np.abs(np.diff(steps, axis=0)).max(axis=1).min() > 1e-3


def test_replies_after_the_time_out_are_left_out(tmp_path: Path) -> None:
    app = make_app(tmp_path / "app", """
        import time

        @client.query()
        def query(message, context):
            if context.node_config["partition-id"] == 1:
                time.sleep(0.4)
            return Message(RecordDict(), reply_to=message)

        @server.main()
        def main(grid, context):
            found = [
                [reply.metadata.src_node_id for reply in grid.send_and_receive(ask(grid.get_node_ids()), timeout=seconds)]
                for seconds in (None, 0.3, 30)
            ]
            open(context.run_config["output"], "w").write(json.dumps(found))
    """, OUTPUT)  # fmt: skip
    assert told(app, clients=3) == [[1, 2, 3], [1, 3], [1, 2, 3]]


def test_messages_come_from_node_1_and_what_is_no_reply_is_error_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    app = make_app(tmp_path / "app", """
        kept = []

        @client.query()
        def query(message, context):
            kept.append(Message(RecordDict(), reply_to=message))
            match context.node_config["partition-id"]:
                case 0:
                    return kept[-1]
                case 1:
                    return Message(RecordDict(), dst_node_id=1, message_type="query")
                case 2:
                    return kept[0]  # a reply to another message
            return None

        @server.main()
        def main(grid, context):
            messages = ask(grid.get_node_ids())
            replies = grid.send_and_receive(messages)
            found = [[m.metadata.src_node_id for m in messages], [r.metadata.dst_node_id for r in replies],
                     [r.error.code if r.has_error() else None for r in replies], context.node_id]
            open(context.run_config["output"], "w").write(json.dumps(found))
    """, OUTPUT)  # fmt: skip
    assert told(app, clients=4) == [[1] * 4, [1] * 4, [None, 2, 2, 2], 0]
    assert capsys.readouterr().err.count("returned a Message that is no reply to its own; make it with reply_to") == 2


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apps, "PATIENCE", 0.2)


@pytest.mark.usefixtures("impatient")
def test_a_thread_that_asks_for_nodes_while_the_server_works_does_not_end_the_run(tmp_path: Path) -> None:
    """Flower's older interface asks on a thread of its own, every five seconds, however long an evaluation takes."""
    app = make_app(tmp_path / "app", """
        import threading, time

        @client.query()
        def query(message, context):
            return Message(RecordDict(), reply_to=message)

        @server.main()
        def main(grid, context):
            asked = []
            def ask_again():
                for _ in range(12):
                    asked.append(len(list(grid.get_node_ids())))
                    time.sleep(0.05)
            thread = threading.Thread(target=ask_again)
            thread.start()
            thread.join()
            replies = list(grid.send_and_receive(ask(grid.get_node_ids())))
            open(context.run_config["output"], "w").write(json.dumps([asked, len(replies)]))
    """, OUTPUT)  # fmt: skip
    assert told(app, clients=2) == [[2] * 12, 2]


@pytest.mark.usefixtures("impatient")
def test_a_server_that_computes_between_its_questions_does_not_wait(tmp_path: Path) -> None:
    app = make_app(tmp_path / "app", """
        import time

        @server.main()
        def main(grid, context):
            for _ in range(10):
                grid.get_node_ids()
                end = time.process_time() + 0.06
                while time.process_time() < end:
                    sum(range(1000))
            open(context.run_config["output"], "w").write("true")
    """, OUTPUT)  # fmt: skip
    assert told(app, clients=2) is True


@pytest.mark.usefixtures("impatient")
def test_a_server_of_the_older_interface_that_waits_in_vain_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flwr.server.compat import app_utils

    class Quick(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:  # Flower asks every five seconds
            return super().wait(0.1 if timeout == 5 else timeout)

    monkeypatch.setattr(app_utils.threading, "Event", Quick)
    app = make_app(tmp_path / "app", """
        from flwr.client import NumPyClient
        from flwr.server import ServerAppComponents, ServerConfig
        from flwr.server.strategy import FedAvg

        client = ClientApp(client_fn=lambda context: NumPyClient().to_client())

        def components(context):
            return ServerAppComponents(strategy=FedAvg(min_available_clients=7), config=ServerConfig(num_rounds=1))

        server = ServerApp(server_fn=components)
    """)  # fmt: skip
    started = time.monotonic()
    with pytest.raises(FedveilError, match="waits for more clients, and there are 3; give it more with --clients"):
        run_app(app, clients=3)
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("statement", ["import flwr.client.typing", "from flwr.client import NothingOfTheKind"])
def test_an_app_for_another_flower_says_for_which_it_was_written(statement: str, tmp_path: Path) -> None:
    app = make_app(
        tmp_path / "app",
        statement,
        more="[project]\nname = 'a'\nversion = '1'\ndependencies = ['torch', 'flwr[simulation]>=1.5.0,<1.6']\n",
    )
    with pytest.raises(
        SettingsError,
        match=r"another Flower: .*one_file.py, line \d+\)\n  Flower 1.41.0 is installed here, .* flwr >=1.5.0,<1.6;",
    ) as caught:
        run_app(app)
    assert "pip" not in str(caught.value)
    assert "one_file" not in sys.modules
