"""plain-flower: the server."""

import json
from pathlib import Path

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from plain.task import Net

app = ServerApp()


@app.lifespan()
def lifespan(context: Context):
    print("plain-flower begins")
    yield
    print("plain-flower ends")


@app.main()
def main(grid: Grid, context: Context) -> None:
    torch.manual_seed(1)
    strategy = FedAvg(fraction_train=context.run_config["fraction-train"])
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(Net().state_dict()),
        train_config=ConfigRecord({"lr": context.run_config["local.learning-rate"]}),
        num_rounds=context.run_config["num-server-rounds"],
    )

    if context.run_config["output"]:
        found = {
            "weights": {name: value.tolist() for name, value in result.arrays.to_torch_state_dict().items()},
            "train": {number: dict(metrics) for number, metrics in result.train_metrics_clientapp.items()},
            "evaluate": {number: dict(metrics) for number, metrics in result.evaluate_metrics_clientapp.items()},
        }
        Path(context.run_config["output"]).write_text(json.dumps(found))
