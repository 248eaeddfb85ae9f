"""Secure aggregation: exact sums whoever drops out when, and vectors that are noise to the server until then."""

from __future__ import annotations

import hmac
import struct
from itertools import chain, combinations

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from helpers.aggregations import ADVERT, ALL, CONFIRMATION, NOTHING, SHARES, VECTOR, Aggregation, numbers, session
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from fedveil.core.errors import ProtectionError
from fedveil.privacy.secagg import messages as rosters
from fedveil.privacy.secagg.client import SecAggClient, mask_cohort
from fedveil.privacy.secagg.graph import choose_degree
from fedveil.privacy.secagg.messages import Kind
from fedveil.privacy.secagg.revealed import Revealed
from fedveil.privacy.secagg.server import SecAggServer

PRIME = 2**256 + 297


# A second implementation, from the papers and RFCs, which shares no code with the first.


def ladder(private: bytes, public: bytes) -> bytes:
    """X25519 as RFC 7748, section 5, writes it."""
    p = 2**255 - 19
    k = (int.from_bytes(private, "little") & ~7 & (2**255 - 1)) | 2**254
    x1 = int.from_bytes(public, "little") & (2**255 - 1)
    x2, z2, x3, z3 = 1, 0, x1, 1
    for bit in range(254, -1, -1):
        if k >> bit & 1:
            x2, z2, x3, z3 = x3, z3, x2, z2
        a, b, c, d = x2 + z2, x2 - z2, x3 + z3, x3 - z3
        aa, bb, da, cb = a * a % p, b * b % p, d * a % p, c * b % p
        e = aa - bb
        x3, z3 = (da + cb) ** 2 % p, x1 * (da - cb) ** 2 % p
        x2, z2 = aa * bb % p, e * (aa + 121665 * e) % p
        if k >> bit & 1:
            x2, z2, x3, z3 = x3, z3, x2, z2
    return (x2 * pow(z2, p - 2, p) % p).to_bytes(32, "little")


def hkdf(secret: bytes, info: bytes) -> bytes:
    """RFC 5869 for 32 bytes, without a salt."""
    extracted = hmac.digest(bytes(32), secret, "sha256")
    return hmac.digest(extracted, info + b"\x01", "sha256")


def purpose(name: bytes, digest: bytes, one: int, other: int) -> bytes:
    return b"fedveil " + name + b"\x00" + digest + one.to_bytes(8, "big") + other.to_bytes(8, "big")


def keystream(key: bytes, size: int) -> list[int]:
    """AES-256 of 0, 1, 2, ..., four little-endian numbers a block."""
    block = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    data = b"".join(block.update(counter.to_bytes(16, "big")) for counter in range(size // 4 + 1))
    return list(struct.unpack(f"<{size}I", data[: 4 * size]))


def entries(message: bytes) -> dict[int, bytes]:
    """What a message says by client, without its header of 49 bytes."""
    count, found, place = int.from_bytes(message[45:49], "big"), {}, 49
    for _ in range(count):
        client, length = struct.unpack(">QH", message[place : place + 10])
        found[client] = message[place + 10 : place + 10 + length]
        place += 10 + length
    return found


def pair_mask(private: bytes, public: bytes, digest: bytes, one: int, other: int, size: int) -> list[int]:
    """What client `one` adds for client `other`: the mask, or its negative."""
    key = hkdf(ladder(private, public), purpose(b"pair mask", digest, min(one, other), max(one, other)))
    return [number if one < other else -number for number in keystream(key, size)]


def self_mask(seed: bytes, digest: bytes, client: int, size: int) -> list[int]:
    return keystream(hkdf(seed, purpose(b"self mask", digest, client, client)), size)


def interpolate(points: dict[int, int]) -> int:
    total = 0
    for i, y in points.items():
        above = below = 1
        for j in points:
            if j != i:
                above, below = above * -j % PRIME, below * (i - j) % PRIME
        total += y * above * pow(below, PRIME - 2, PRIME)
    return total % PRIME


def secrets_of(masker: SecAggClient) -> tuple[bytes, bytes, bytes]:
    """Private sealing key, private mask key and seed, out of a state before `mask` forgets them."""
    start = 4 + 1 + 69 + 8
    state = masker.save()
    return state[start : start + 32], state[start + 32 : start + 64], state[start + 64 : start + 96]


def masks_of(play: Aggregation, client: int) -> dict[int, list[int]]:
    """All masks of a client by whom they are exchanged with, its own among them; before it masks."""
    _, private, seed = secrets_of(play.maskers[client])
    digest, size = play.session.digest, play.session.size
    keys = {peer: advert[32:64] for peer, advert in entries(play.said["rosters"][client]).items()}
    masks = {client: self_mask(seed, digest, client, size)}
    for peer in entries(play.said["inboxes"][client]):
        masks[peer] = pair_mask(private, keys[peer], digest, client, peer, size)
    return masks


def independent_total(play: Aggregation) -> list[int]:
    """The sum as a second server makes it of the same messages."""
    digest, size, threshold = play.session.digest, play.session.size, play.session.threshold
    survivors = sorted(entries(play.listed))
    adverts = {client: entries(blob)[client] for client, blob in play.said["adverts"].items()}
    total = [sum(int(play.masked[client][i]) for client in survivors) for i in range(size)]
    points: dict[int, dict[int, int]] = {}
    for holder, blob in play.said["reveals"].items():
        for owner, entry in entries(blob).items():
            assert entry[:1] == (b"b" if owner in survivors else b"k")
            place = sorted(entries(play.said["rosters"][owner])).index(holder) + 1
            points.setdefault(owner, {})[place] = int.from_bytes(entry[1:], "big")
    for owner, shares in points.items():
        secret = interpolate(dict(list(shares.items())[-threshold:])).to_bytes(32, "big")
        if owner in survivors:
            masks = [self_mask(secret, digest, owner, size)]
        else:
            assert ladder(secret, (9).to_bytes(32, "little")) == adverts[owner][32:64]
            peers = [peer for peer in play.around[owner] if peer in survivors]
            masks = [pair_mask(secret, adverts[peer][32:64], digest, peer, owner, size) for peer in peers]
        total = [have - sum(mask[i] for mask in masks) for i, have in enumerate(total)]
    return [number % 2**32 for number in total]


def received(play: Aggregation) -> Aggregation:
    """Play until every client may mask."""
    play.until("adverts", "shares")
    here = play.server.close()
    play.said["inboxes"] = {client: play.server.inbox(client) for client in here}
    for client in here:
        play.maskers[client].receive(play.said["inboxes"][client])
    return play


def test_the_second_implementation_is_right_about_the_standards() -> None:
    scalar = bytes.fromhex("a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4")
    point = bytes.fromhex("e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c")
    assert ladder(scalar, point).hex() == "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552"
    key = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")  # of NIST SP 800-38A
    counter_mode = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor().update(bytes(40))
    assert struct.pack("<10I", *keystream(key, 10)) == counter_mode


def test_an_independent_client_makes_the_same_masked_vectors() -> None:
    play = received(Aggregation(session(size=9, threshold=4), [0, 3, 4, 8, 2**40], numbers(5, 9)))
    for client in play.clients:
        masks = masks_of(play, client)
        assert masks.keys() == set(play.clients)
        slow = [
            (int(value) + sum(mask[i] for mask in masks.values())) % 2**32 for i, value in enumerate(play.value(client))
        ]
        assert play.maskers[client].mask(play.value(client)).tolist() == slow


def test_an_independent_client_reads_the_shares_that_are_sealed_for_it() -> None:
    play = received(Aggregation(session(threshold=3), range(4), numbers(4, 5)))
    digest, opened = play.session.digest, {}
    for receiver in range(4):
        sealing, _, _ = secrets_of(play.maskers[receiver])
        for sender, sealed in entries(play.said["inboxes"][receiver]).items():
            public = entries(play.said["rosters"][receiver])[sender][:32]
            bound = purpose(b"shares", digest, sender, receiver)
            opened[sender, receiver] = AESGCM(hkdf(ladder(sealing, public), bound)).decrypt(
                sealed[:12], sealed[12:], bound
            )
    for sender in range(4):
        _, private, seed = secrets_of(play.maskers[sender])
        shares = {receiver + 1: opened[sender, receiver] for receiver in range(4) if receiver != sender}
        for secret, part in ((seed, slice(0, 33)), (private, slice(33, 66))):
            points = {point: int.from_bytes(share[part], "big") for point, share in shares.items()}
            assert interpolate(points) == int.from_bytes(secret, "big")


@pytest.mark.parametrize(("degree", "threshold"), [(4, 3), (8, 6)])
def test_an_independent_server_gets_the_same_sum(degree: int, threshold: int) -> None:
    play = Aggregation(session(6, threshold), range(9), numbers(9, 6), degree, {2: SHARES, 5: VECTOR})
    total = play.total()
    assert total.tolist() == independent_total(play)
    assert total.tolist() == play.sum([0, 1, 3, 4, 5, 6, 7, 8]).tolist()


@settings(max_examples=40, deadline=None)
@given(st.integers(3, 40), st.data())
def test_sums_are_exact_for_whoever_is_left_and_else_nothing_is_revealed(n: int, data: st.DataObject) -> None:
    gone = data.draw(st.dictionaries(st.integers(0, n - 1), st.integers(NOTHING, CONFIRMATION), max_size=n // 3 + 1))
    threshold = data.draw(st.integers(n // 2 + 1, n))
    least = data.draw(st.integers(3, n))
    leaves = {client: min(stage, VECTOR) for client, stage in gone.items()}
    play = Aggregation(session(3, threshold, least), range(n), numbers(n, 3, n), leaves=leaves)
    vectors = [client for client in range(n) if leaves.get(client, ALL) >= VECTOR]
    shares = [client for client in range(n) if leaves.get(client, ALL) == ALL]
    if len(vectors) < max(threshold, least):
        with pytest.raises(ProtectionError, match="abandoned, nothing was revealed"):
            play.total()
        assert "reveals" not in play.said
    elif len(shares) < threshold:
        with pytest.raises(ProtectionError, match=r"masks of clients .* cannot be taken off"):
            play.total()
    else:
        assert play.total().tolist() == play.sum(vectors).tolist()
        assert entries(play.listed).keys() == set(vectors)


@settings(max_examples=15, deadline=None)
@given(st.integers(12, 40), st.booleans(), st.booleans(), st.data())
def test_sums_are_exact_on_sparse_graphs(n: int, restored: bool, together: bool, data: st.DataObject) -> None:
    degree, threshold = choose_degree(n, 0.2, 0.1)
    assert degree < n - 1
    leaves = data.draw(st.dictionaries(st.integers(0, n - 1), st.integers(NOTHING, VECTOR), max_size=n // 5))
    play = Aggregation(session(3, threshold), range(n), numbers(n, 3, n), degree, leaves, restored, together)
    survivors = [client for client in range(n) if leaves.get(client, ALL) >= VECTOR]
    assert play.total().tolist() == play.sum(survivors).tolist()
    assert set(play.server.dropped) == {client for client in leaves if leaves[client] < VECTOR}


@pytest.mark.parametrize("active", [False, True])
@pytest.mark.parametrize("stage", [NOTHING, ADVERT, SHARES, VECTOR, CONFIRMATION])
def test_a_client_may_drop_out_after_every_stage(stage: int, active: bool) -> None:
    play = Aggregation(
        session(8, 5, active=active), range(7), numbers(7, 8), leaves={0: stage, 4: stage}, restored=True
    )
    left = range(7) if stage >= VECTOR else [1, 2, 3, 5, 6]
    assert play.total().tolist() == play.sum(left).tolist()


@pytest.mark.parametrize("active", [False, True])
@pytest.mark.parametrize("stage", [NOTHING, ADVERT, SHARES, VECTOR, CONFIRMATION])
def test_with_too_few_left_the_attempt_is_abandoned_and_names_the_missing(stage: int, active: bool) -> None:
    play = Aggregation(session(8, 5, active=active), range(7), numbers(7, 8), leaves=dict.fromkeys((0, 4, 6), stage))
    late = stage == CONFIRMATION or (stage == VECTOR and not active)
    told = "after some shares were revealed" if late else "nothing was revealed"
    with pytest.raises(ProtectionError, match=f"round 7, attempt 0, is abandoned, {told}: .* 0, 4, 6"):
        play.total()
    assert ("reveals" in play.said) == late
    with pytest.raises(ProtectionError, match="waits for over"):
        play.server.total()


def test_a_client_without_enough_neighbours_is_left_out_before_others_mask_with_it() -> None:
    play = Aggregation(session(4, 3), range(12), numbers(12, 4), degree=4)
    lonely = 0
    for client in play.around[lonely][:3]:
        play.leaves = {**play.leaves, client: ADVERT}
    total = play.total()
    assert lonely in play.server.dropped
    assert total.tolist() == play.sum(play.server.clients).tolist()
    assert lonely not in play.server.clients


def test_where_one_neighbourhood_lost_too_many_vectors_the_attempt_is_abandoned_before_any_share_is_revealed() -> None:
    play = Aggregation(session(4, 3), range(12), numbers(12, 4), degree=4)
    play.leaves = dict.fromkeys(play.around[0][:3], SHARES)
    with pytest.raises(
        ProtectionError, match=r"nothing was revealed: of the neighbourhood of client \d+ 2 sent a vector"
    ):
        play.total()
    assert "reveals" not in play.said


@pytest.mark.parametrize(("degree", "threshold"), [(4, 3), (8, 5)])
def test_a_cohort_masked_together_is_masked_as_each_alone(degree: int, threshold: int) -> None:
    play = received(Aggregation(session(50, threshold), range(9), numbers(9, 50), degree, {4: ADVERT}))
    here = [2, 0, 8, 1, 7]  # some of them, in any order: the others may be on other machines
    alone = {client: SecAggClient.load(play.maskers[client].save()).mask(play.value(client)) for client in here}
    rows = np.stack([play.value(client) for client in here])
    together = [play.maskers[client] for client in here]
    mask_cohort(together, rows)
    assert np.array_equal(rows, np.stack([alone[client] for client in here]))
    with pytest.raises(ProtectionError, match="cannot mask: it has masked"):
        mask_cohort(together, rows)


def test_a_cohort_that_was_shown_different_keys_is_still_masked_as_each_alone() -> None:
    play = Aggregation(session(6, 3), range(4), numbers(4, 6)).until("adverts")
    stranger = SecAggClient.begin(play.session, 1).advertise()
    for client in play.server.close():
        adverts = entries(play.server.roster(client))
        if client == 0:
            adverts[1] = adverts[1][:32] + entries(stranger)[1][32:]
        roster = rosters.pack(Kind.ROSTER, play.session, client, adverts)
        play.server.shares(client, play.maskers[client].share(roster))
    for client in play.server.close():
        play.maskers[client].receive(play.server.inbox(client))
    alone = [SecAggClient.load(masker.save()).mask(play.value(client)) for client, masker in play.maskers.items()]
    rows = play.values.copy()
    mask_cohort(list(play.maskers.values()), rows)
    assert np.array_equal(rows, np.stack(alone))


def test_a_cohort_of_which_one_was_not_told_of_another_is_still_masked_as_each_alone() -> None:
    play = Aggregation(session(6, 3), range(4), numbers(4, 6)).until("adverts", "shares")
    for client in play.server.close():
        inbox = entries(play.server.inbox(client))
        if client == 3:
            del inbox[0]
        play.maskers[client].receive(rosters.pack(Kind.INBOX, play.session, client, inbox))
    alone = [SecAggClient.load(masker.save()).mask(play.value(client)) for client, masker in play.maskers.items()]
    rows = play.values.copy()
    mask_cohort(list(play.maskers.values()), rows)
    assert np.array_equal(rows, np.stack(alone))


def test_a_client_is_not_masked_twice_in_a_cohort() -> None:
    play = received(Aggregation(session(), range(3), numbers(3, 5)))
    with pytest.raises(ProtectionError, match="twice"):
        mask_cohort([play.maskers[0], play.maskers[0]], numbers(2, 5))


def looks_uniform(numbers: np.ndarray) -> bool:
    """Chi-square over bytes; a uniform one is taken for something else once in 10^11."""
    counts = np.bincount(numbers.astype("<u4").view(np.uint8), minlength=256)
    expected = counts.sum() / 256
    return bool(((counts - expected) ** 2 / expected).sum() < chi2.isf(1e-11, 255))


def test_to_the_server_equal_vectors_are_noise_until_the_last_mask_is_off() -> None:
    size = 20_000
    values = np.full((3, size), 5, np.uint32)
    play = received(Aggregation(session(size, 2), range(3), values))
    masks = {client: masks_of(play, client) for client in range(3)}
    masked = {client: play.maskers[client].mask(values[client]) for client in range(3)}
    assert not looks_uniform(values[0])
    assert looks_uniform(masked[0])
    assert looks_uniform(masked[0] - masked[1])
    assert looks_uniform(masked[0] + masked[1])
    for kept in masks[0]:
        left = masked[0].copy()
        for peer, mask in masks[0].items():
            if peer != kept:
                left -= np.array(mask).astype(np.uint32)
        assert looks_uniform(left), f"without all masks but the one with {kept}"
        left -= np.array(masks[0][kept]).astype(np.uint32)
        assert np.array_equal(left, values[0])


def test_fresh_keys_make_other_masks_in_every_attempt() -> None:
    values, seen = np.zeros((3, 64), np.uint32), set()
    for attempt in range(3):
        play = received(Aggregation(session(64, 2, attempt=attempt), range(3), values))
        for client in range(3):
            seen.update(play.maskers[client].mask(values[client]).tolist())
    assert len(seen) > 9 * 64 - 4


def test_a_client_never_gives_both_shares_of_anybody_whatever_lists_it_is_shown() -> None:
    play = received(Aggregation(session(threshold=3), range(5), numbers(5, 5)))
    play.maskers[0].mask(play.value(0))
    state = play.maskers[0].save()
    subsets = list(chain.from_iterable(combinations(range(5), k) for k in range(6)))
    safe = [subset for subset in subsets if 0 in subset and len(subset) >= 3]
    for first in subsets:
        memory, given, answered = Revealed(), {}, []
        for subset in (first, *subsets, first):
            survivors = rosters.pack(Kind.SURVIVORS, play.session, 0, dict.fromkeys(subset, b""))
            client = SecAggClient.load(state)
            memory = Revealed.load(memory.save())
            try:
                answer = entries(client.reveal(survivors, memory))
            except ProtectionError:
                continue
            answered.append(subset)
            for owner, entry in answer.items():
                given.setdefault(owner, set()).add(entry)
        assert set(answered) == {first if first in safe else safe[0]}
        assert all(len(shares) == 1 for shares in given.values())
        assert given.keys() == set(range(5))


def test_a_round_that_was_unmasked_is_not_unmasked_in_another_attempt_nor_an_earlier_round() -> None:
    first = Aggregation(session(round=4), range(3), numbers(3, 5))
    first.total()
    memory = first.memory[0]

    def again(**changes: int) -> bytes:
        same = {"round": 4, "attempt": 0, **changes}
        later = rosters.Session(first.session.run, same["round"], same["attempt"], 5, 3, 3)
        play = received(Aggregation(later, range(3), numbers(3, 5)))
        play.maskers[0].mask(play.value(0))
        survivors = rosters.pack(Kind.SURVIVORS, later, 0, dict.fromkeys(range(3), b""))
        return play.maskers[0].reveal(survivors, memory)

    for changes in ({"attempt": 1}, {"round": 3}):
        with pytest.raises(ProtectionError, match=r"round \d was unmasked already \(the latest: round 4\)"):
            again(**changes)
    assert again(round=5, attempt=2)
    with pytest.raises(ProtectionError, match="unmasked already"):
        again(attempt=1)
    assert received(Aggregation(session(round=1), range(3), numbers(3, 5)))  # another run has rounds of its own


def test_the_same_list_again_gives_the_same_answer() -> None:
    play = Aggregation(session(), range(3), numbers(3, 5))
    play.total()
    assert play.maskers[1].reveal(play.listed, play.memory[1]) == play.said["reveals"][1]


def test_a_client_goes_through_the_stages_in_order_and_once() -> None:
    play = Aggregation(session(), range(3), numbers(3, 5))
    client, values = play.maskers[0], play.value(0)
    for early in (lambda: client.share(b""), lambda: client.receive(b""), lambda: client.mask(values)):
        with pytest.raises(ProtectionError, match=r"client 0 cannot \w+: it has begun in round 7, attempt 0"):
            early()
    with pytest.raises(ProtectionError, match="cannot reveal"):
        client.reveal(b"", Revealed())
    play.total()
    for late in (client.advertise, lambda: client.share(b""), lambda: client.receive(b""), lambda: client.mask(values)):
        with pytest.raises(ProtectionError, match="it has revealed"):
            late()


def test_a_refused_message_changes_nothing_and_a_right_one_is_still_taken() -> None:
    play = Aggregation(session(), range(4), numbers(4, 5)).until("adverts")
    client, state = play.maskers[2], play.maskers[2].save()
    with pytest.raises(ProtectionError, match="roster: of client 1, not of client 2"):
        client.share(play.server.roster(1))
    assert client.save() == state
    client.share(play.server.roster(2))


@pytest.mark.parametrize(
    "values", [np.zeros(5, np.int32), np.zeros(5, np.uint64), np.zeros(4, np.uint32), np.zeros((1, 5), np.uint32)]
)
def test_vectors_of_another_type_or_size_are_refused_on_both_sides(values: np.ndarray) -> None:
    play = received(Aggregation(session(), range(3), numbers(3, 5)))
    with pytest.raises(ProtectionError, match=r"uint32 \[5\], not"):
        play.maskers[0].mask(values)
    with pytest.raises(ProtectionError, match=r"client 0, vectors: .*uint32 \[5\], not"):
        play.server.add(0, values)


def test_neither_repr_nor_errors_show_a_secret_and_after_masking_the_state_holds_none_of_its_own() -> None:
    play = received(Aggregation(session(), range(3), numbers(3, 5)))
    client = play.maskers[0]
    own = secrets_of(client)
    assert all(secret != bytes(32) and secret in client.save() for secret in own)
    shown = repr(client) + repr(play.server)
    with pytest.raises(ProtectionError) as refusal:
        client.mask(np.zeros(1, np.uint32))
    shown += str(refusal.value)
    assert not any(secret.hex() in shown or repr(secret)[2:-1] in shown for secret in own)
    client.mask(play.value(0))
    assert not any(secret in client.save() for secret in own)


def test_the_server_keeps_one_vector_however_many_clients_send_one() -> None:
    play = Aggregation(session(1000, 7), range(12), numbers(12, 1000)).until("adverts", "shares", "vectors")
    kept = [value for value in vars(play.server).values() if isinstance(value, np.ndarray)]
    assert [vector.shape for vector in kept] == [(1000,)]
    blobs = [value for value in play.server._answered.values() if value]
    assert not blobs


def test_a_session_binds_everything_and_refuses_what_cannot_be() -> None:
    fields = {"run": bytes(16), "round": 1, "attempt": 0, "size": 5, "threshold": 3, "least": 3, "active": False}
    others = {"run": b"x" * 16, "round": 2, "attempt": 1, "size": 6, "threshold": 4, "least": 4, "active": True}
    others["manifest"] = b"m" * 32
    made = [rosters.Session(**fields)] + [rosters.Session(**{**fields, name: other}) for name, other in others.items()]
    assert len({one.digest for one in made}) == 9
    assert all(rosters.Session.load(one.save()) == one for one in made)
    for wrong in ({"run": b""}, {"manifest": b"m"}, {"round": -1}, {"size": 0}, {"threshold": 2**32}, {"least": 0}):
        with pytest.raises(ProtectionError, match="no session"):
            rosters.Session(**{**fields, **wrong})


def test_an_active_session_takes_keys_to_sign_with() -> None:
    with pytest.raises(ProtectionError, match=r"client 3.*a key to sign with and a registry"):
        SecAggClient.begin(session(active=True), 3)
    with pytest.raises(ProtectionError, match="registry"):
        SecAggServer(session(active=True), [0, 1, 2], {0: (1, 2), 1: (0, 2), 2: (0, 1)})
