"""The arithmetic of Flower's SecAgg+ without its messages: `python flower_secagg.py SETTINGS_AS_JSON STARTED`, with flwr.

A client is the four stages of `flwr.client.mod.secure_aggregation.secaggplus_mod`, called as they are: `_setup`,
`_share_keys`, `_collect_masked_vectors`, `_unmask`. The server does what `SecAggPlusWorkflow`
(`flwr.server.workflow.secure_aggregation`) does between its messages, with the same functions of
`flwr.common.secure_aggregation`: `parameters_addition`, `combine_shares`, `generate_shared_key`, `pseudo_rand_gen` and
the others imported below. Prints a JSON line; seconds are CPU time.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
from flwr.client.mod.secure_aggregation.secaggplus_mod import (
    SecAggPlusState,
    _collect_masked_vectors,
    _setup,
    _share_keys,
    _unmask,
)
from flwr.common import ConfigRecord, bytes_to_ndarray, ndarrays_to_parameters
from flwr.common.secure_aggregation.crypto.shamir import combine_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key
from flwr.common.secure_aggregation.ndarrays_arithmetic import (
    factor_extract,
    get_parameters_shape,
    parameters_addition,
    parameters_mod,
    parameters_subtraction,
)
from flwr.common.secure_aggregation.quantization import dequantize
from flwr.common.secure_aggregation.secaggplus_constants import Key
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
from flwr.supercore.primitives.asymmetric import bytes_to_private_key, bytes_to_public_key

CLIP, TARGET, MODULUS, MOST_EXAMPLES = 8.0, 2**22, 2**32, 1000.0  # the workflow's defaults
Arrays = list[np.ndarray]


class Protocol:
    """A round of a cohort: the stages of all clients, then the server's part, which can be repeated.

    vectors: of each client, float32 [size]; examples: how many each client has
    shares: of a secret, one for each neighbour and one for the client itself; threshold: how many restore it
    """

    def __init__(self, vectors: Sequence[np.ndarray], examples: Sequence[int], shares: int, threshold: int) -> None:
        self.clients = range(len(vectors))
        self.threshold = threshold
        self.seconds = [0.0 for _ in self.clients]  # of each client
        self.masked_bytes, self.other_bytes = 0, 0  # uploaded by a client
        self.states = [SecAggPlusState() for _ in self.clients]
        self.neighbours = _ring(len(vectors), shares)
        self._set_up(shares)
        self._share()
        self.masked = [self._mask(client, vectors[client], examples[client]) for client in self.clients]

    def _set_up(self, shares: int) -> None:
        settings: Any = {
            Key.SAMPLE_NUMBER: len(self.clients), Key.SHARE_NUMBER: shares, Key.THRESHOLD: self.threshold,
            Key.CLIPPING_RANGE: CLIP, Key.TARGET_RANGE: TARGET, Key.MOD_RANGE: MODULUS, Key.MAX_WEIGHT: MOST_EXAMPLES,
        }  # fmt: skip
        self.keys: list[list[bytes]] = []
        for client, state in enumerate(self.states):
            state.nid = client
            answer = self._timed(client, _setup, state, ConfigRecord(settings))
            self.keys.append([answer[Key.PUBLIC_KEY_1], answer[Key.PUBLIC_KEY_2]])
        self.other_bytes += sum(map(len, self.keys[0]))

    def _share(self) -> None:
        self.inboxes: dict[int, list[tuple[int, bytes]]] = defaultdict(list)
        for client, state in enumerate(self.states):
            roster: Any = {str(member): self.keys[member] for member in self.neighbours[client]}
            answer = self._timed(client, _share_keys, state, ConfigRecord(roster))
            for receiver, blob in zip(answer[Key.DESTINATION_LIST], answer[Key.CIPHERTEXT_LIST], strict=True):
                self.inboxes[receiver].append((client, blob))
        self.other_bytes += sum(map(len, answer[Key.CIPHERTEXT_LIST]))

    def _mask(self, client: int, vector: np.ndarray, examples: int) -> list[bytes]:
        inbox: Any = {
            Key.SOURCE_LIST: [sender for sender, _ in self.inboxes[client]],
            Key.CIPHERTEXT_LIST: [blob for _, blob in self.inboxes[client]],
        }
        parameters = ndarrays_to_parameters([vector])
        arguments = (self.states[client], ConfigRecord(inbox), examples, parameters)
        answer: list[bytes] = self._timed(client, _collect_masked_vectors, *arguments)[Key.MASKED_PARAMETERS]
        self.masked_bytes = sum(map(len, answer))
        return answer

    def _timed(self, client: int, function: Callable[..., Any], *arguments: Any) -> Any:
        started = time.process_time()
        answer = function(*arguments)
        self.seconds[client] += time.process_time() - started
        return answer

    def total(self, dropped: set[int]) -> tuple[np.ndarray, float, int]:
        """Return the mean without the clients in `dropped`, the server's CPU seconds, and bytes of a client's shares.

        The mean is weighted. A client drops out after it has shared its keys, as late as it can.
        """
        active = set(self.clients) - dropped
        collected: dict[int, list[bytes]] = defaultdict(list)
        for client in sorted(active):
            asked: Any = {
                Key.ACTIVE_NODE_ID_LIST: list(self.neighbours[client] & active),
                Key.DEAD_NODE_ID_LIST: list(self.neighbours[client] & dropped),
            }
            answer: Any = _unmask(self.states[client], ConfigRecord(asked))
            for owner, share in zip(answer[Key.NODE_ID_LIST], answer[Key.SHARE_LIST], strict=True):
                collected[owner].append(share)
        started = time.process_time()
        summed: Arrays = []
        for client in sorted(active):
            arrays = [bytes_to_ndarray(blob) for blob in self.masked[client]]
            summed = parameters_addition(summed, arrays) if summed else arrays
        mean = self._unmasked(parameters_mod(summed, MODULUS), collected, active)
        return mean, time.process_time() - started, sum(map(len, answer[Key.SHARE_LIST]))

    def _unmasked(self, summed: Arrays, collected: dict[int, list[bytes]], active: set[int]) -> np.ndarray:
        shapes = get_parameters_shape(summed)
        for client, shares in collected.items():
            secret = combine_shares(shares)
            if client in active:
                summed = parameters_subtraction(summed, pseudo_rand_gen(secret, MODULUS, shapes))
                continue
            for other in self.neighbours[client] - {client}:
                key = generate_shared_key(bytes_to_private_key(secret), bytes_to_public_key(self.keys[other][0]))
                mask = pseudo_rand_gen(key, MODULUS, shapes)
                summed = (parameters_addition if client > other else parameters_subtraction)(summed, mask)
        factor, whole = factor_extract(parameters_mod(summed, MODULUS))
        (mean,) = dequantize(whole, CLIP, TARGET)
        return np.asarray((mean - (len(active) - 1) * CLIP) * (TARGET / factor))


def _ring(clients: int, shares: int) -> list[set[int]]:
    """Return each client's neighbours, itself included, on a circle of all clients in random order."""
    order = random.sample(range(clients), clients)
    reach = range(-(shares // 2), shares // 2 + 1)
    places = {client: place for place, client in enumerate(order)}
    return [{order[(places[client] + step) % clients] for step in reach} for client in range(clients)]


def measure(size: int, clients: int, shares: int, threshold: int, drop_outs: float) -> dict[str, Any]:
    """Measure CPU seconds and bytes of a round, and the server's again with a share `drop_outs` of clients dropped.

    Raises ValueError where a mean is not that of the remaining clients.
    """
    rng = np.random.default_rng(0)
    vectors = [rng.normal(0, 0.05, size).astype(np.float32) for _ in range(clients)]
    examples = rng.integers(100, int(MOST_EXAMPLES), clients)
    protocol = Protocol(vectors, [int(n) for n in examples], shares, threshold)
    found: dict[str, Any] = {
        "client_s": statistics.median(protocol.seconds), "masked_bytes": protocol.masked_bytes, "version": version("flwr")
    }  # fmt: skip
    for name, dropped in (("round_s", 0), ("server_dropped_s", int(drop_outs * clients))):
        mean, seconds, sent = protocol.total(set(range(dropped)))
        expected = np.average(vectors[dropped:], axis=0, weights=examples[dropped:])
        error = float(np.abs(mean - expected).max())
        if not error < 1e-3:
            raise ValueError(
                f"Flower's SecAgg+ gave a mean that is {error:g} off with {dropped} of {clients} dropped out"
            )
        found |= {name: seconds, "error": error, "other_bytes": protocol.other_bytes + sent}
    return found


def main(settings: dict[str, Any]) -> None:
    """Print a round's figures."""
    print(json.dumps(measure(**settings)))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
