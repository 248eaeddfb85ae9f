"""A key pair and a plan for each scheme, made once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from helpers.fuzzing import name_parsers

from fedveil.core.settings.sections import Privacy
from fedveil.privacy.homomorphic.keys import (
    CLIENT,
    SERVER,
    ClientKey,
    ServerContext,
    load_client,
    load_server,
    write_keys,
)
from fedveil.privacy.plan import Plan, make_plan


def pytest_collection_modifyitems(items):
    name_parsers(items)


@dataclass(frozen=True)
class Parties:
    """A client and a server with the files of one key; cohorts of 12."""

    plan: Plan
    client: ClientKey
    server: ServerContext
    folder: Path


@pytest.fixture(scope="session")
def parties(tmp_path_factory) -> Callable[..., Parties]:
    """Parties of a scheme; another `number` is another key."""

    @cache
    def make(scheme: str, number: int = 0) -> Parties:
        plan = make_plan(Privacy(protection=scheme), 12)
        folder = tmp_path_factory.mktemp(scheme) / "keys"
        write_keys(folder, plan.lattice, 2)
        client, server = load_client(folder / "client-1" / CLIENT), load_server(folder / "server" / SERVER)
        return Parties(plan, client, server, folder)

    return make
