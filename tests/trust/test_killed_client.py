"""A client that is killed between its answer and the wire has answered: the server that asks again learns nothing new."""

from __future__ import annotations

import sys
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from trust.federation import first_model
from trust.liar import MESSAGE_ID

from fedveil.client.node.trainer import ClientProfile, TrainerReply, TrainerRequest, command
from fedveil.core.settings.experiment import Experiment
from fedveil.core.subprocesses import Child, wait_for
from fedveil.core.wire.flower import act_as
from fedveil.core.wire.messages import ARRAYS, CONFIG, REFUSED, from_arrays, from_parcel, to_arrays, to_parcel
from fedveil.privacy.trust.ledger import Ledger

NOISY = Experiment.preset("digits").override({
    "data.clients": 3, "federation.cohort": 3, "federation.rounds": 2, "model.hidden": [4], "privacy.clip": 1.0,
    "privacy.noise_multiplier": 2.0,
})  # fmt: skip
# the trainer's own code, and a SIGKILL right after the ledger returned: the answer is on the disk, and has not left
DIES = """
import os, signal
from fedveil.privacy.trust.ledger import Ledger
answer = Ledger.answer
def dying(*given, **others):
    answer(*given, **others)
    os.kill(os.getpid(), signal.SIGKILL)
Ledger.answer = dying
"""


def trainer(profile: ClientProfile, folder: Path, before: str = "") -> tuple[Child, Connection]:
    """A trainer's process, as `fedveil client` starts it."""
    ours, theirs = Pipe()
    with theirs:
        words = command(theirs.fileno(), profile)
        place = words.index("-c") + 1
        words[place] = before + words[place]
        child = Child("trainer", words, folder / "trainer.log", pass_fds=(theirs.fileno(),))
    wait_for(lambda: ours.poll(0) and ours.recv() == "ready", child, 60, "the trainer")
    return child, ours


def question(number: int = 1, rate: float = 0.1) -> TrainerRequest:
    """What the server asks; its run and its context are the same each time."""
    config = ConfigRecord({"server-round": number, "learning-rate": rate})
    content = to_parcel(RecordDict({ARRAYS: to_arrays(first_model(NOISY)), CONFIG: config}))
    act_as(1, 0, 1)
    message = Message(content, dst_node_id=1, message_type="train")
    message.metadata.__dict__["_message_id"] = MESSAGE_ID
    return TrainerRequest(message, RecordDict(), {"experiment": NOISY.toml(), "words": ""}, 1, 1)


def update(reply: TrainerReply) -> np.ndarray:
    assert reply.content is not None, reply.error
    arrays = from_arrays(from_parcel(reply.content)[ARRAYS])  # type: ignore[arg-type]
    return np.concatenate([value.reshape(-1) for value in arrays.values()])


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGKILL")
def test_an_answer_that_was_written_counts_though_it_never_left_and_is_the_one_that_leaves_later(tmp_path) -> None:
    path = tmp_path / "client.ledger"
    profile = ClientProfile(0, "digits:1/3", ledger=str(path))
    child, line = trainer(profile, tmp_path, DIES)
    line.send(question())
    assert child.process.wait(120) == -9
    with pytest.raises((EOFError, OSError)):
        line.recv()  # nothing left the process
    ledger = Ledger.open(path, "digits:1/3")
    assert ledger.totals().answers["train"] == 1

    child, line = trainer(profile, tmp_path)
    line.send(question(rate=0.2))
    refused = line.recv()
    assert refused.content is None
    assert refused.error[1] == REFUSED
    line.send(question())
    first = update(line.recv())
    line.send(question())
    np.testing.assert_array_equal(update(line.recv()), first)
    assert ledger.totals().answers["train"] == 1
    line.send(question(2))
    assert not np.array_equal(update(line.recv()), first)
    assert ledger.totals().answers["train"] == 2
    line.close()
    assert child.process.wait(30) == 0
