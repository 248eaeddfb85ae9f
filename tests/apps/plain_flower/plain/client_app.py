"""plain-flower: the clients."""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from plain.task import Net, load_data
from plain.task import test as test_fn
from plain.task import train as train_fn


def update_norm_mod(message: Message, context: Context, call_next) -> Message:
    """Report how far the client moved the model."""
    before = message.content["arrays"].to_torch_state_dict()
    reply = call_next(message, context)
    after = reply.content["arrays"].to_torch_state_dict()
    moved = sum(float((after[name] - before[name]).pow(2).sum()) for name in before)
    reply.content["metrics"]["update-norm"] = moved**0.5
    return reply


app = ClientApp()


def loaders(context: Context):
    return load_data(context.node_config["partition-id"], context.node_config["num-partitions"])


@app.train(mods=[update_norm_mod])
def train(message: Message, context: Context) -> Message:
    """Train on local data; the momentum of this client stays with it between rounds."""
    model = Net()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=message.content["config"]["lr"], momentum=0.9)
    if "momentum" in context.state:
        kept = context.state["momentum"].to_torch_state_dict()
        for name, parameter in model.named_parameters():
            optimizer.state[parameter]["momentum_buffer"] = kept[name]

    trainloader, _ = loaders(context)
    loss = train_fn(model, trainloader, optimizer, context.run_config["local.epochs"])

    buffers = {n: optimizer.state[p]["momentum_buffer"] for n, p in model.named_parameters()}
    context.state["momentum"] = ArrayRecord(buffers)
    visits = context.state["visits"]["n"] + 1 if "visits" in context.state else 1
    context.state["visits"] = MetricRecord({"n": visits})

    metrics = {"train_loss": loss, "num-examples": len(trainloader.dataset), "visits": visits}
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord(metrics)})
    return Message(content=content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate on local data."""
    model = Net()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    _, testloader = loaders(context)
    loss, accuracy = test_fn(model, testloader)
    metrics = {"eval_loss": loss, "eval_acc": accuracy, "num-examples": len(testloader.dataset)}
    return Message(content=RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)
