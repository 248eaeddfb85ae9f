"""What clients keep: the same through a node's context and a simulation's store, and safe from kills."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from flwr.app import RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.client.learning.states import ContextStates, StateKey, from_state, lend, take_back, to_state
from fedveil.core.errors import SettingsError, TrainingError
from fedveil.core.wire.messages import from_parcel, to_parcel
from fedveil.simulations.engine.states import DiskStates

LOST, OTHER = StateKey("lost"), StateKey("other")
SECRET = StateKey("secret", durable=False)


def state(value: float) -> dict[str, np.ndarray]:
    return {"w": np.full((2, 3), value, np.float32), "n": np.array(int(value))}


def same(found, wanted) -> bool:
    return found is not None and all((found[name] == value).all() for name, value in wanted.items())


@pytest.fixture(params=["context", "disk"])
def states(request, tmp_path):
    return ContextStates(RecordDict()) if request.param == "context" else DiskStates(tmp_path / "clients")


def test_each_client_keeps_its_own_under_each_key(states) -> None:
    assert states.get(3, LOST) is None
    for client, value in ((3, 1.0), (7, 2.0), (3, 5.0)):
        states.put(client, LOST, state(value))
    states.put(3, OTHER, {"x": np.arange(4.0)})
    states.put(3, SECRET, to_state(b"abc"))
    assert same(states.get(3, LOST), state(5.0))
    assert same(states.get(7, LOST), state(2.0))
    assert same(states.get(3, OTHER), {"x": np.arange(4.0)})
    assert from_state(states.get(3, SECRET)) == b"abc"
    states.drop(3, LOST)
    states.drop(4, LOST)
    states.drop(3, SECRET)
    assert states.get(3, LOST) is None
    assert states.get(3, SECRET) is None
    assert same(states.get(7, LOST), state(2.0))


def test_a_nodes_states_survive_pickling_and_a_parcel() -> None:
    records = RecordDict()
    ContextStates(records).put(3, LOST, state(5.0))
    for found in (pickle.loads(pickle.dumps(records)), from_parcel(to_parcel(records))):
        assert same(ContextStates(found).get(3, LOST), state(5.0))


def test_states_are_lent_with_a_message_and_taken_back_from_its_reply(tmp_path) -> None:
    home, message = DiskStates(tmp_path / "clients"), RecordDict()
    home.put(3, LOST, state(1.0))
    lend(home, 3, [LOST, OTHER], message)
    away = ContextStates(message)
    assert same(away.get(3, LOST), state(1.0))
    away.put(3, LOST, state(2.0))
    take_back(message, 3, [LOST, OTHER], home)
    assert not message
    assert same(home.get(3, LOST), state(2.0))


def test_what_a_client_got_is_not_what_is_kept(tmp_path) -> None:
    states = DiskStates(tmp_path / "clients")
    states.put(0, LOST, state(1.0))
    states.get(0, LOST)["w"][...] = 9
    assert same(states.get(0, LOST), state(1.0))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(
    st.tuples(st.just("put"), st.integers(0, 20), st.integers(0, 99)), st.tuples(st.just("drop"), st.integers(0, 20), st.just(0)),
    st.tuples(st.just("commit"), st.just(0), st.just(0)),
), max_size=60))  # fmt: skip
def test_a_run_killed_anywhere_finds_what_its_last_checkpoint_or_the_one_before_names(tmp_path_factory, acts) -> None:
    """Both, since a kill may leave either as the newest."""
    folder = tmp_path_factory.mktemp("store") / "clients"
    states, now = DiskStates(folder), {}
    checkpoints: list[tuple[dict, dict]] = []
    for act, client, value in acts:
        if act == "put":
            states.put(client, LOST, state(value))
            now[client] = float(value)
        elif act == "drop":
            states.drop(client, LOST)
            now.pop(client, None)
        else:
            checkpoints.append((states.commit(), dict(now)))
        assert all(same(states.get(client, LOST), state(value)) for client, value in now.items())
        for index, then in checkpoints[-2:]:
            again = DiskStates(folder, index)
            assert [client for client in range(21) if again.get(client, LOST) is not None] == sorted(then)
            assert all(same(again.get(client, LOST), state(value)) for client, value in then.items())


def test_the_file_holds_what_clients_that_wrote_need_and_is_the_users_alone(tmp_path) -> None:
    states = DiskStates(tmp_path / "clients")
    for round_number in range(50):
        for client in range(10):
            states.put(10**9 + client, LOST, state(round_number))
        states.commit()
    path = tmp_path / "clients" / "lost"
    assert path.stat().st_size <= 64 * (4 * 6 + 8)  # three versions of ten states, in a file that doubles
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_lost_or_cut_off_file_and_a_state_of_another_shape_are_said(tmp_path) -> None:
    states = DiskStates(tmp_path / "clients")
    for client in range(3):
        states.put(client, LOST, state(client))
    index = states.commit()
    with pytest.raises(TrainingError, match=r"client 1 keeps 'lost' as .* all must be alike"):
        states.put(1, LOST, {"w": np.zeros(3, np.float32)})
    path = tmp_path / "clients" / "lost"
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(SettingsError, match="lost: what clients keep between rounds is missing or cut off"):
        DiskStates(tmp_path / "clients", index)
    path.unlink()
    with pytest.raises(SettingsError, match="missing or cut off"):
        DiskStates(tmp_path / "clients", index)
