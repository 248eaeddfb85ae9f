"""The in-process grid behaves as a Flower grid: replies to their senders, contexts of their own, strategies unchanged."""

from __future__ import annotations

import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from fedveil.core.errors import Interrupted, TrainingError
from fedveil.core.wire.messages import to_arrays
from fedveil.simulations.engine.grid import InProcessGrid


def counting_app() -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message, context):
        seen = context.state.metric_records.get("seen", MetricRecord({"n": 0}))
        context.state["seen"] = MetricRecord({"n": int(seen["n"]) + 1})
        arrays = message.content["arrays"]
        metrics = {
            "num-examples": 1,
            "node": int(context.node_config["partition-id"]),
            "seen": int(context.state["seen"]["n"]),
        }
        return Message(RecordDict({"arrays": arrays, "metrics": MetricRecord(metrics)}), reply_to=message)

    @app.evaluate()
    def evaluate(message, context):
        raise ValueError(f"no data, {context.run_config['word']}")

    return app


def grid(**kwargs) -> InProcessGrid:
    return InProcessGrid(counting_app(), 5, {"word": "sorry"}, **kwargs)


def message(node: int, kind: str = "train") -> Message:
    import numpy as np

    content = RecordDict({"arrays": to_arrays({"w": np.ones(3, np.float32)}), "config": ConfigRecord()})
    return Message(content, dst_node_id=node, message_type=kind)


def test_each_node_holds_its_partition_and_keeps_its_own_state() -> None:
    engine = grid()
    for visit in (1, 2):
        replies = list(engine.send_and_receive([message(4), message(2)]))
        assert [r.metadata.src_node_id for r in replies] == [4, 2]
        assert [r.content["metrics"]["node"] for r in replies] == [3, 1]
        assert [r.content["metrics"]["seen"] for r in replies] == [visit, visit]


def test_pushed_messages_are_pulled_once() -> None:
    engine = grid()
    ids = list(engine.push_messages([message(1), message(2)]))
    assert [r.metadata.src_node_id for r in engine.pull_messages(ids[:1])] == [1]
    assert [r.metadata.src_node_id for r in engine.pull_messages(ids)] == [2]
    assert list(engine.pull_messages(ids)) == []


def test_flowers_own_loop_runs_on_it_unchanged() -> None:
    import numpy as np

    strategy = FedAvg(fraction_train=0.6, fraction_evaluate=0.0, min_train_nodes=3, min_available_nodes=5)
    result = strategy.start(grid(), ArrayRecord([np.ones(3, np.float32)]), num_rounds=2)
    assert set(result.train_metrics_clientapp) == {1, 2}


def test_a_failing_client_and_a_stop_are_said() -> None:
    with pytest.raises(TrainingError, match="client 2 failed: ValueError: no data, sorry"):
        grid().send_and_receive([message(3, "evaluate")])
    done = []
    engine = grid(stop=lambda: len(done) == 2, watch=lambda k, n: done.append((k, n)))
    with pytest.raises(Interrupted):
        engine.send_and_receive([message(n) for n in (1, 2, 3)])
    assert done == [(1, 3), (2, 3)]
